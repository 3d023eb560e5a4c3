"""Put quantisers on a model's layers, and take the quantised weights off again.

A quantiser is a parametrisation (``torch.nn.utils.parametrize``) of a layer's weight: any layer that
reads ``self.weight`` works as it is, whatever its class.

Axes: u units of a layer, b bit choices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

from fqsweep.models import quantisable_layers
from fqsweep.quant.grid import mix_units, quantise_units
from fqsweep.quant.kernels import EAGER, Kernels
from fqsweep.quant.units import UnitTable, as_units

LN2 = 0.6931471805599453


class QuantisedWeight(nn.Module):
    """A layer's weight on its grids: whole bit-widths, steps that can be learned.

    Attributes:
        step_ub: start steps for the widths 0..8, float32 (u, 9); widths that are no choice hold NaN.
        log_gain_u: learned factor of a unit's step, as its logarithm.
        bits_u: whole widths in use, int64 (u,).
        ready: the quantised weight, where somebody has made it already (``quant.at_once``).
    """

    step_ub: torch.Tensor
    bits_u: torch.Tensor
    ready: torch.Tensor | None

    def __init__(self, step_ub: torch.Tensor, bits_u: torch.Tensor, *, kernels: Kernels = EAGER) -> None:
        super().__init__()
        self.kernels = kernels
        self.ready = None
        self.register_buffer("step_ub", step_ub)
        self.register_buffer("bits_u", bits_u)
        self.log_gain_u = nn.Parameter(torch.zeros(len(bits_u)))

    def steps_at(self, bits_u: torch.Tensor) -> torch.Tensor:
        """Steps (u, 1) at given whole widths, with the learned factor."""
        start = self.step_ub.gather(1, bits_u[:, None])
        return start * self.log_gain_u.exp()[:, None]

    def reachable_widths(self) -> Iterator[tuple[torch.Tensor, tuple[int, ...]]]:
        """Which units (bool, (u,)) may get which whole widths; not those that are dropped."""
        for bits in self.bits_u.unique().tolist():
            if bits:
                yield self.bits_u == bits, (bits,)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return self._quantised(weight) if self.ready is None else self.ready

    def _quantised(self, weight: torch.Tensor) -> torch.Tensor:
        weight_un = as_units(weight, len(self.bits_u))
        return self._on_grid(weight_un, self.bits_u).view(weight.shape)

    def _on_grid(self, weight_un: torch.Tensor, bits_u: torch.Tensor) -> torch.Tensor:
        return quantise_units(weight_un, self.steps_at(bits_u), bits_u, kernels=self.kernels)


class LearnedBitsWeight(QuantisedWeight):
    """A layer's weight between two grids: widths are real numbers that the task loss moves.

    ``fracbits`` mixes the grids of the neighbouring whole widths (Yang and Jin 2021, FracBits); the mix's
    gradient is the true difference between them. ``lsq`` uses the nearest grid and the step-size
    gradient of Uhlich et al. 2020 down to 2 bits, and the difference below, where it has no meaning.
    """

    known_ub: torch.Tensor

    def __init__(
        self,
        step_ub: torch.Tensor,
        bits_u: torch.Tensor,
        *,
        bit_gradient: str,
        smallest: int,
        mix_temperature: float = 1.0,
        kernels: Kernels = EAGER,
    ) -> None:
        super().__init__(step_ub, bits_u, kernels=kernels)
        self.mix_temperature = mix_temperature
        self.free_bits_u = nn.Parameter(bits_u.float())
        self.bit_gradient = bit_gradient
        self.smallest = smallest
        self.largest = int(torch.isfinite(step_ub).any(dim=0).nonzero().max())
        # A width that is no choice has no steps: it is never one of the two that are mixed with a share.
        self.register_buffer("known_ub", torch.isfinite(step_ub))
        self.step_ub = step_ub.nan_to_num(nan=0.0)

    def reachable_widths(self) -> Iterator[tuple[torch.Tensor, tuple[int, ...]]]:
        yield self.bits_u > 0, tuple(b for b in self.known_ub.any(dim=0).nonzero()[:, 0].tolist() if b)

    def _quantised(self, weight: torch.Tensor) -> torch.Tensor:
        weight_un = as_units(weight, len(self.bits_u))
        low_u = lower_width(self.free_bits_u.detach(), self.known_ub, self.smallest, self.largest)
        share_u1 = (self.free_bits_u - low_u)[:, None]
        if self.bit_gradient == "fracbits":
            share_u1 = sharpened_share(share_u1, self.mix_temperature)
            low_step, high_step = self.steps_at(low_u), self.steps_at(low_u + 1)
            mixed = mix_units(weight_un, share_u1, low_step, high_step, low_u, kernels=self.kernels)
            return mixed.view(weight.shape)
        low, high = self._on_grid(weight_un, low_u), self._on_grid(weight_un, low_u + 1)
        nearest = torch.where(share_u1.detach() >= 0.5, high, low)
        slope = torch.where(low_u[:, None] >= 2, self._step_slope(nearest, weight_un), (high - low).detach())
        moved = (self.free_bits_u - self.free_bits_u.detach())[:, None]
        return (nearest + moved * slope).view(weight.shape)

    def _step_slope(self, quantised_un: torch.Tensor, weight_un: torch.Tensor) -> torch.Tensor:
        """d quantised / d bits through the step: (wq - w) times -ln2 2^(b-1) / (2^(b-1) - 1)."""
        levels = torch.exp2(self.free_bits_u.detach().clamp(min=2.0) - 1)
        return (quantised_un - weight_un).detach() * (-LN2 * levels / (levels - 1))[:, None]


def sharpened_share(share_u1: torch.Tensor, temperature: float) -> torch.Tensor:
    """The upper grid's share of a mix at a temperature, with the slope that it has at temperature 1.

    ``s^(1/t) / (s^(1/t) + (1-s)^(1/t))``, the softmax of ``log s`` and ``log (1-s)``. Widths start whole, where the
    slope of that is 0 at every temperature below 1 and nothing would ever move: the slope is passed straight through.

    Args:
        share_u1: float (u, 1), from 0 to 1.
        temperature: above 0, up to 1.
    """
    if temperature == 1:
        return share_u1
    share = share_u1.detach()
    upper, lower = share ** (1 / temperature), (1 - share) ** (1 / temperature)
    return share_u1 + (upper / (upper + lower) - share)


def lower_width(
    bits_u: torch.Tensor,
    known_ub: torch.Tensor,
    smallest: torch.Tensor | float,
    largest: torch.Tensor | float,
) -> torch.Tensor:
    """The lower of the two whole widths that a learned one lies between, int64 (u,); at a ceiling the pair below it.

    Args:
        bits_u: float (u,); one that is not a number counts as the smallest.
        known_ub: bool (u, 9), which widths have steps.
        smallest, largest: limits, one for all units or float (u,).
    """
    bits_u = torch.where(bits_u.isnan(), smallest, bits_u)
    low_u = bits_u.floor().clamp(smallest, largest - 1).long()  # type: ignore[arg-type]
    above = known_ub.gather(1, (low_u + 1)[:, None])[:, 0]
    below = known_ub.gather(1, (low_u - 1).clamp(min=0)[:, None])[:, 0] & (low_u > smallest)
    return torch.where(~above & below, low_u - 1, low_u)


@dataclass(frozen=True, kw_only=True)
class QuantisedState:
    """A trained model as plain tensors, its weights on their grids.

    Attributes:
        tensors: the state dict of the plain model.
        bits: layer name -> int64 (u,); steps: layer name -> float32 (u,).
    """

    tensors: dict[str, torch.Tensor]
    bits: dict[str, np.ndarray]
    steps: dict[str, np.ndarray]


def attach_quantisers(
    model: nn.Module,
    units: UnitTable,
    step_ub: dict[str, torch.Tensor],
    bits_u: np.ndarray,
    *,
    learn_bits: str | None = None,
    smallest: int = 0,
    mix_temperature: float = 1.0,
    kernels: Kernels = EAGER,
) -> None:
    """Quantise every layer of ``units`` in place.

    Args:
        step_ub: layer name -> float32 (u, 9), steps at widths 0..8.
        bits_u: whole widths of all units.
        learn_bits: ``fracbits`` or ``lsq`` to make the widths learnable, None to keep them.
        smallest: the smallest width that learned bits may have.
        mix_temperature: of learned bits (``sharpened_share``).
        kernels: the form of the arithmetic (``quant.kernels``).
    """
    layers = quantisable_layers(model)
    for name, layer_bits in units.split(bits_u).items():
        weight = layers[name].weight
        bits = torch.as_tensor(np.asarray(layer_bits), dtype=torch.long, device=weight.device)
        steps = step_ub[name].to(weight.device, copy=True)
        if learn_bits is None:
            quantiser: QuantisedWeight = QuantisedWeight(steps, bits, kernels=kernels)
        else:
            quantiser = LearnedBitsWeight(
                steps,
                bits,
                bit_gradient=learn_bits,
                smallest=smallest,
                mix_temperature=mix_temperature,
                kernels=kernels,
            )
        parametrize.register_parametrization(layers[name], "weight", quantiser.to(weight.device), unsafe=True)


def quantisers_of(model: nn.Module) -> dict[str, QuantisedWeight]:
    """The quantiser of each quantised layer, by the layer's name."""
    found = {}
    for name, module in quantisable_layers(model).items():
        if parametrize.is_parametrized(module, "weight"):
            found[name] = _quantiser_of(module)
    return found


