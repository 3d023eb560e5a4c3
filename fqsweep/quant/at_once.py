"""All quantised weights of a model in one kernel, forward and backward (Triton, on GPUs).

Layer by layer, a quantiser costs a GPU little and its host much: with 20 to 60 layers the launches alone take longer
than the arithmetic. Here one program serves one unit of any layer; it finds the unit's weights through a table
of addresses. A unit's weights must lie in one block of memory in any order (plain or channels-last layout), because
every operation is element by element or a sum over the unit.

The arithmetic is that of ``quant.kernels``; sums over a unit may differ in the last place.
Axes: u units of the whole model.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from fqsweep.models import quantisable_layers
from fqsweep.quant.blocks import Blocks
from fqsweep.quant.convert import LearnedBitsWeight, QuantisedWeight, lower_width, quantisers_of
from fqsweep.quant.levels import limits_of


def can_quantise_at_once(device: torch.device, *, bit_gradient: str | None) -> bool:
    """Whether there are kernels for this device and this gradient of the widths (None: they are fixed)."""
    has_triton = importlib.util.find_spec("triton") is not None
    return device.type == "cuda" and has_triton and bit_gradient in (None, "fracbits")


class AtOnce:
    """Quantises all layers of a model together; to be made anew when its quantisers change.

    Args:
        model: with quantisers on its layers (``quant.convert.attach_quantisers``), all of them of one kind.

    Raises:
        ValueError: a weight whose units do not lie in blocks of memory.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = quantisable_layers(model)
        by_name = quantisers_of(model)
        self.quantisers: list[QuantisedWeight] = list(by_name.values())
        self.weights = [_original(layers[name]) for name in by_name]
        self.blocks = Blocks(self.weights, [len(q.bits_u) for q in self.quantisers])
        self.step_ub = torch.cat([q.step_ub for q in self.quantisers])
        self._kept: tuple[int, Any] | None = None
        self.learned = [q for q in self.quantisers if isinstance(q, LearnedBitsWeight)]
        assert len(self.learned) in (0, len(self.quantisers)), "fixed and learned widths in one model"
        if self.learned:
            self.known_ub = torch.cat([q.known_ub for q in self.learned])
            sizes_u = torch.tensor([len(q.bits_u) for q in self.learned], device=self.step_ub.device)
            limits = [(float(q.smallest), float(q.largest)) for q in self.learned]
            limit_lu = torch.tensor(limits, device=self.step_ub.device)
            self.smallest_u, self.largest_u = limit_lu.repeat_interleave(sizes_u, dim=0).unbind(1)
        else:
            bits_u = torch.cat([q.bits_u for q in self.quantisers])
            self.step_u = self.step_ub.gather(1, bits_u[:, None])[:, 0]
            self.grid = tuple(part[:, 0].contiguous() for part in limits_of(bits_u))

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Within it, the model's layers find their quantised weights made."""
        for quantiser, value in zip(self.quantisers, self.quantise(), strict=True):
            quantiser.ready = value
        try:
            yield
        finally:
            for quantiser in self.quantisers:
                quantiser.ready = None

    def quantise(self) -> tuple[torch.Tensor, ...]:
        """The quantised weights, differentiable in weights, step factors and learned widths."""
        gain_u = torch.cat([q.log_gain_u for q in self.quantisers]).exp()
        if not self.learned:
            return _QuantiseAll.apply(self.blocks, self.step_u * gain_u, *self.grid, *self.weights)
        bits_u = torch.cat([q.free_bits_u for q in self.learned])
        low_u, (low_step_u, *low), (high_step_u, *high) = self._grids(bits_u.detach())
        steps_and_grids = (low_step_u * gain_u, *low, high_step_u * gain_u, *high)
        return _MixAll.apply(self.blocks, bits_u - low_u, *steps_and_grids, *self.weights)

    def _grids(self, bits_u: torch.Tensor) -> Any:
        """The lower width, and start step, limit and offset at it and above it; kept until the widths change."""
        version = self.learned[0].free_bits_u._version
        if self._kept is None or self._kept[0] != version:
            low_u = lower_width(bits_u, self.known_ub, self.smallest_u, self.largest_u)
            self._kept = (version, (low_u, self._grid_at(low_u), self._grid_at(low_u + 1)))
        return self._kept[1]

    def _grid_at(self, width_u: torch.Tensor) -> tuple[torch.Tensor, ...]:
        limit_u1, offset_u1 = limits_of(width_u)
        start_u1 = self.step_ub.gather(1, width_u[:, None])
        return start_u1[:, 0], limit_u1[:, 0].contiguous(), offset_u1[:, 0].contiguous()


