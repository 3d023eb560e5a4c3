"""Cost tables against explicit per-image gradients and exact Hessians of tiny networks.

Axes: g groups, u units, b bit choices, i images.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fqsweep import importance as importance_module
from fqsweep.config import ArchitectureConfig
from fqsweep.cost_table import Importance, load_importance, reduce_groups, save_importance
from fqsweep.errors import TrialError
from fqsweep.importance import measure_importance, start_steps
from fqsweep.models import build_model, quantisable_layers
from fqsweep.quant.grid import quantise_units
from fqsweep.quant.moments import MAX_STRETCH, expected_lines
from fqsweep.quant.units import UnitTable, list_units

CHOICES = (0, 1, 2, 4, 8)
PREDICTORS = ("taylor_matched", "taylor", "fisher", "gradient", "grape", "hawq")
SIZE = 6
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class OwnLinear(nn.Linear):
    """A linear layer of another class, as some libraries have."""


class OwnConv(nn.Conv2d):
    """A convolution that standardises its weight, as some networks do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.weight * 1.5, self.bias)


class Tiny(nn.Module):
    """Convolution, norm, grouped convolution, tokens, windows, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, stride=2, groups=2)
        self.own = OwnConv(4, 4, 1)
        self.tokens = nn.Linear(4, 5)
        self.windows = nn.Linear(5, 5)
        self.drop = nn.Dropout(0.5)
        self.mix = OwnLinear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.conv(image)), inplace=True)
        x = self.own(F.silu(self.grouped(x)))
        x = torch.tanh(self.tokens(x.flatten(2).transpose(1, 2)))
        num_images, num_tokens, width = x.shape
        x = self.windows(x.reshape(num_images * 3, num_tokens // 3, width)).reshape(
            num_images, num_tokens, width
        )
        x = self.drop(F.gelu(self.mix(x)))
        return self.head(x.mean(dim=1))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    tiny = Tiny()
    tiny.norm.running_mean.normal_()
    tiny.norm.running_var.uniform_(0.5, 2)
    return tiny.train()


def images(count: int = 9, *, batch: int = 4, seed: int = 0) -> list[Batch]:
    """Unequal groups: images 0, 3, 6 ... are of group 0, the others of group 1."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(count, 3, SIZE, SIZE, generator=generator)
    label = torch.randint(0, 3, (count,), generator=generator)
    group = (torch.arange(count) % 3 > 0).long()
    return [(image[i : i + batch], label[i : i + batch], group[i : i + batch]) for i in range(0, count, batch)]


def measure(
    model: nn.Module, predictor: str, batches: list[Batch], **options: Any
) -> tuple[Importance, UnitTable]:
    units = list_units(model, granularity=options.pop("granularity", "channel"))
    defaults: dict[str, Any] = {"num_groups": 2, "choices": CHOICES, "scale": "absmax"}
    found = measure_importance(
        model,
        units,
        lambda: iter(batches),
        predictor=predictor,
        **{**defaults, **options},  # type: ignore[arg-type]
    )
    return found, units


def gradients_of_images(
    model: nn.Module, batches: list[Batch]
) -> tuple[list[dict[str, torch.Tensor]], np.ndarray]:
    """Every quantised weight's gradient for each image alone, in eval mode, and the images' groups."""
    model.eval()
    weights = {name: layer.weight for name, layer in quantisable_layers(model).items()}
    found, groups = [], []
    for image, label, group in batches:
        for i in range(len(image)):
            loss = F.cross_entropy(model(image[i : i + 1]), label[i : i + 1])
            found.append(dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True)))
            groups.append(int(group[i]))
    model.train()
    return found, np.array(groups)


def rounding_errors(model: nn.Module, units: UnitTable, found: Importance) -> dict[str, torch.Tensor]:
    """dW per layer as (b, u, n), from the steps that the table rests on."""
    errors = {}
    for layer in units.layers:
        weight = quantisable_layers(model)[layer.name].weight.detach().reshape(layer.num_units, -1)
        step = torch.from_numpy(found.step_ub[layer.start : layer.stop])
        errors[layer.name] = torch.stack(
            [
                quantise_units(weight, step[:, b : b + 1], torch.full((len(weight),), b)) - weight
                for b in found.choices
            ]
        )
    return errors


