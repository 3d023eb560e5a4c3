"""Weights re-fitted to full precision's outputs: the least-squares problem that it promises, and what it leaves alone."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import nn

from fqsweep.models import quantisable_layers
from fqsweep.quant import reconstruction
from fqsweep.quant.convert import attach_quantisers, quantisers_of
from fqsweep.quant.moments import match_moments, output_moments
from fqsweep.quant.reconstruction import DAMPING, Reconstruction, noting_patches
from fqsweep.quant.steps import choose_steps
from fqsweep.quant.units import list_units
from tests.quant.test_convert import steps_of


def images(number: int, side: int = 6) -> torch.Tensor:
    """Neighbouring pixels alike and channels correlated, as inputs of a layer are."""
    noise = torch.randn(number, 3, side, side, generator=torch.Generator().manual_seed(1))
    return noise + noise.mean(dim=1, keepdim=True) + noise.roll(1, dims=3)


def network(*, groups: int = 1, norm: bool = True, bias: bool = False, last: bool = True) -> nn.Module:
    """Two convolutions and a classifier; the second convolution has 4 x 4 places."""
    torch.manual_seed(0)
    behind = [nn.BatchNorm2d(6)] if norm else []
    ends = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)] if last else []
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 6, 3, groups=groups, bias=bias), *behind, nn.ReLU(), *ends),
    ).eval()


def rounded_copy(model: nn.Module, bits: list[int] | np.ndarray, **options: Any) -> nn.Module:
    model = copy.deepcopy(model)
    units = list_units(model, granularity="channel")
    attach_quantisers(model, units, steps_of(model, units), np.array(bits), **options)
    return model


def latent(model: nn.Module, name: str) -> torch.Tensor:
    chain: Any = model.get_submodule(name).parametrizations
    weight: torch.Tensor = chain.weight.original.detach()
    return weight


def patches_of(model: nn.Module, image: torch.Tensor) -> dict[str, torch.Tensor]:
    names = list(quantisable_layers(model))
    with noting_patches(model, names=names, num_images=len(image)) as found, torch.no_grad():
        model(image)
    return found


def reconstruct(rounded: nn.Module, model: nn.Module, image: torch.Tensor) -> None:
    before = Reconstruction(patches_of(model, image), num_images=len(image), rule="mse")
    match_moments(rounded, output_moments(model, image), image, before=before)


def distances(rounded: nn.Module, model: nn.Module, image: torch.Tensor) -> tuple[float, float]:
    """Mean square by which outputs are off, matched alone and reconstructed too."""
    matched, both = copy.deepcopy(rounded), copy.deepcopy(rounded)
    match_moments(matched, output_moments(model, image), image)
    reconstruct(both, model, image)
    with torch.no_grad():
        wanted = model(image)
        return float((matched(image) - wanted).square().mean()), float((both(image) - wanted).square().mean())


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1, bias=False),
        nn.Conv2d(4, 8, (3, 2), stride=(2, 3), padding=(2, 1), dilation=(1, 2), groups=2),
        nn.Conv2d(4, 4, 1, stride=2, groups=4),
    ],
)
def test_patches_are_what_the_rows_of_weights_multiply(
    layer: nn.Conv2d, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconstruction, "MOST_PLACES_AN_IMAGE", 7)
    image = torch.randn(5, 4, 9, 11, generator=torch.Generator().manual_seed(2))
    (patch_gpi,) = patches_of(nn.Sequential(layer), image).values()
    unfolded_bip = nn.functional.unfold(image, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # type: ignore[arg-type]
    place = reconstruction._sample(unfolded_bip.shape[2], 7, image.device)
    wanted_bgip = unfolded_bip[:, :, place].unflatten(1, (layer.groups, -1))
    assert torch.equal(patch_gpi, wanted_bgip.permute(1, 0, 3, 2).flatten(1, 2))


# Half of the first layer's channels are gone, the rest and the second layer are coarse.
DROPPED = [0, 2, 0, 4, 0, 3, 0, 8] + [4, 0, 2, 1, 8, 3] + [8] * 4


def unfolded(model: nn.Module, image: torch.Tensor, groups: int) -> np.ndarray:
    """What the second convolution's weights multiply, by a plain loop over places: (groups, places, inputs)."""
    with torch.no_grad():
        value = model[2](model[1](model[0](image))).numpy()  # type: ignore[index, operator]
    rows = [value[n, :, y : y + 3, x : x + 3] for n in range(len(value)) for y in range(4) for x in range(4)]
    return np.stack([row.reshape(groups, -1) for row in rows], axis=1)