def _quantiser_of(layer: nn.Module) -> QuantisedWeight:
    chain: Any = layer.parametrizations
    quantiser = chain.weight[0]
    assert isinstance(quantiser, QuantisedWeight)
    return quantiser


def freeze_bits(model: nn.Module, units: UnitTable, bits_u: np.ndarray) -> None:
    """Replace learned widths by whole ones, in place; weights and learned step factors stay."""
    layers = quantisable_layers(model)
    for name, layer_bits in units.split(bits_u).items():
        module = layers[name]
        learned = _quantiser_of(module)
        bits = torch.as_tensor(np.asarray(layer_bits), dtype=torch.long, device=learned.bits_u.device)
        frozen = QuantisedWeight(learned.step_ub, bits, kernels=learned.kernels)
        frozen.log_gain_u = learned.log_gain_u
        chain: Any = module.parametrizations
        chain.weight[0] = frozen


@torch.no_grad()
def detach_quantisers(model: nn.Module) -> QuantisedState:
    """Take the quantisers off, in place: the model's weights become the values on their grids."""
    bits: dict[str, np.ndarray] = {}
    steps: dict[str, np.ndarray] = {}
    layers = quantisable_layers(model)
    for name, quantiser in quantisers_of(model).items():
        bits[name] = quantiser.bits_u.cpu().numpy()
        steps[name] = quantiser.steps_at(quantiser.bits_u)[:, 0].float().cpu().numpy()
        parametrize.remove_parametrizations(layers[name], "weight", leave_parametrized=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    return QuantisedState(tensors=tensors, bits=bits, steps=steps)