def by_loop(
    model: nn.Module, units: UnitTable, found: Importance, batches: list[Batch], predictor: str
) -> np.ndarray:
    """The definitions of the module's docstring, image by image and unit by unit."""
    gradients, groups = gradients_of_images(model, batches)
    errors = rounding_errors(model, units, found)
    cost = np.zeros_like(found.cost_gub)
    decay = 4.0 ** -np.array(found.choices)
    for g in range(len(cost)):
        own = [gradients[i] for i in np.flatnonzero(groups == g)]
        for layer in units.layers:
            stacked = torch.stack(
                [gradient[layer.name].reshape(layer.num_units, -1) for gradient in own]
            ).double()
            weight = quantisable_layers(model)[layer.name].weight.detach().reshape(layer.num_units, -1).double()
            change = errors[layer.name].double()
            rows = slice(layer.start, layer.stop)
            if predictor == "taylor":
                along = torch.einsum("iun,bun->iub", stacked, change)
                cost[g, rows] = along.square().mean(dim=0) / 2
            elif predictor == "fisher":
                cost[g, rows] = torch.einsum("un,bun->ub", stacked.square().mean(dim=0), change.square()) / 2
            elif predictor == "gradient":
                cost[g, rows] = stacked.mean(dim=0).abs().sum(dim=1)[:, None] * decay
            else:
                cost[g, rows] = (stacked.mean(dim=0) * weight).square().sum(dim=1)[:, None] * decay
    return cost


# --- predictors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("predictor", ["taylor", "fisher", "gradient", "grape"])
def test_costs_are_those_of_explicit_gradients_image_by_image(
    model: nn.Module, predictor: str, granularity: str
) -> None:
    found, units = measure(model, predictor, images(), granularity=granularity)
    wanted = by_loop(model, units, found, images(), predictor)
    assert found.cost_gub.shape == (2, units.num_units, len(CHOICES))
    assert np.allclose(found.cost_gub, wanted, rtol=1e-3, atol=1e-9 + 1e-5 * wanted.max())
    assert (wanted.max(axis=(0, 2)) > 0).mean() > 0.9


def exact_hawq(model: nn.Module, units: UnitTable, found: Importance, batches: list[Batch]) -> np.ndarray:
    """1/2 mean diagonal of the unit's exact Hessian times |dW|^2, per group."""
    model.eval()
    image = torch.cat([batch[0] for batch in batches])
    label = torch.cat([batch[1] for batch in batches])
    group = torch.cat([batch[2] for batch in batches])
    errors = rounding_errors(model, units, found)
    cost = np.zeros_like(found.cost_gub)
    for g in range(len(cost)):
        for layer in units.layers:
            module = quantisable_layers(model)[layer.name]

            def loss(weight: torch.Tensor, name: str = layer.name, g: int = g) -> torch.Tensor:
                output = torch.func.functional_call(model, {f"{name}.weight": weight}, (image[group == g],))
                return F.cross_entropy(output, label[group == g])

            hessian = torch.autograd.functional.hessian(loss, module.weight.detach())
            size = module.weight.numel()
            diagonal = hessian.reshape(size, size).diagonal().reshape(layer.num_units, -1)
            mean = diagonal.mean(dim=1).clamp(min=0).double()
            cost[g, layer.start : layer.stop] = mean[:, None] * errors[layer.name].square().sum(dim=2).T / 2
    model.train()
    return cost


def test_hawq_costs_approach_those_of_the_exact_hessian(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 2, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))
    monkeypatch.setattr(importance_module, "HUTCHINSON_PROBES", 1500)
    found, units = measure(model, "hawq", images(batch=9), choices=(2, 4))
    wanted = exact_hawq(model, units, found, images())
    assert np.allclose(found.cost_gub, wanted, rtol=0.15, atol=0.05 * wanted.max())
    assert (wanted > 0).any()


def test_hawq_probes_are_the_same_for_the_same_seed(model: nn.Module) -> None:
    costs = [measure(model, "hawq", images(), seed=seed)[0].cost_gub for seed in (0, 0, 1)]
    assert np.array_equal(costs[0], costs[1])
    assert not np.array_equal(costs[0], costs[2])


