"""BAQ: bit-widths that learn from the task loss under a budget (the bits' own optimiser).

Axes: u units of the whole model, k candidates.

The budget couples units through their sizes, so descent is done in the metric sum n_u db_u^2: the step of
a unit is its gradient per weight. At rest all units between their limits then have the same loss per bit
of storage, which is the optimality condition of the budgeted problem, and the projection on the budget is
one common shift.

Gradients of single units are mostly noise, and a unit that follows noise walks away from a good allocation. So a
unit moves only as far as its gradient stands out: its running mean is shrunk by what noise alone would make of it,
in the form of James and Stein's positive-part estimator (1961), unit by unit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from fqsweep.allocation import allocate_bits
from fqsweep.errors import TrialError
from fqsweep.quant.convert import LearnedBitsWeight, quantisers_of
from fqsweep.quant.units import UnitTable

# Gradients of so many training steps make one step of the bits: less noise, and less work for a GPU's host.
STEPS_GATHERED = 2
MOMENTUM = 0.9
# Share of a gradient's mean square that the running mean of pure noise has.
NOISE_FRAC = (1 - MOMENTUM) / (1 + MOMENTUM)
# A mean moves a unit when its square is above so many times what noise alone makes of it (1.4 standard deviations).
TIMES_NOISE = 2.0
SCALE_MOMENTUM = 0.97
LARGEST_MOVE_BITS = 0.25
# 16 candidates in each of 8 rounds narrow the shift down to 2^-32 of its range.
CANDIDATES = 16
ROUNDS = 8


class LearnedBits:
    """The learned widths of a model and their optimiser.

    Args:
        model: with ``LearnedBitsWeight`` quantisers on every layer of ``units``.
        counted_u: weights per unit that the budget counts, int64 (u,).
        lowest_u, highest_u: limits per unit; equal for pinned units.
        budget_bits: mean bits per weight that are never exceeded after a step.
        learning_rate: bits that a unit of typical gradient moves in a training step.
    """

    def __init__(
        self,
        model: nn.Module,
        units: UnitTable,
        *,
        counted_u: np.ndarray,
        lowest_u: np.ndarray,
        highest_u: np.ndarray,
        budget_bits: float,
        learning_rate: float,
    ) -> None:
        quantisers = quantisers_of(model)
        self.units = units
        self.counted_u = counted_u
        self.parameters: list[nn.Parameter] = []
        for layer in units.layers:
            quantiser = quantisers[layer.name]
            assert isinstance(quantiser, LearnedBitsWeight)
            self.parameters.append(quantiser.free_bits_u)
        device = self.parameters[0].device
        self.size_u = torch.as_tensor(counted_u, dtype=torch.float32, device=device)
        self.share_u = self.size_u / self.size_u.sum()
        self.lowest_u = torch.as_tensor(lowest_u, dtype=torch.float32, device=device)
        self.highest_u = torch.as_tensor(highest_u, dtype=torch.float32, device=device)
        self.budget_bits = budget_bits
        self.learning_rate = learning_rate
        self.velocity_u = torch.zeros_like(self.share_u)
        self.square_u = torch.zeros_like(self.share_u)
        self.scale = torch.zeros((), device=device)
        self.num_steps = 0
        self.num_gathered = 0

    def mean_bits(self) -> torch.Tensor:
        """Mean bits per weight that the budget counts, differentiable."""
        return (torch.cat(list(self.parameters)) * self.share_u).sum()

    def whole_mean_bits(self) -> float:
        """Mean bits per weight of the whole network, as ``bits/mean_weight`` counts them."""
        num_weights_u = self.units.num_weights_u
        return float(num_weights_u @ self.values()) / float(num_weights_u.sum())

    @torch.no_grad()
    def step(self, *, rate_frac: float) -> None:
        """After every training step: gather, and every few steps move, clip and project on the budget.

        Args:
            rate_frac: current share of ``learning_rate`` (its schedule).
        """
        self.num_gathered += 1
        if self.num_gathered < STEPS_GATHERED:
            return
        gradient_u = self._gathered() / STEPS_GATHERED
        is_free_u = self.highest_u > self.lowest_u
        per_weight_u = torch.where(is_free_u, gradient_u / self.size_u, 0.0)
        move_u = self._direction(per_weight_u) * (STEPS_GATHERED * self.learning_rate * rate_frac)
        # A gradient that is not finite moves nothing here: the loss that it comes from is reported by name.
        move_u = move_u.nan_to_num_(nan=0.0).clamp_(-LARGEST_MOVE_BITS, LARGEST_MOVE_BITS)
        bits_u = torch.cat([p.detach() for p in self.parameters]) - move_u
        self._store(project_on_budget(bits_u, self.share_u, self.lowest_u, self.highest_u, self.budget_bits))
        self._clear()

    def _direction(self, per_weight_u: torch.Tensor) -> torch.Tensor:
        """The running mean of the gradients without what is noise, in units of a typical gradient."""
        self.num_steps += 1
        self.velocity_u.mul_(MOMENTUM).add_(per_weight_u, alpha=1 - MOMENTUM)
        self.square_u.mul_(MOMENTUM).addcmul_(per_weight_u, per_weight_u, value=1 - MOMENTUM)
        typical = (self.share_u * per_weight_u.square()).sum().sqrt()
        self.scale.mul_(SCALE_MOMENTUM).add_(typical, alpha=1 - SCALE_MOMENTUM)
        seen = 1 - MOMENTUM**self.num_steps
        velocity_u, square_u = self.velocity_u / seen, self.square_u / seen
        # Of few gradients the mean has more noise: 1 of the first, NOISE_FRAC of many.
        noise_frac = NOISE_FRAC * (1 + MOMENTUM**self.num_steps) / seen
        noise_u = TIMES_NOISE * noise_frac * square_u
        stands_out_u = (1 - noise_u / velocity_u.square().clamp(min=1e-38)).clamp_(min=0.0)
        scale = self.scale / (1 - SCALE_MOMENTUM**self.num_steps)
        return velocity_u * stands_out_u / scale.clamp(min=1e-20)

    def _gathered(self) -> torch.Tensor:
        """The gradients that lie on the bits, (u,)."""
        return torch.cat([p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters])

    def _clear(self) -> None:
        self.num_gathered = 0
        for parameter in self.parameters:
            parameter.grad = None

    def _store(self, bits_u: torch.Tensor) -> None:
        parts = bits_u.split([len(parameter) for parameter in self.parameters])
        torch._foreach_copy_([*self.parameters], list(parts))

    def state_dict(self) -> dict[str, Any]:
        """The widths and their optimiser's state, as tensors and plain values."""
        return {
            "bits_u": torch.cat([p.detach() for p in self.parameters]).clone(),
            "velocity_u": self.velocity_u.clone(),
            "square_u": self.square_u.clone(),
            "gathered_u": self._gathered(),
            "scale": self.scale.clone(),
            "num_steps": self.num_steps,
            "num_gathered": self.num_gathered,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that ``state_dict`` gave."""
        device = self.velocity_u.device
        self._store(state["bits_u"].to(device))
        for name in ("velocity_u", "square_u", "scale"):
            getattr(self, name).copy_(state[name])
        self.num_steps, self.num_gathered = state["num_steps"], state["num_gathered"]
        parts = state["gathered_u"].to(device).split([len(parameter) for parameter in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.grad = part.clone()

    def values(self) -> np.ndarray:
        """The widths as they are, float64 (u,)."""
        bits_u: np.ndarray = torch.cat([p.detach() for p in self.parameters]).double().cpu().numpy()
        return bits_u

    def round_under_budget(self, *, less_bits: float = 0.0) -> np.ndarray:
        """Whole widths nearest to the learned ones, weighted by size, within the budget: int64 (u,).

        Where the learned mean lies below the budget (the rate's pull), it is kept as the limit.

        Args:
            less_bits: mean bits by which the limit is lowered.
        """
        free_u = self.values()
        if not np.isfinite(free_u).all():
            raise TrialError("learned bits are not finite; lower bit_learning_rate")
        low, high = int(self.lowest_u.min()), int(self.highest_u.max())
        choices = list(range(low, high + 1))
        lowest_u, highest_u = self.lowest_u.cpu().numpy(), self.highest_u.cpu().numpy()
        distance_ub = self.counted_u[:, None] * (np.array(choices)[None, :] - free_u[:, None]) ** 2
        allowed_ub = (np.array(choices) >= lowest_u[:, None]) & (np.array(choices) <= highest_u[:, None])
        cost_gub = np.where(allowed_ub, distance_ub, np.inf)[None]
        learned_mean = float(self.counted_u @ free_u) / float(self.counted_u.sum())
        smallest_mean = float(self.counted_u @ lowest_u) / float(self.counted_u.sum())
        limit = max(min(self.budget_bits, learned_mean + 1e-3) - less_bits, smallest_mean)
        return allocate_bits(cost_gub, self.counted_u, budget_bits=limit, choices=choices).bits_u


def project_on_budget(
    bits_u: torch.Tensor,
    share_u: torch.Tensor,
    lowest_u: torch.Tensor,
    highest_u: torch.Tensor,
    budget_bits: float,
) -> torch.Tensor:
    """The nearest widths (metric: squared distance weighted by size) within limits and budget.

    The solution is one common shift downwards. It is enclosed ever closer, by many candidates at a time rather than
    by halves: a GPU is asked for few large operations, and nothing is read back.
    """
    clipped_u = torch.clamp(bits_u, lowest_u, highest_u)
    low = torch.zeros((), device=bits_u.device)
    high = (bits_u - lowest_u).amax().clamp(min=0.0)
    over = (clipped_u * share_u).sum() > budget_bits
    frac_k = torch.arange(1, CANDIDATES + 1, device=bits_u.device, dtype=bits_u.dtype) / CANDIDATES
    for _ in range(ROUNDS):
        shift_k = low + (high - low) * frac_k
        spent_k = torch.clamp(bits_u - shift_k[:, None], lowest_u, highest_u) @ share_u
        # The first candidate that fits; the last one always did.
        place = (spent_k > budget_bits).sum().clamp(max=CANDIDATES - 1)
        high = shift_k.gather(0, place[None])[0]
        before = shift_k.gather(0, (place - 1).clamp(min=0)[None])[0]
        low = torch.where(place > 0, before, low)
    return torch.where(over, torch.clamp(bits_u - high, lowest_u, highest_u), clipped_u)
