"""Quantisation as a differentiable step: to one grid, or between the grids of two widths. No modules, no state.

Axes: u units (rows), n weights of a unit (columns). Levels are described in ``quant.levels``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fqsweep.quant.kernels import EAGER, Kernels
from fqsweep.quant.levels import MAX_BITS, absmax_steps, limits_of


class _Quantise(torch.autograd.Function):
    """Only the weights and the result are kept for the backward pass, and nothing asks the host."""

    @staticmethod
    def forward(ctx: Any, weight_un, step_u1, limit_u1, offset_u1, kernels):
        quantised_un = kernels.quantise(weight_un, step_u1, limit_u1, offset_u1)
        ctx.save_for_backward(weight_un, quantised_un, step_u1, limit_u1, offset_u1)
        ctx.kernels = kernels
        return quantised_un

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_un):
        grad_weight, grad_step = ctx.kernels.quantise_backward(grad_un, *ctx.saved_tensors)
        return grad_weight, grad_step, None, None, None


class _Mix(torch.autograd.Function):
    """The mix of two grids with its gradients to weights, share and both steps."""

    @staticmethod
    def forward(
        ctx: Any,
        weight_un,
        share_u1,
        low_step,
        low_limit,
        low_offset,
        high_step,
        high_limit,
        high_offset,
        kernels,
    ):
        grids = (low_step, low_limit, low_offset, high_step, high_limit, high_offset)
        ctx.save_for_backward(weight_un, share_u1, *grids)
        ctx.kernels = kernels
        return kernels.mix(weight_un, share_u1, *grids)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_un):
        grad_weight, grad_share, grad_low, grad_high = ctx.kernels.mix_backward(grad_un, *ctx.saved_tensors)
        return grad_weight, grad_share, grad_low, None, None, grad_high, None, None, None


def quantise_units(
    weight_un: torch.Tensor, step_u1: torch.Tensor, bits_u: torch.Tensor, *, kernels: Kernels = EAGER
) -> torch.Tensor:
    """Quantise with given steps and whole bit-widths; differentiable in weights and steps.

    Args:
        weight_un: float32 (u, n).
        step_u1: float32 (u, 1), distance between levels; twice the magnitude at 1 bit; 0 at 0 bits.
        bits_u: integer (u,), 0 to 8.
    """
    return _Quantise.apply(weight_un, step_u1, *limits_of(bits_u), kernels)


def mix_units(
    weight_un: torch.Tensor,
    share_u1: torch.Tensor,
    low_step_u1: torch.Tensor,
    high_step_u1: torch.Tensor,
    low_bits_u: torch.Tensor,
    *,
    kernels: Kernels = EAGER,
) -> torch.Tensor:
    """Weights between the grids of two neighbouring widths (Yang and Jin 2021, FracBits).

    (1 - share) Q_b(w) + share Q_(b+1)(w), so that the gradient along the share is the true difference of the
    loss's linear model between the two widths. Differentiable in weights, share and both steps.

    Args:
        weight_un: float32 (u, n).
        share_u1: float32 (u, 1), 0 to 1: how much of the higher width.
        low_step_u1, high_step_u1: float32 (u, 1), steps at ``low_bits_u`` and at one bit more.
        low_bits_u: integer (u,), 0 to 7.
    """
    low, high = limits_of(low_bits_u), limits_of(low_bits_u + 1)
    return _Mix.apply(weight_un, share_u1, low_step_u1, *low, high_step_u1, *high, kernels)


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