def test_taylor_is_the_rise_of_the_loss_for_a_loss_that_is_quadratic_in_the_output() -> None:
    """At a converged linear classifier the Fisher predicts the true rise to second order."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 3, bias=False))
    model[1].weight.data.mul_(0.1)
    image = torch.randn(4000, 3, SIZE, SIZE)
    label = torch.distributions.Categorical(logits=model(image).detach()).sample()
    batch = (image, label, torch.zeros(4000, dtype=torch.long))
    found, units = measure(model, "taylor", [batch], num_groups=1, choices=(3, 4))
    change = rounding_errors(model, units, found)["1"]
    base = F.cross_entropy(model(image), label)
    for row in range(3):
        moved = model[1].weight.detach().clone()
        moved[row] += change[0, row]
        rise = F.cross_entropy(image.flatten(1) @ moved.T, label) - base
        assert found.cost_gub[0, row, 0] > 0
        assert found.cost_gub[0, row, 0] == pytest.approx(float(rise.detach()), rel=0.5, abs=2e-4)


# --- what matching leaves --------------------------------------------------------------------------


@torch.no_grad()
def matched_change(
    model: nn.Module, name: str, change: torch.Tensor, batches: list[Batch], *, stretches: bool
) -> list[torch.Tensor]:
    """What one layer's rounding does to its outputs when they are matched over all images, batch by batch."""
    layer = quantisable_layers(model)[name]
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0].clone()))
    for image, _, _ in batches:
        model(image)
    handle.remove()
    before = [layer(value) for value in seen]
    layer.weight += change
    after = [layer(value) for value in seen]
    layer.weight -= change
    others = (0, 2, 3) if isinstance(layer, nn.Conv2d) else tuple(range(before[0].ndim - 1))
    (wanted_std, wanted_mean), (std, mean) = (
        torch.std_mean(torch.cat(part).double(), dim=others, correction=0) for part in (before, after)
    )
    ratio = (wanted_std / std.clamp(min=1e-9)).clamp(1 / MAX_STRETCH, MAX_STRETCH)
    stretch = torch.where((std > 1e-9) & stretches, ratio, 1.0)
    shape = (1, -1, 1, 1) if isinstance(layer, nn.Conv2d) else (-1,)
    return [
        ((a - mean.view(shape)) * stretch.view(shape) + wanted_mean.view(shape) - b).float()
        for a, b in zip(after, before, strict=True)
    ]


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("name", ["conv", "grouped", "own", "tokens", "windows", "mix", "head"])
def test_matched_costs_are_those_of_what_remains_of_a_layers_outputs(
    model: nn.Module, name: str, granularity: str
) -> None:
    batches = images()
    found, units = measure(model, "taylor_matched", batches, granularity=granularity)
    model.eval()
    part = next(layer for layer in units.layers if layer.name == name)
    layer = quantisable_layers(model)[name]
    errors = rounding_errors(model, units, found)[name]
    # A norm takes any stretch; steps do where each channel has one and the layer leaves its weight as it is.
    stretches = name == "conv" or (granularity == "channel" and name != "own")
    for choice, bits in enumerate(CHOICES):
        moved = matched_change(
            model, name, errors[choice].view(layer.weight.shape), batches, stretches=stretches
        )
        total_gu, count_g = torch.zeros(2, part.num_units, dtype=torch.float64), torch.zeros(2)
        for (image, label, group), change in zip(batches, moved, strict=True):
            outputs: list[torch.Tensor] = []
            handle = layer.register_forward_hook(lambda _m, _i, output, outputs=outputs: outputs.append(output))
            loss = F.cross_entropy(model(image), label, reduction="sum")
            handle.remove()
            (gradient,) = torch.autograd.grad(loss, outputs[0])
            along = (gradient * change).double()
            along = along.flatten(2).sum(2) if isinstance(layer, nn.Conv2d) else along
            along_ic = along.reshape(len(image), -1, along.shape[-1]).sum(dim=1)
            along_iu = along_ic if granularity == "channel" else along_ic.sum(dim=1, keepdim=True)
            for i in range(len(image)):
                total_gu[group[i]] += along_iu[i].square()
                count_g[group[i]] += 1
        wanted_gu = (total_gu / count_g[:, None] / 2).numpy()
        now_gu = found.cost_gub[:, part.start : part.stop, choice]
        assert np.allclose(now_gu, wanted_gu, rtol=2e-3, atol=1e-5 * found.cost_gub.max()), (name, bits)


