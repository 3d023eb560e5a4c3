"""Cost tables against explicit per-image gradients and exact Hessians of tiny networks.

Axes: g groups, u units, b bit choices, i images.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fqsweep import importance as importance_module
from fqsweep import predictors
from fqsweep.config import ArchitectureConfig, Predictor
from fqsweep.cost_table import PASSES, Importance, count_passes
from fqsweep.errors import TrialError
from fqsweep.importance import measure_importance, start_steps
from fqsweep.models import build_model, quantisable_layers
from fqsweep.quant.units import UnitTable, list_units
from tests.tiny_network import CHOICES, SIZE, Batch, images, measure, rounding_errors, tiny_network

PREDICTORS = ("taylor_matched", "taylor", "fisher", "gradient", "grape", "hawq")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def model() -> nn.Module:
    return tiny_network()


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
    monkeypatch.setattr(predictors, "HUTCHINSON_PROBES", 1500)
    found, units = measure(model, "hawq", images(batch=9), choices=(2, 4))
    wanted = exact_hawq(model, units, found, images())
    assert np.allclose(found.cost_gub, wanted, rtol=0.15, atol=0.05 * wanted.max())
    assert (wanted > 0).any()


def test_hawq_takes_hard_sigmoids() -> None:
    torch.manual_seed(0)
    costs = []
    for gate in (nn.Hardsigmoid(), nn.Sequential(Shifted(), nn.ReLU6(), Scaled())):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 2, 3, stride=2), gate, nn.Flatten(), nn.Linear(8, 3))
        costs.append(measure(model, "hawq", images(batch=9), choices=(2, 4))[0].cost_gub)
    assert np.allclose(costs[0], costs[1], rtol=1e-4) and costs[0].any()


class Shifted(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 3


class Scaled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / 6


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
    # What matching leaves of a cost is a small rest, with what float32 loses of the whole.
    share = 2e-5 if predictor == "taylor_matched" else 1e-6
    tolerance = {"rtol": 1e-3, "atol": share * whole.cost_gub.max()}
    assert np.allclose(small.cost_gub, whole.cost_gub, **tolerance)
    assert np.allclose(twice.cost_gub, whole.cost_gub, **tolerance)
    assert twice.count_g.tolist() == [6, 12]


@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("scale", ["absmax", "curvature"])
def test_the_model_and_the_images_are_bit_for_bit_as_before(
    model: nn.Module, predictor: str, scale: str
) -> None:
    model.norm.eval()
    model.head.bias.requires_grad_(False)
    model.conv.weight.grad = torch.full_like(model.conv.weight, 3.0)
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
    assert bool((model.conv.weight.grad == 3).all())
    assert all(p.grad is None for n, p in model.named_parameters() if n != "conv.weight")
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


class Unmet(nn.Module):
    """A layer whose weight is used without calling it, one whose input does not depend on the image, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.by_weight = nn.Linear(6, 5)
        self.of_positions = nn.Linear(2, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv(image)).flatten(2).transpose(1, 2)
        x = F.linear(x, weight=self.by_weight.weight, bias=self.by_weight.bias)
        position = torch.stack([torch.arange(x.shape[1]), torch.ones(x.shape[1])], dim=1) / x.shape[1]
        return self.head(torch.tanh(x + self.of_positions(position)).mean(dim=1))


@pytest.mark.parametrize("predictor", ["taylor", "taylor_matched"])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_layers_that_meet_no_gradient_at_their_output_have_their_costs_too(
    predictor: str, granularity: str
) -> None:
    torch.manual_seed(0)
    network = Unmet()
    found, units = measure(network, predictor, images(), granularity=granularity)
    wanted = by_loop(network, units, found, images(), "taylor")
    for layer in units.layers:
        if predictor == "taylor" or layer.name in ("by_weight", "of_positions"):
            rows = slice(layer.start, layer.stop)
            assert np.allclose(found.cost_gub[:, rows], wanted[:, rows], rtol=1e-3, atol=1e-12), layer.name
            assert (found.cost_gub[:, rows, 0] > 0).all()
    assert not any(p.requires_grad is False for p in network.parameters())


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_a_layer_that_the_network_does_not_use_costs_nothing(model: nn.Module, predictor: str) -> None:
    model.unused = nn.Linear(4, 4)
    found, units = measure(model, predictor, images())
    part = next(layer for layer in units.layers if layer.name == "unused")
    assert (found.cost_gub[:, part.start : part.stop] == 0).all()
    assert (found.cost_gub[:, : part.start].sum(axis=(1, 2)) > 0).all()


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


def test_every_predictor_has_its_price() -> None:
    assert set(PASSES) == set(PREDICTORS) == set(get_args(Predictor))
    assert PASSES["hawq"] == (6 * predictors.HUTCHINSON_PROBES, 0)  # two passes back through each gradient
    assert count_passes("taylor", num_choices=9, scale="curvature") == 2 + 3 + 9


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_progress_is_told_evenly_and_to_the_end(model: nn.Module, predictor: str) -> None:
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
    assert told[0] == ("input moments", 0.0) and told[1] == (predictor, 0.0)
    assert {stage for stage, _ in told[1:]} == {predictor}
    shares = [share for _, share in told[1:]]
    assert len(shares) > len(images()) and shares[-1] == 1.0
    assert all(a < b for a, b in pairwise(shares))
