"""Outputs brought back to full precision's mean and spread: what it promises, where it goes, what it leaves alone."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from fqsweep.models import quantisable_layers
from fqsweep.quant import pack_weights
from fqsweep.quant.convert import attach_quantisers, detach_quantisers, quantisers_of
from fqsweep.quant.levels import absmax_steps
from fqsweep.quant.moments import MAX_STRETCH, expected_corrections, match_moments, output_moments
from fqsweep.quant.packed_model import load_model
from fqsweep.quant.units import list_units
from tests.quant.packed_networks import SIZE_BY_NAME, notes_of, random_network, settle_norms
from tests.quant.test_convert import steps_of

NETWORKS = ("resnet18", "deit_tiny_patch16_224", "tiny_vit_5m_224")


def images(side: int, number: int = 24) -> torch.Tensor:
    return torch.randn(number, 3, side, side, generator=torch.Generator().manual_seed(1))


def quantised(model: nn.Module, bits: int | np.ndarray, *, granularity: str = "channel") -> nn.Module:
    """A copy with quantisers: one width for all units, or one each."""
    model = copy.deepcopy(model)
    units = list_units(model, granularity=granularity)  # type: ignore[arg-type]
    attach_quantisers(model, units, steps_of(model, units), np.broadcast_to(bits, units.num_units).copy())
    return model


def network(name: str) -> nn.Module:
    model = random_network(name, image_size=SIZE_BY_NAME[name], seed=0)
    settle_norms(model, image_size=SIZE_BY_NAME[name])
    return model.eval()


@torch.no_grad()
def behind_norms(model: nn.Module, image_bchw: torch.Tensor) -> list[torch.Tensor]:
    """Outputs of all batch norms, in order."""
    found: list[torch.Tensor] = []
    handles = [
        module.register_forward_hook(lambda _m, _i, output: found.append(output))
        for module in model.modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
    model(image_bchw)
    for handle in handles:
        handle.remove()
    return found


def plain_norms() -> nn.Module:
    """Convolutions with norms behind them, and a classifier without one."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    ).eval()


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_what_leaves_a_batch_norm_has_the_moments_of_full_precision(granularity: str) -> None:
    model, image = plain_norms(), images(10)
    for norm in (model[1], model[4]):
        norm.running_mean.normal_()  # type: ignore[operator, union-attr]
        norm.running_var.uniform_(0.5, 2)  # type: ignore[operator, union-attr]
    rounded = quantised(model, 3, granularity=granularity)
    match_moments(rounded, output_moments(model, image), image)
    for now, wanted in zip(behind_norms(rounded, image), behind_norms(model, image), strict=True):
        torch.testing.assert_close(now.mean((0, 2, 3)), wanted.mean((0, 2, 3)), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(now.std((0, 2, 3)), wanted.std((0, 2, 3)), atol=1e-4, rtol=1e-3)


class Standardised(nn.Conv2d):
    """A convolution that is blind to the scale of its weight, with a bias and no norm behind it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight / self.weight.flatten(1).std(dim=1).view(-1, 1, 1, 1)
        return self._conv_forward(x, weight, self.bias)


def mixed() -> nn.Module:
    """A norm behind, none, none but with a weight that is standardised, nothing to correct, and a layer used twice."""
    torch.manual_seed(0)
    twice = nn.Linear(6, 6)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 6, 3), nn.ReLU(), Standardised(6, 6, 3), nn.ReLU()),
        *(
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 6, bias=False),
            nn.Tanh(),
            twice,
            nn.Tanh(),
            twice,
        ),
    ).eval()


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("name", ["0", "3", "5", "9", "11"])
def test_each_layer_alone_is_corrected_as_was_expected(name: str, granularity: str) -> None:
    model, image = mixed(), images(12)
    only = list_units(model, granularity=granularity, exempt=tuple(set(quantisable_layers(model)) - {name}))  # type: ignore[arg-type]
    rounded = copy.deepcopy(model)
    attach_quantisers(rounded, only, steps_of(rounded, only), np.full(only.num_units, 2))
    outputs: list[torch.Tensor] = []
    with torch.no_grad():
        layer = rounded.get_submodule(name)
        handle = layer.register_forward_hook(lambda _m, _i, output: outputs.append(output))
        rounded(image)
        change = layer.weight - model.get_submodule(name).weight
        correction = expected_corrections(model, only, image.split(5), {name: [change]})[name]
        match_moments(rounded, output_moments(model, image), image)
        outputs = outputs[:1]
        rounded(image)
    handle.remove()
    before, after = outputs[0], outputs[1]
    shape = (1, -1, 1, 1) if isinstance(layer, nn.Conv2d) else (-1,)
    wanted = before * correction.stretch_kc[0].view(shape) + correction.shift_kc[0].view(shape)
    if name == "0":  # its norm does it
        after, wanted = rounded[1](before), model[1](wanted)  # type: ignore[index]
    torch.testing.assert_close(after, wanted, atol=1e-4, rtol=1e-3)
    assert torch.equal(before, after) is (name == "9")


@pytest.mark.parametrize("bits", [2, 4])
def test_layers_without_a_norm_get_the_moments_by_step_and_bias(bits: int) -> None:
    model, image = network("deit_tiny_patch16_224"), images(64)
    wanted = output_moments(model, image)
    rounded = quantised(model, bits)
    assert not torch.allclose(
        output_moments(rounded, image)["blocks.6.mlp.fc1"].variance_c,
        wanted["blocks.6.mlp.fc1"].variance_c,
        rtol=0.05,
    )
    match_moments(rounded, wanted, image)
    for name, now in output_moments(rounded, image).items():
        # One weight in millions lies so near the middle of two levels that stretching takes it to the other one.
        torch.testing.assert_close(now.mean_c, wanted[name].mean_c, atol=0.05, rtol=0)
        ratio_c = now.variance_c / wanted[name].variance_c
        assert ratio_c.median() == pytest.approx(1.0, abs=1e-3)


def test_of_a_tensor_with_one_step_and_no_norm_the_mean_is_matched() -> None:
    model, image = network("deit_tiny_patch16_224"), images(64)
    wanted = output_moments(model, image)
    rounded = quantised(model, 4, granularity="tensor")
    match_moments(rounded, wanted, image)
    for name, now in output_moments(rounded, image).items():
        torch.testing.assert_close(now.mean_c, wanted[name].mean_c, atol=1e-3, rtol=1e-3)


def test_a_dropped_channel_becomes_the_mean_that_it_had() -> None:
    model, image = plain_norms(), images(10)
    bits = np.full(20, 4)
    bits[[2, 17]] = 0
    rounded = quantised(model, bits)
    match_moments(rounded, output_moments(model, image), image)
    now, wanted = behind_norms(rounded, image)[0], behind_norms(model, image)[0]
    assert now[:, 2].std() < 1e-6
    assert now[0, 2, 0, 0] == pytest.approx(float(wanted[:, 2].mean()), abs=1e-5)
    with torch.no_grad():
        logits = rounded(image)
        assert logits[0, 1] == pytest.approx(float(model(image)[:, 1].mean()), abs=1e-5)


def test_a_channel_that_rounding_made_nearly_constant_is_not_made_louder_without_bound() -> None:
    model, image = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval(), images(2)
    wanted = output_moments(model, image)
    rounded = quantised(model, 8)
    with torch.no_grad():
        quantisers_of(rounded)["1"].log_gain_u -= 5
    before_c = output_moments(rounded, image)["1"].variance_c
    match_moments(rounded, wanted, image)
    stretch_c = (output_moments(rounded, image)["1"].variance_c / before_c).sqrt()
    torch.testing.assert_close(stretch_c, torch.full((2,), MAX_STRETCH))


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_come_nearer_and_what_is_scored_is_what_lies_on_disk(name: str) -> None:
    side = SIZE_BY_NAME[name]
    model, image, fresh = network(name), images(side), torch.randn(16, 3, side, side)
    units = list_units(model, granularity="channel")
    rounded = quantised(model, 3)
    with torch.no_grad():
        before = (rounded(fresh) - model(fresh)).square().mean()
        match_moments(rounded, output_moments(model, image), image)
        logits = rounded(fresh)
        assert (logits - model(fresh)).square().mean() < 0.9 * before
    state = detach_quantisers(rounded)
    blob = pack_weights(
        state.tensors,
        {f"{layer}.weight": bits for layer, bits in state.bits.items()},
        steps={f"{layer}.weight": steps for layer, steps in state.steps.items()},
        metadata=notes_of(name, side),
    )
    assert units.join(state.bits).tolist() == [3] * units.num_units
    with torch.no_grad():
        torch.testing.assert_close(load_model(blob)(fresh), logits, atol=1e-4, rtol=1e-4)


def codes_of(model: nn.Module) -> torch.Tensor:
    """Whole multiples of their steps: the codes of all weights."""
    parts = []
    for name, quantiser in quantisers_of(model).items():
        weight_un = model.get_submodule(name).weight.detach().flatten(1)
        parts.append((weight_un / quantiser.steps_at(quantiser.bits_u)).round().flatten())
    return torch.cat(parts)


def test_codes_stay_and_no_hook_is_left() -> None:
    model, image = plain_norms(), images(10)
    rounded = quantised(model, 4)
    codes = codes_of(rounded)
    before = {key: value.clone() for key, value in rounded.state_dict().items()}
    match_moments(rounded, output_moments(model, image), image)
    after = rounded.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    # What a norm takes up needs no step; the classifier has no norm.
    assert changed == {
        *(f"{norm}.running_{what}" for norm in (1, 4) for what in ("mean", "var")),
        *("8.bias", "8.parametrizations.weight.0.log_gain_u", "8.parametrizations.weight.original"),
    }
    assert torch.equal(codes_of(rounded), codes)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in rounded.modules())
    assert not rounded.training


def test_a_layer_with_neither_norm_nor_bias_is_left_as_it_is() -> None:
    torch.manual_seed(0)
    model, image = nn.Sequential(nn.Flatten(), nn.Linear(12, 5, bias=False), nn.LayerNorm(5)).eval(), images(2)
    rounded = quantised(model, 2)
    before = {key: value.clone() for key, value in rounded.state_dict().items()}
    match_moments(rounded, output_moments(model, image), image)
    assert all(torch.equal(before[key], value) for key, value in rounded.state_dict().items())


def test_a_layer_in_full_precision_is_left_as_it_is() -> None:
    model, image = plain_norms(), images(10)
    rounded = copy.deepcopy(model)
    units = list_units(rounded, granularity="channel", exempt=("0",))
    attach_quantisers(rounded, units, steps_of(rounded, units), np.full(units.num_units, 2))
    match_moments(rounded, output_moments(model, image), image)
    assert torch.equal(rounded[1].running_mean, model[1].running_mean)  # type: ignore[index, union-attr]
    assert not torch.equal(rounded[4].running_mean, model[4].running_mean)  # type: ignore[index, union-attr]
    assert set(quantisers_of(rounded)) == set(quantisable_layers(model)) - {"0"}


def test_eight_bits_need_next_to_nothing() -> None:
    model, image = network("resnet18"), images(32)
    rounded = quantised(model, 8)
    weight_un = model.get_submodule("conv1").weight.detach().flatten(1)
    assert absmax_steps(weight_un, torch.full((64,), 8)).min() > 0
    match_moments(rounded, output_moments(model, image), image)
    torch.testing.assert_close(rounded.bn1.running_var, model.bn1.running_var, rtol=0.02, atol=1e-4)