@pytest.mark.parametrize("number", [3, 40])  # fewer places than inputs, and more
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("norm", [True, False])
def test_weights_are_the_ridge_regression_of_full_precisions_outputs(
    number: int, groups: int, norm: bool
) -> None:
    model, image = network(groups=groups, norm=norm), images(number)
    rounded = rounded_copy(model, DROPPED)
    before = latent(rounded, "3").clone()
    reconstruct(rounded, model, image)
    full, now = unfolded(model, image, groups), unfolded(rounded, image, groups)
    weight_gci = before.view(groups, 6 // groups, -1).numpy()
    centred = now - now.mean(axis=1, keepdims=True) if norm else now
    alpha = DAMPING * np.square(centred).sum(axis=1).mean()  # one for all groups
    for g in range(groups):
        # Without norm and bias nothing corrects the mean, so the weights see to it.
        ridge = Ridge(alpha=alpha, fit_intercept=norm).fit(now[g], (full[g] - now[g]) @ weight_gci[g].T)
        found = latent(rounded, "3").view(groups, 6 // groups, -1)[g].numpy()
        kept = [c for c in range(6 // groups) if g * (6 // groups) + c != 1]
        np.testing.assert_allclose(found[kept], (weight_gci[g] + ridge.coef_)[kept], atol=2e-4)
    assert torch.equal(latent(rounded, "3")[1], before[1])  # dropped: nothing to fit
    assert not torch.allclose(latent(rounded, "3")[0], before[0], atol=1e-2)


def test_a_bias_takes_up_the_mean() -> None:
    model, image = network(norm=False, bias=True), images(40)
    rounded = rounded_copy(model, DROPPED)
    before = latent(rounded, "3").clone()
    reconstruct(rounded, model, image)
    full, now = unfolded(model, image, 1)[0], unfolded(rounded, image, 1)[0]
    alpha = DAMPING * np.square(now - now.mean(axis=0)).sum(axis=0).mean()
    wanted = before.flatten(1).numpy()
    wanted = wanted + Ridge(alpha=alpha).fit(now, (full - now) @ wanted.T).coef_
    found = latent(rounded, "3").flatten(1).numpy()
    # Matching stretches weights and steps of such a layer afterwards: what is left is the direction.
    for c in (0, 2, 3, 4, 5):
        assert np.dot(found[c], wanted[c]) / np.linalg.norm(found[c]) / np.linalg.norm(wanted[c]) > 1 - 1e-6


def test_what_dropped_channels_said_is_said_by_others() -> None:
    """In eight bits a copy of a channel takes over the other's part, which weights alone cannot know."""
    model, image = network(), images(40)
    with torch.no_grad():
        model[0].weight[1] = model[0].weight[0]  # type: ignore[index, union-attr, operator]
    matched, both = distances(rounded_copy(model, [8, 0] + [8] * 16), model, image)
    assert both < 0.05 * matched


def test_steps_fit_the_new_weights_and_other_widths_keep_theirs() -> None:
    model, image = network(), images(40)
    rounded = rounded_copy(model, DROPPED)
    quantiser = quantisers_of(rounded)["3"]
    before_ub = quantiser.step_ub.clone()
    reconstruct(rounded, model, image)
    weight_un = latent(rounded, "3").flatten(1)
    for unit, bits in enumerate(DROPPED[8:14]):
        if bits:
            wanted = choose_steps(weight_un[unit : unit + 1], (bits,), rule="mse")
            torch.testing.assert_close(quantiser.step_ub[unit, bits], wanted[0, 0])
    unused = [5, 6, 7]
    assert torch.equal(quantiser.step_ub[:, unused], before_ub[:, unused])


def test_curvature_weighs_steps_by_the_inputs_that_the_layer_has_now(monkeypatch: pytest.MonkeyPatch) -> None:
    model, image = network(norm=False), images(40)
    rounded = rounded_copy(model, DROPPED)
    seen = []

    def noted(weight_un: torch.Tensor, choices: Any, *, rule: str, curvature_un: torch.Tensor) -> torch.Tensor:
        seen.append((rule, curvature_un))
        return choose_steps(weight_un, choices, rule=rule, curvature_un=curvature_un)  # type: ignore[arg-type]

    monkeypatch.setattr(reconstruction, "choose_steps", noted)
    before = Reconstruction(patches_of(model, image), num_images=len(image), rule="curvature")
    match_moments(rounded, output_moments(model, image), image, before=before)
    of_layer = [
        curvature_un for rule, curvature_un in seen if curvature_un.shape[1] == 72 and rule == "curvature"
    ]
    assert sum(map(len, of_layer)) == 5  # one of the six channels is dropped
    now = np.square(unfolded(rounded, image, 1)[0]).mean(axis=0)
    for curvature_un in of_layer:
        np.testing.assert_allclose(
            curvature_un.numpy(), np.tile(now, (len(curvature_un), 1)), rtol=1e-4, atol=1e-7
        )


def test_learned_bits_get_steps_for_every_width_that_they_may_reach() -> None:
    model, image = network(), images(40)
    rounded = rounded_copy(model, DROPPED, learn_bits="fracbits")
    before_ub = quantisers_of(rounded)["3"].step_ub.clone()
    reconstruct(rounded, model, image)
    kept = [unit for unit, bits in enumerate(DROPPED[8:14]) if bits]
    changed_ub = quantisers_of(rounded)["3"].step_ub[kept] != before_ub[kept]
    assert changed_ub[:, 1:].all() and not changed_ub[:, 0].any()


def test_a_layer_that_sees_no_change_keeps_its_weights() -> None:
    model, image = network(), images(40)
    rounded = rounded_copy(model, DROPPED)
    first = latent(rounded, "0").clone()
    reconstruct(rounded, model, image)
    torch.testing.assert_close(latent(rounded, "0"), first)


def test_where_every_input_is_constant_nothing_is_fitted() -> None:
    model, image = network(), images(40)
    rounded = rounded_copy(model, [0] * 8 + DROPPED[8:])
    before = latent(rounded, "3").clone()
    reconstruct(rounded, model, image)
    torch.testing.assert_close(latent(rounded, "3"), before)
    assert torch.isfinite(rounded(image)).all()


class Standardised(nn.Conv2d):
    """A convolution that is blind to the scale of its weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.weight / self.weight.std(), self.bias)


@pytest.mark.parametrize(
    "layer",
    [
        Standardised(8, 6, 3, bias=False),
        nn.Conv2d(8, 6, 3, padding="same", bias=False),
        nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect", bias=False),
    ],
    ids=["standardised", "padding by name", "reflected"],
)
def test_layers_that_do_more_than_multiply_are_left_to_matching(layer: nn.Conv2d) -> None:
    model, image = network(), images(40)
    model[3] = layer  # type: ignore[index, operator]
    rounded = rounded_copy(model, DROPPED)
    before = latent(rounded, "3").clone()
    reconstruct(rounded, model, image)
    assert torch.equal(latent(rounded, "3"), before)
    assert not torch.equal(rounded[4].running_mean, model[4].running_mean)  # type: ignore[index, union-attr]


def test_a_layer_in_full_precision_keeps_its_weights_and_the_next_is_fitted() -> None:
    model, image = network(), images(40)
    rounded = copy.deepcopy(model)
    units = list_units(rounded, granularity="channel", exempt=("3",))
    attach_quantisers(rounded, units, steps_of(rounded, units), np.array(DROPPED[:8] + DROPPED[14:]))
    before = latent(rounded, "8").clone()
    reconstruct(rounded, model, image)
    assert torch.equal(rounded[3].weight, model[3].weight)  # type: ignore[index, union-attr]
    assert not torch.allclose(latent(rounded, "8"), before, atol=1e-3)


def test_a_large_layer_is_fitted_on_a_sample_of_its_places_the_same_in_both_networks() -> None:
    model, image = network(last=False), images(5, side=20)
    patches = patches_of(model, image)["3"]
    assert patches.shape == (1, 5 * reconstruction.MOST_PLACES_AN_IMAGE, 72)
    rounded = rounded_copy(model, [8] * 14)
    with torch.no_grad():
        quantisers_of(rounded)["0"].step_ub *= 0.01  # 8 bits of a step that clips: the layer is off by far
    torch.testing.assert_close(patches_of(model, image)["3"], patches, rtol=0, atol=0)
    matched, both = distances(rounded, model, image)
    assert both < matched


class Tokens(nn.Module):
    """A strided and padded convolution to tokens, and two linear layers on them."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 3, stride=2, padding=(1, 0), dilation=(1, 2))
        self.wide, self.head = nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        token_bpc = torch.tanh(self.patch(image)).flatten(2).transpose(1, 2)
        return self.head(torch.tanh(self.wide(token_bpc)).mean(dim=1))


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_tokens_and_whole_tensors_are_fitted_too(granularity: Any) -> None:
    torch.manual_seed(0)
    model, image = Tokens().eval(), images(20, side=9)
    rounded = copy.deepcopy(model)
    units = list_units(model, granularity=granularity)
    bits = [0, 2, 0, 3, 2, 0, 2, 0, *[4] * 10] if granularity == "channel" else [1, 4, 4]
    attach_quantisers(rounded, units, steps_of(rounded, units), np.array(bits))
    seen: dict[str, torch.Tensor] = {}
    for one, key in ((model, "full"), (rounded, "now")):
        hook = one.wide.register_forward_pre_hook(
            lambda _m, value, key=key: seen.update({key: value[0].detach()})
        )
        if one is rounded:
            reconstruct(rounded, model, image)
        one(image)
        hook.remove()
    before = model.wide.weight.detach().numpy()
    full, now = (seen[key].reshape(-1, 8).numpy() for key in ("full", "now"))
    alpha = DAMPING * np.square(now - now.mean(axis=0)).sum(axis=0).mean()
    wanted = before + Ridge(alpha=alpha).fit(now, (full - now) @ before.T).coef_
    found = latent(rounded, "wide").numpy()
    if granularity == "channel":  # matching stretches each row with its step
        found, wanted = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (found, wanted))
    np.testing.assert_allclose(found, wanted, atol=1e-3)


def test_patches_of_a_strided_padded_convolution_give_its_outputs() -> None:
    torch.manual_seed(0)
    model, image = Tokens().eval(), images(3, side=9)
    patch_1pi = patches_of(model, image)["patch"]
    with torch.no_grad():
        outputs = model.patch(image) - model.patch.bias.view(1, -1, 1, 1)
        rows = patch_1pi[0] @ model.patch.weight.flatten(1).T
    each = outputs.flatten(2).transpose(1, 2).flatten(0, 1)
    assert len(rows) == 3 * min(reconstruction.MOST_PLACES_AN_IMAGE, outputs[0, 0].numel())
    distance = (
        (rows[:, None] - each[None]).norm(dim=2).min(dim=1).values
    )  # every row is some place of the layer
    torch.testing.assert_close(distance, torch.zeros_like(distance), atol=1e-5, rtol=0)


def test_many_tokens_are_sampled_and_wide_layers_take_fewer_places(monkeypatch: pytest.MonkeyPatch) -> None:
    model, image = Tokens().eval(), images(3, side=30)
    most = reconstruction.MOST_PLACES_AN_IMAGE
    assert patches_of(model, image)["wide"].shape == (1, 3 * most, 8)
    monkeypatch.setattr(reconstruction, "MOST_NUMBERS", 3 * 27 * 2)
    assert patches_of(model, image)["patch"].shape == (1, 3 * 2, 27)
    assert patches_of(model, image)["wide"].shape == (1, 3 * 27 * 2 // 8, 8)


def test_a_layer_that_is_used_twice_is_left_to_matching() -> None:
    torch.manual_seed(0)
    twice = nn.Linear(8, 8)
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 8), nn.Tanh(), twice, nn.Tanh(), twice).eval()
    image = images(40)
    assert set(patches_of(model, image)) == {"1"}


def test_steps_that_the_caller_holds_stay_as_they_are() -> None:
    model, image = network(), images(40)
    units = list_units(model, granularity="channel")
    steps = steps_of(model, units)
    given = {name: step.clone() for name, step in steps.items()}
    rounded = copy.deepcopy(model)
    attach_quantisers(rounded, units, steps, np.array(DROPPED))
    reconstruct(rounded, model, image)
    assert all(torch.equal(steps[name].nan_to_num(), given[name].nan_to_num()) for name in given)


@pytest.mark.parametrize("places", [12, 300])
def test_inputs_far_from_zero_cost_no_precision(places: int) -> None:
    """Their mean is a hundred times what they vary by; float32 must not take one for the other."""
    generator = torch.Generator().manual_seed(4)
    model = nn.Sequential(nn.Linear(40, 6))
    wanted_pi = 100 + torch.randn(places, 40, generator=generator)
    now_pi = wanted_pi + 0.3 * torch.randn(places, 40, generator=generator) + 5
    rounded = rounded_copy(model, [4] * 6)
    before = latent(rounded, "0").double().clone()
    reconstruction = Reconstruction({"0": wanted_pi[None].clone()}, num_images=places, rule="mse")
    with torch.no_grad():
        reconstruction("0", rounded[0], quantisers_of(rounded)["0"], now_pi, True)  # type: ignore[index]
    centred = (now_pi - now_pi.mean(dim=0)).double()
    ridge = Ridge(alpha=DAMPING * float(centred.square().sum(dim=0).mean()), fit_intercept=False)
    off = ((wanted_pi - now_pi).double() @ before.T).numpy()
    change = torch.from_numpy(ridge.fit(centred.numpy(), off - off.mean(axis=0)).coef_)
    found = latent(rounded, "0").double() - before
    assert float((found - change).norm() / change.norm()) < 1e-3
