"""Cost tables of what matching leaves of a rounding error, against its definition layer by layer.

Axes: g groups, u units, b bit choices, i images.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fqsweep.models import quantisable_layers
from fqsweep.quant.moments import MAX_STRETCH, expected_corrections
from fqsweep.quant.units import list_units
from tests.tiny_network import CHOICES, SIZE, Batch, images, measure, rounding_errors, tiny_network


@pytest.fixture
def model() -> nn.Module:
    return tiny_network()


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
    correction = expected_corrections(model, units, [image], changes)["1"]
    assert torch.equal(correction.stretch_kc, torch.ones(1, 3))
    with torch.no_grad():
        missing_c = 0.5 * F.linear(image.flatten(1), model[1].weight).mean(dim=0)
    torch.testing.assert_close(correction.shift_kc[0], missing_c)