def test_a_layer_that_the_network_does_not_use_costs_nothing(model: nn.Module) -> None:
    model.unused = nn.Linear(4, 4)
    found, units = measure(model, "taylor_matched", images())
    part = next(layer for layer in units.layers if layer.name == "unused")
    assert (found.cost_gub[:, part.start : part.stop] == 0).all()


def test_a_wrong_scale_costs_nothing_once_it_is_matched() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 4), nn.Tanh(), nn.Linear(4, 3))
    with torch.no_grad():
        model[1].weight.copy_(model[1].weight.sign() * 0.05)
        model[1].weight[:, 0] = 0.08  # the step of the largest weight takes all others to 1 of 2 levels: 0.08
    plain, matched = (
        measure(model, predictor, images(), choices=(2,))[0] for predictor in ("taylor", "taylor_matched")
    )
    assert (matched.cost_gub[:, :4] < 0.25 * plain.cost_gub[:, :4]).all()


def test_a_layer_that_cannot_be_matched_costs_its_whole_rounding_error() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 4, bias=False), nn.LayerNorm(4), nn.Linear(4, 3)
    )
    plain, _ = measure(model, "taylor", images())
    matched, _ = measure(model, "taylor_matched", images())
    assert np.allclose(plain.cost_gub[:, :4], matched.cost_gub[:, :4], rtol=1e-4)
    assert not np.allclose(plain.cost_gub[:, 4:], matched.cost_gub[:, 4:], rtol=0.05)


def test_of_a_tensor_with_one_step_and_no_norm_only_the_mean_is_taken_to_come_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 3)).eval()
    units = list_units(model, granularity="tensor")
    changes = {"1": [-0.5 * model[1].weight.detach()]}
    image = images(batch=9)[0][0]
    line = expected_lines(model, units, [image], changes)["1"]
    assert torch.equal(line.stretch_kc, torch.ones(1, 3))
    with torch.no_grad():
        missing_c = 0.5 * F.linear(image.flatten(1), model[1].weight).mean(dim=0)
    torch.testing.assert_close(line.shift_kc[0], missing_c)


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_costs_are_finite_not_negative_and_nearly_nothing_at_eight_bits(
    model: nn.Module, predictor: str
) -> None:
    found, _ = measure(model, predictor, images())
    assert np.isfinite(found.cost_gub).all() and (found.cost_gub >= 0).all()
    total_b = found.cost_gub.sum(axis=(0, 1))
    assert total_b[-1] < 1e-2 * total_b[0]


@pytest.mark.parametrize("predictor", [name for name in PREDICTORS if name != "hawq"])  # draws for each batch
def test_costs_are_means_over_images_and_do_not_depend_on_the_batches(model: nn.Module, predictor: str) -> None:
    small, _ = measure(model, predictor, images(batch=2))
    whole, _ = measure(model, predictor, images(batch=9))
    twice, _ = measure(model, predictor, images(batch=9) * 2)
    assert np.allclose(small.cost_gub, whole.cost_gub, rtol=1e-3, atol=1e-6 * whole.cost_gub.max())
    assert np.allclose(twice.cost_gub, whole.cost_gub, rtol=1e-3, atol=1e-6 * whole.cost_gub.max())
    assert twice.count_g.tolist() == [6, 12]


@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("scale", ["absmax", "curvature"])
def test_the_model_and_the_images_are_bit_for_bit_as_before(
    model: nn.Module, predictor: str, scale: str
) -> None:
    model.norm.eval()
    model.head.bias.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    batches = images()
    pixels = [batch[0].clone() for batch in batches]
    measure(model, predictor, batches, scale=scale)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["head.bias"]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for (image, _, _), known in zip(batches, pixels, strict=True):
        assert torch.equal(image, known) and not image.requires_grad and image.grad is None


