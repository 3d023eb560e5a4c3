"""The quantiser itself: pure functions and one autograd step. No modules, no state.

Axes: u units (rows), n weights of a unit (columns).

One formula covers every width. With b bits the levels are (k + o) * step:
- b from 2 to 8: whole numbers k from -(2^(b-1)-1) to 2^(b-1)-1, o = 0;
- b = 1: the half-numbers -1/2 and +1/2, so that the levels are -step/2 and +step/2;
- b = 0: step = 0, every weight becomes 0 and nothing is stored.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch.autograd.function import once_differentiable

MAX_BITS = 8
# Largest level and offset by bit-width, in steps.
LIMIT_BY_BITS = (0.0, 0.5, *(float(2 ** (b - 1) - 1) for b in range(2, MAX_BITS + 1)))
OFFSET_BY_BITS = (0.0, 0.5, *(0.0 for _ in range(2, MAX_BITS + 1)))


def limits_of(bits_u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest level and offset per unit, float32 (u, 1), from integer widths (u,)."""
    limit_b, offset_b = _tables(bits_u.device)
    width_u = bits_u.long()
    return limit_b[width_u][:, None], offset_b[width_u][:, None]


@lru_cache(maxsize=16)
def _tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Limits and offsets by width, copied to a device once: a copy in every step would make the host wait."""
    return torch.tensor(LIMIT_BY_BITS, device=device), torch.tensor(OFFSET_BY_BITS, device=device)


def round_to_levels(
    weight_un: torch.Tensor, step_u1: torch.Tensor, limit_u1: torch.Tensor, offset_u1: torch.Tensor
) -> torch.Tensor:
    """Nearest level of each weight, in steps; exact multiples of 1 (or odd multiples of 1/2 at 1 bit)."""
    divisor = torch.where(step_u1 > 0, step_u1, torch.ones_like(step_u1))
    level = weight_un / divisor
    return level.sub_(offset_u1).round_().add_(offset_u1).clamp_(-limit_u1, limit_u1)


class _Quantise(torch.autograd.Function):
    """Round to the grid; straight-through to the weights, learned step size (Esser et al. 2020, eq. 3).

    Only the weights and the result are kept for the backward pass, and nothing asks the host.
    """

    @staticmethod
    def forward(ctx, weight_un, step_u1, limit_u1, offset_u1):
        quantised = round_to_levels(weight_un, step_u1, limit_u1, offset_u1).mul_(step_u1)
        ctx.save_for_backward(weight_un, quantised, step_u1, limit_u1, offset_u1)
        return quantised

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_un):
        weight_un, quantised, step_u1, limit_u1, offset_u1 = ctx.saved_tensors
        # Clipped weights get no gradient. At 1 bit nothing is clipped; a dropped unit has no gradient.
        one_bit = offset_u1 > 0
        reach = torch.where(one_bit, torch.inf, limit_u1 * step_u1 * (1 + 1e-6))
        reach = torch.where(step_u1 > 0, reach, -1.0)
        grad_weight = grad_un.masked_fill(weight_un.abs() > reach, 0.0)
        if not ctx.needs_input_grad[1]:
            return grad_weight, None, None, None
        along_level = torch.linalg.vecdot(grad_un, quantised)[:, None]
        along_weight = torch.linalg.vecdot(grad_weight, weight_un)[:, None]
        along_weight = torch.where(one_bit, 0.0, along_weight)
        divisor = torch.where(step_u1 > 0, step_u1, torch.ones_like(step_u1))
        grad_step = torch.where(step_u1 > 0, (along_level - along_weight) / divisor, 0.0)
        return grad_weight, grad_step, None, None


def quantise_units(weight_un: torch.Tensor, step_u1: torch.Tensor, bits_u: torch.Tensor) -> torch.Tensor:
    """Quantise with given steps and whole bit-widths; differentiable in weights and steps.

    Args:
        weight_un: float32 (u, n).
        step_u1: float32 (u, 1), distance between levels; twice the magnitude at 1 bit; 0 at 0 bits.
        bits_u: integer (u,), 0 to 8.
    """
    limit_u1, offset_u1 = limits_of(bits_u)
    return _Quantise.apply(weight_un, step_u1, limit_u1, offset_u1)


def absmax_steps(weight_un: torch.Tensor, bits_u: torch.Tensor) -> torch.Tensor:
    """Steps (u, 1) that just reach the largest weight; at 1 bit twice the mean magnitude; 0 at 0 bits."""
    limit_u1, _ = limits_of(bits_u)
    bits_u1 = bits_u.long()[:, None]
    absmax_u1 = weight_un.abs().amax(dim=1, keepdim=True)
    mean_u1 = weight_un.abs().mean(dim=1, keepdim=True)
    wide = absmax_u1 / limit_u1.clamp(min=1.0)
    return torch.where(bits_u1 >= 2, wide, torch.where(bits_u1 == 1, 2 * mean_u1, torch.zeros_like(mean_u1)))


def fake_quantize(weight: torch.Tensor, bits: int | torch.Tensor) -> torch.Tensor:
    """Symmetric quantisation per output channel (the first axis), with abs-max steps.

    b bits, 2 to 8: levels -(2^(b-1)-1) .. 2^(b-1)-1 times max|w| / (2^(b-1)-1). 1 bit: sign times the mean
    magnitude (zero counts as positive). 0 bits: the channel is dropped.

    Args:
        weight: float (channels, ...).
        bits: one width for all channels, or integers (channels,).

    Returns:
        Same shape and dtype; straight-through in the backward pass.

    Raises:
        ValueError: widths outside 0..8, or not one per channel.

    Example:
        >>> fake_quantize(torch.tensor([[1.0, -0.4, 0.1]]), 2)
        tensor([[1., 0., 0.]])
    """
    if weight.ndim < 1 or not weight.is_floating_point():
        raise ValueError(f"weight must be a float tensor with an output-channel axis, got {weight.dtype}")
    given = torch.as_tensor(bits, device=weight.device)
    if given.is_floating_point() or given.dtype == torch.bool:
        raise ValueError(f"bits must be whole numbers, got {given.dtype}")
    if given.ndim > 1 or (given.ndim == 1 and len(given) != len(weight)):
        raise ValueError(
            f"bits must be one number or {len(weight)} (one per channel), got shape {tuple(given.shape)}"
        )
    if given.numel() and (int(given.min()) < 0 or int(given.max()) > MAX_BITS):
        raise ValueError(f"bits must lie in 0..{MAX_BITS}, got {int(given.min())} to {int(given.max())}")
    bits_u = given.expand(len(weight)) if given.ndim == 0 else given
    if not weight.numel():
        return weight.clone()
    weight_un = weight.reshape(len(weight), -1).float()
    step_u1 = absmax_steps(weight_un.detach(), bits_u)
    return quantise_units(weight_un, step_u1, bits_u).view(weight.shape).to(weight.dtype)