def _original(layer: nn.Module) -> nn.Parameter:
    chain: Any = layer.parametrizations
    weight: nn.Parameter = chain.weight.original
    return weight


def _room_like(weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Uninitialised float32 tensors of the weights' shapes and layouts, in one piece of memory."""
    whole = torch.empty(sum(w.numel() for w in weights), dtype=torch.float32, device=weights[0].device)
    parts = whole.split([w.numel() for w in weights])
    return [
        part.as_strided(w.shape, w.stride(), part.storage_offset())
        for part, w in zip(parts, weights, strict=True)
    ]


def _laid_out_as(tensors: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients in float32 with the memory layout of their weights."""
    found = []
    for tensor, weight in zip(tensors, weights, strict=True):
        fits = tensor.stride() == weight.stride() and tensor.dtype == torch.float32
        found.append(tensor if fits else torch.empty_like(weight, dtype=torch.float32).copy_(tensor))
    return found


class _QuantiseAll(torch.autograd.Function):
    """``grid._Quantise`` over all layers."""

    @staticmethod
    def forward(ctx: Any, blocks: Blocks, step_u, limit_u, offset_u, *weights):
        from fqsweep.quant import at_once_kernels as kernels

        quantised = _room_like(weights)
        step_u = step_u.contiguous()
        kernels.quantise(blocks, weights, quantised, step_u, limit_u, offset_u)
        ctx.blocks = blocks
        ctx.save_for_backward(step_u, limit_u, offset_u, *weights)
        return tuple(quantised)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads):
        from fqsweep.quant import at_once_kernels as kernels

        step_u, limit_u, offset_u, *weights = ctx.saved_tensors
        grad_weights, grad_step_u = _room_like(weights), torch.empty_like(step_u)
        given = _laid_out_as(grads, weights)
        kernels.quantise_backward(
            ctx.blocks, weights, given, grad_weights, step_u, limit_u, offset_u, grad_step_u
        )
        return None, grad_step_u, None, None, *grad_weights


class _MixAll(torch.autograd.Function):
    """``grid._Mix`` over all layers."""

    @staticmethod
    def forward(
        ctx: Any,
        blocks: Blocks,
        share_u,
        low_step,
        low_limit,
        low_offset,
        high_step,
        high_limit,
        high_offset,
        *weights,
    ):
        from fqsweep.quant import at_once_kernels as kernels

        grids = (low_step, low_limit, low_offset, high_step, high_limit, high_offset)
        rows = tuple(part.contiguous() for part in (share_u, *grids))
        mixed = _room_like(weights)
        kernels.mix(blocks, weights, mixed, *rows)
        ctx.blocks = blocks
        ctx.save_for_backward(*rows, *weights)
        return tuple(mixed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads):
        from fqsweep.quant import at_once_kernels as kernels

        rows, weights = ctx.saved_tensors[:7], ctx.saved_tensors[7:]
        grad_weights = _room_like(weights)
        grad_share, grad_low, grad_high = (torch.empty_like(rows[0]) for _ in range(3))
        given = _laid_out_as(grads, weights)
        kernels.mix_backward(ctx.blocks, weights, given, grad_weights, *rows, grad_share, grad_low, grad_high)
        return None, grad_share, grad_low, None, None, grad_high, None, None, *grad_weights