def test_the_model_is_put_back_where_measuring_fails(model: nn.Module) -> None:
    with pytest.raises(TrialError, match="have no calibration image"):
        measure(model, "taylor", images(), num_groups=3)
    assert model.training and model.conv.weight.requires_grad
    assert not any(m._forward_hooks for m in model.modules())


def test_a_group_without_images_is_named(model: nn.Module) -> None:
    with pytest.raises(TrialError, match=r"groups \[2, 3\] have no calibration image"):
        measure(model, "gradient", images(), num_groups=4)


def test_a_parent_whose_loss_is_not_finite_fails(model: nn.Module) -> None:
    model.head.weight.data[0, 0] = torch.nan
    with pytest.raises(TrialError, match="importance taylor: some costs are not finite"):
        measure(model, "taylor", images())


def test_group_losses_and_counts_are_those_of_the_images(model: nn.Module) -> None:
    found, _ = measure(model, "gradient", images())
    model.eval()
    image, label, group = (torch.cat([batch[k] for batch in images()]) for k in range(3))
    loss = F.cross_entropy(model(image), label, reduction="none").detach()
    assert found.count_g.tolist() == [3, 6]
    assert found.loss_g == pytest.approx([float(loss[group == g].mean()) for g in (0, 1)], rel=1e-5)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "tiny_vit_5m_224", "mobilenetv3_small_050"])
def test_taylor_takes_attention_windows_and_depthwise_networks(name: str) -> None:
    torch.manual_seed(0)
    network = build_model(ArchitectureConfig(name=name), num_classes=3, image_size=64)
    generator = torch.Generator().manual_seed(0)
    batch = (
        torch.randn(4, 3, 64, 64, generator=generator),
        torch.tensor([0, 1, 2, 0]),
        torch.tensor([0, 0, 1, 1]),
    )
    found, units = measure(network, "taylor", [batch], choices=(2,))
    gradients, groups = gradients_of_images(network, [batch])
    errors = rounding_errors(network, units, found)
    for layer in units.layers:
        stacked = torch.stack([gradient[layer.name].reshape(layer.num_units, -1) for gradient in gradients])
        along = torch.einsum("iun,un->iu", stacked, errors[layer.name][0]).square().numpy()
        for g in (0, 1):
            wanted = along[groups == g].mean(axis=0) / 2
            rows = found.cost_gub[g, layer.start : layer.stop, 0]
            assert np.allclose(rows, wanted, rtol=2e-2, atol=1e-3 * wanted.max() + 1e-12), layer.name


# --- start steps ---------------------------------------------------------------------------------


def test_steps_are_nan_at_widths_that_are_no_choice_and_the_same_without_costs(model: nn.Module) -> None:
    for scale in ("absmax", "mse", "curvature"):
        found, units = measure(model, "gradient", images(), scale=scale)
        assert np.isnan(found.step_ub[:, [3, 5, 6, 7]]).all()
        assert np.isfinite(found.step_ub[:, list(CHOICES)]).all()
        alone = start_steps(model, units, lambda: iter(images()), choices=CHOICES, scale=scale)  # type: ignore[arg-type]
        assert np.array_equal(alone, found.step_ub, equal_nan=True)


def test_input_moments_are_those_of_unfolded_patches(model: nn.Module) -> None:
    """Inside the image: a convolution without padding sees every position of its input but the border."""
    network = nn.Sequential(nn.Conv2d(4, 6, 1, groups=2))
    image = torch.randn(5, 4, 7, 7) * torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None, None]
    batch = (image, torch.zeros(5), torch.zeros(5))
    found = importance_module._input_moments(network, lambda: iter([batch]))["0"]
    square = image.square().mean(dim=(0, 2, 3))
    wanted = torch.stack([square[:2]] * 3 + [square[2:]] * 3)
    assert torch.allclose(found / found.sum(), wanted / wanted.sum(), rtol=1e-4)


# --- reducers ------------------------------------------------------------------------------------


