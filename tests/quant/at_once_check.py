"""Weights and gradients of all layers at once against layer by layer, on a device: run by ``test_at_once``.

python tests/quant/at_once_check.py cpu|cuda        (cpu: with TRITON_INTERPRET=1, Triton's own interpreter)

``compare`` with ``EachLayer`` or ``OneCall`` is what a CPU does.
"""

from __future__ import annotations

import copy
import sys

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

from fqsweep.quant.at_once import AtOnce, EachLayer, OneLaunch
from fqsweep.quant.convert import attach_quantisers
from fqsweep.quant.steps import choose_steps
from fqsweep.quant.units import list_units

CHOICES = tuple(range(9))


def network(
    device: torch.device, *, learn: str | None, granularity: str, channels_last: bool, temperature: float = 1.0
) -> nn.Module:
    """Convolutions plain, grouped and 1 x 1, and linear layers, with all widths 0 to 8 among their units."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 9, 3), nn.ReLU(), nn.Conv2d(9, 9, 3, groups=9), nn.Conv2d(9, 18, 1), nn.Flatten(),
        nn.Linear(18 * 16, 40), nn.ReLU(), nn.Linear(40, 4),
    ).to(device)  # fmt: skip
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    units = list_units(model, granularity=granularity)
    steps = {}
    for layer in units.layers:
        weight = model.get_submodule(layer.name).weight.detach()
        # Shorter than the largest weight, so that some weights are clipped.
        steps[layer.name] = 0.7 * choose_steps(weight.reshape(layer.num_units, -1), CHOICES, rule="absmax")
    bits_u = np.arange(units.num_units) % 9
    attach_quantisers(model, units, steps, bits_u, learn_bits=learn, mix_temperature=temperature)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        change = torch.rand(parameter.shape, generator=generator).to(device)
        if name.endswith("log_gain_u"):
            parameter.data.copy_(0.2 * change)
        if name.endswith("free_bits_u"):
            parameter.data.copy_((parameter.data + change).clamp(0, 8))
    return model


def gradients_of(model: nn.Module, image: torch.Tensor) -> dict[str, torch.Tensor]:
    with parametrize.cached():
        output = model(image)
    (1000 * output.square().sum()).backward()  # gradients well above the tolerance
    found = {"output": output.detach()}
    return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compare(device: torch.device, *, arithmetic: type, **options: object) -> None:
    plain = network(device, **options)  # type: ignore[arg-type]
    together = copy.deepcopy(plain)
    image = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(2)).to(device)
    wanted = gradients_of(plain, image)
    with AtOnce(together, arithmetic).ready():
        made = [q.ready.clone() for q in AtOnce(together, arithmetic).quantisers]
        found = gradients_of(together, image)
    layers = [m for m in plain.modules() if parametrize.is_parametrized(m, "weight")]
    for layer, value in zip(layers, made, strict=True):
        torch.testing.assert_close(value, layer.weight, rtol=1e-6, atol=1e-7)
    assert found.keys() == wanted.keys() and len(wanted) > 10, options
    for name, value in wanted.items():
        if arithmetic is EachLayer and not name.endswith("log_gain_u"):
            assert torch.equal(found[name], value), name
        torch.testing.assert_close(
            found[name], value, rtol=2e-4, atol=2e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


def compare_broken(device: torch.device, *, arithmetic: type, learn: str | None) -> None:
    """Weights that are not numbers, as in a network that diverges, stay so, and so do their gradients."""
    plain = network(device, learn=learn, granularity="channel", channels_last=False)
    weights = {n: p.data for n, p in plain.named_parameters() if n.endswith("weight.original")}
    for weight in weights.values():
        weight.view(-1)[:: weight.numel() // 3] = torch.nan
    together = copy.deepcopy(plain)
    made = AtOnce(together, arithmetic).quantise()
    layers = [m for m in plain.modules() if parametrize.is_parametrized(m, "weight")]
    wanted = [layer.weight for layer in layers]
    for values in (made, wanted):
        sum(
            (value * torch.linspace(-1, 1, value.numel()).view_as(value).to(device)).sum() for value in values
        ).backward()
    assert all(value.isnan().any() for value in made) and len(made) == len(wanted) == 5
    for value, other in zip(made, wanted, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-7, equal_nan=True)
    found = dict(together.named_parameters())
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(
                found[name].grad, parameter.grad, rtol=2e-4, atol=2e-4, equal_nan=True,
                msg=lambda text, n=name: f"{n}: {text}",
            )  # fmt: skip


def main() -> None:
    device = torch.device(sys.argv[1])
    for learn in (None, "fracbits"):
        compare_broken(device, arithmetic=OneLaunch, learn=learn)
        for granularity in ("channel", "tensor"):
            for channels_last in (False, True):
                compare(
                    device,
                    arithmetic=OneLaunch,
                    learn=learn,
                    granularity=granularity,
                    channels_last=channels_last,
                )
    print("all layers at once: the same as layer by layer")


if __name__ == "__main__":
    main()