COST = np.array([[[4.0, 1.0], [2.0, 0.0]], [[0.0, 0.0], [6.0, 2.0]], [[1.0, 1.0], [1.0, 1.0]]])
LOSS = np.array([0.2, 0.9, 0.5])


@pytest.mark.parametrize(
    ("reducer", "expected"),
    [
        ("mean", [[5 / 3, 2 / 3], [3.0, 1.0]]),
        ("max", [[4.0, 1.0], [6.0, 2.0]]),
        ("cvar", [[2.5, 1.0], [4.0, 1.5]]),
        ("subtractive", [[-4.0, -1.0], [4.0, 2.0]]),
    ],
)
def test_reducers_by_hand(reducer: Any, expected: list[list[float]]) -> None:
    assert np.allclose(reduce_groups(COST, reducer, loss_g=LOSS), expected)


def test_balanced_counts_groups_alike_whatever_the_size_of_their_losses() -> None:
    plain = reduce_groups(COST, "balanced", loss_g=LOSS)
    louder = COST * np.array([1.0, 1000.0, 1.0])[:, None, None]
    found = reduce_groups(louder, "balanced", loss_g=LOSS)
    assert np.allclose(found / found.sum(), plain / plain.sum())
    # Totals 7, 8 and 4 are brought to their mean, 19/3, each.
    wanted = (19 / 3) * (4 / 7 + 0 / 8 + 1 / 4) / 3
    assert plain[0, 0] == pytest.approx(wanted)


def test_balanced_of_a_group_without_costs_is_finite() -> None:
    found = reduce_groups(np.stack([COST[0], np.zeros((2, 2))]), "balanced", loss_g=LOSS[:2])
    assert np.isfinite(found).all() and (found >= 0).all()


@pytest.mark.parametrize("reducer", ["mean", "max", "cvar", "balanced"])
def test_one_group_is_its_own_reduction(reducer: Any) -> None:
    assert np.allclose(reduce_groups(COST[:1], reducer, loss_g=LOSS[:1]), COST[0])


@pytest.mark.parametrize("reducer", ["mean", "max", "cvar", "balanced"])
def test_the_order_of_groups_does_not_matter(reducer: Any) -> None:
    assert np.allclose(
        reduce_groups(COST[::-1], reducer, loss_g=LOSS[::-1]), reduce_groups(COST, reducer, loss_g=LOSS)
    )


def test_cvar_is_not_the_mean_of_few_groups() -> None:
    for count in (2, 3):
        found = reduce_groups(COST[:count], "cvar", loss_g=LOSS)
        assert not np.allclose(found, COST[:count].mean(axis=0))


def test_reducers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="subtractive contrasts two groups"):
        reduce_groups(COST[:1], "subtractive", loss_g=LOSS[:1])
    with pytest.raises(ValueError, match="reducer 'none' does not make one table"):
        reduce_groups(COST, "none", loss_g=LOSS)


# --- on disk -------------------------------------------------------------------------------------


def test_a_table_comes_back_from_disk_as_it_was(tmp_path: Path, model: nn.Module) -> None:
    found, _ = measure(model, "grape", images())
    save_importance(tmp_path / "deep" / "table.npz", found)
    again = load_importance(tmp_path / "deep" / "table.npz")
    for name in ("cost_gub", "step_ub", "loss_g", "count_g"):
        assert np.array_equal(getattr(again, name), getattr(found, name), equal_nan=True)
        assert getattr(again, name).dtype == getattr(found, name).dtype
    assert (again.choices, again.passes, again.seconds) == (found.choices, found.passes, found.seconds)


@pytest.mark.parametrize("predictor", ["taylor", "taylor_matched"])
def test_progress_of_taylor_goes_to_the_end(model: nn.Module, predictor: str) -> None:
    told: list[tuple[str, float]] = []

    def once() -> Iterator[Batch]:
        return iter(images())

    measure_importance(
        model,
        list_units(model, granularity="channel"),
        once,
        num_groups=2,
        predictor=predictor,  # type: ignore[arg-type]
        choices=CHOICES,
        scale="curvature",
        progress=lambda stage, frac: told.append((stage, frac)),
    )
    assert told[0] == ("input moments", 0.0) and told[-1] == (predictor, 1.0)
