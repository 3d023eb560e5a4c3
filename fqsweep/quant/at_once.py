"""All quantised weights of a model in one step of the graph, forward and backward.

Layer by layer, a quantiser is little arithmetic and much around it: graph nodes, views, and steps, limits and widths
worked out for a few hundred units at a time. On a GPU with 20 to 60 layers the launches alone take longer than the
arithmetic; on a CPU, with small images, what is around it takes half of the time or more. Here that is done once for
the units of all layers. What remains is an ``Arithmetic``: on GPUs one Triton program a unit of any layer
(``OneLaunch``), on CPUs one call of a C++ function (``OneCall``), which find a unit's weights through tables of
addresses, or ``quant.kernels`` in a loop over layers (``EachLayer``). All give the same levels at whole widths;
sums over a unit, and mixes of two levels, may differ in the last place.

Axes: u units of the whole model; ``_u1`` is (u, 1).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from fqsweep.models import quantisable_layers
from fqsweep.quant import at_once_native
from fqsweep.quant.blocks import Blocks
from fqsweep.quant.convert import (
    LearnedBitsWeight,
    QuantisedWeight,
    lower_width,
    quantisers_of,
    sharpened_share,
)
from fqsweep.quant.kernels import NATIVE, Kernels
from fqsweep.quant.levels import limits_of
from fqsweep.quant.units import as_units

Tensors = Sequence[torch.Tensor]


def can_quantise_at_once(device: torch.device, *, bit_gradient: str | None) -> bool:
    """Whether this device can, with this gradient of the widths (None: they are fixed)."""
    if bit_gradient not in (None, "fracbits"):
        return False
    return device.type == "cpu" or (device.type == "cuda" and can_launch())


@lru_cache(maxsize=1)
def can_launch() -> bool:
    """Whether Triton reaches a GPU: it builds its driver first, with a C compiler and Python's headers."""
    try:
        from triton.runtime import driver

        driver.active.get_current_target()
    except Exception:  # no Triton, no GPU, or whatever a compiler that is not there makes of it
        return False
    return True


class Arithmetic(Protocol):
    """What is done to the weights of all layers; ``rows`` are float32 (u, 1), as in ``quant.kernels``.

    Attributes:
        needs_levels: whether ``quantise_backward`` reads the quantised weights; they are kept for it only then.
    """

    needs_levels: bool

    def quantise(self, weights: Tensors, *rows: torch.Tensor) -> Tensors:
        """The nearest levels; ``rows``: step, limit, offset."""

    def quantise_backward(
        self, grads: Tensors, weights: Tensors, quantised: Tensors, *rows: torch.Tensor
    ) -> tuple[Tensors, Tensors]:
        """Gradients of the weights, and of the steps (u, 1)."""

    def mix(self, weights: Tensors, *rows: torch.Tensor) -> Tensors:
        """Weights between two grids; ``rows``: share, then step, limit, offset of the lower and the higher one."""

    def mix_backward(self, grads: Tensors, weights: Tensors, *rows: torch.Tensor) -> tuple[Tensors, Tensors]:
        """Gradients of the weights, and of the share and both steps, (u, 1) each."""


class AtOnce:
    """Quantises all layers of a model together; to be made anew when its quantisers or their memory layout change.

    Args:
        model: with quantisers on its layers (``quant.convert.attach_quantisers``), all of them of one kind.
        arithmetic: which class does it, called with the weights and their quantisers; if None, by the device and
            the quantisers' kernels.

    Raises:
        ValueError: the arithmetic refuses a weight (``OneLaunch``, ``OneCall``).
    """

    def __init__(self, model: nn.Module, arithmetic: Any = None) -> None:
        layers = quantisable_layers(model)
        by_name = quantisers_of(model)
        self.quantisers: list[QuantisedWeight] = list(by_name.values())
        self.weights = [_original(layers[name]) for name in by_name]
        if arithmetic is None:
            arithmetic = _arithmetic_for(self.weights[0].device, self.quantisers[0].kernels)
        self.arithmetic: Arithmetic = arithmetic(self.weights, self.quantisers)
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
            self.step_u1 = self.step_ub.gather(1, bits_u[:, None])
            self.grid = limits_of(bits_u)

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
        gain_u1 = torch.cat([q.log_gain_u for q in self.quantisers]).exp()[:, None]
        if not self.learned:
            return _QuantiseAll.apply(self.arithmetic, self.step_u1 * gain_u1, *self.grid, *self.weights)
        bits_u = torch.cat([q.free_bits_u for q in self.learned])
        low_u, (low_step_u1, *low), (high_step_u1, *high) = self._grids(bits_u.detach())
        steps_and_grids = (low_step_u1 * gain_u1, *low, high_step_u1 * gain_u1, *high)
        share_u1 = sharpened_share((bits_u - low_u)[:, None], self.learned[0].mix_temperature)
        return _MixAll.apply(self.arithmetic, share_u1, *steps_and_grids, *self.weights)

    def _grids(self, bits_u: torch.Tensor) -> Any:
        """The lower width, and start step, limit and offset at it and above it; kept until the widths change."""
        version = self.learned[0].free_bits_u._version
        if self._kept is None or self._kept[0] != version:
            low_u = lower_width(bits_u, self.known_ub, self.smallest_u, self.largest_u)
            self._kept = (version, (low_u, self._grid_at(low_u), self._grid_at(low_u + 1)))
        return self._kept[1]

    def _grid_at(self, width_u: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.step_ub.gather(1, width_u[:, None]), *limits_of(width_u)


def _arithmetic_for(device: torch.device, kernels: Kernels) -> type:
    if device.type != "cpu":
        return OneLaunch
    return OneCall if kernels == NATIVE else EachLayer


def _original(layer: nn.Module) -> nn.Parameter:
    chain: Any = layer.parametrizations
    weight: nn.Parameter = chain.weight.original
    return weight


# --- the graph -----------------------------------------------------------------------------------


class _QuantiseAll(torch.autograd.Function):
    """``grid._Quantise`` over all layers."""

    @staticmethod
    def forward(ctx: Any, arithmetic: Arithmetic, step_u1, limit_u1, offset_u1, *weights):
        rows = (step_u1, limit_u1, offset_u1)
        quantised = tuple(arithmetic.quantise(weights, *rows))
        ctx.arithmetic, ctx.num_layers = arithmetic, len(weights)
        ctx.save_for_backward(*rows, *weights, *(quantised if arithmetic.needs_levels else ()))
        return quantised

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads):
        saved = ctx.saved_tensors
        rows, weights, quantised = saved[:3], saved[3 : 3 + ctx.num_layers], saved[3 + ctx.num_layers :]
        grad_weights, (grad_step,) = ctx.arithmetic.quantise_backward(grads, weights, quantised, *rows)
        return None, grad_step, None, None, *grad_weights


class _MixAll(torch.autograd.Function):
    """``grid._Mix`` over all layers."""

    @staticmethod
    def forward(
        ctx: Any,
        arithmetic: Arithmetic,
        share_u1,
        low_step,
        low_limit,
        low_offset,
        high_step,
        high_limit,
        high_offset,
        *weights,
    ):
        rows = (share_u1, low_step, low_limit, low_offset, high_step, high_limit, high_offset)
        ctx.arithmetic = arithmetic
        ctx.save_for_backward(*rows, *weights)
        return tuple(arithmetic.mix(weights, *rows))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads):
        saved = ctx.saved_tensors
        rows, weights = saved[:7], saved[7:]
        grad_weights, grad_rows = ctx.arithmetic.mix_backward(grads, weights, *rows)
        grad_share, grad_low, grad_high = grad_rows
        return None, grad_share, grad_low, None, None, grad_high, None, None, *grad_weights


# --- the arithmetic ------------------------------------------------------------------------------


class EachLayer:
    """``quant.kernels`` on one layer after the other.

    The gradients of all quantised weights exist at the same time: one more float32 copy of the weights than layer by
    layer in the graph.
    """

    needs_levels = True

    def __init__(self, _weights: Tensors, quantisers: Sequence[QuantisedWeight]) -> None:
        self.num_units = [len(q.bits_u) for q in quantisers]
        self.kernels: Kernels = quantisers[0].kernels

    def quantise(self, weights: Tensors, *rows: torch.Tensor) -> Tensors:
        """See ``Arithmetic``."""
        return _shaped_as(weights, [self.kernels.quantise(*parts) for parts in self._by_layer([weights], rows)])

    def quantise_backward(
        self, grads: Tensors, weights: Tensors, quantised: Tensors, *rows: torch.Tensor
    ) -> tuple[Tensors, Tensors]:
        """See ``Arithmetic``."""
        return self._gradients(self.kernels.quantise_backward, [grads, weights, quantised], rows)

    def mix(self, weights: Tensors, *rows: torch.Tensor) -> Tensors:
        """See ``Arithmetic``."""
        return _shaped_as(weights, [self.kernels.mix(*parts) for parts in self._by_layer([weights], rows)])

    def mix_backward(self, grads: Tensors, weights: Tensors, *rows: torch.Tensor) -> tuple[Tensors, Tensors]:
        """See ``Arithmetic``."""
        return self._gradients(self.kernels.mix_backward, [grads, weights], rows)

    def _gradients(
        self, kernel: Callable[..., Tensors], tensors: Sequence[Tensors], rows: Tensors
    ) -> tuple[Tensors, Tensors]:
        """Of the weights, in their shapes, and of rows."""
        layers = [kernel(*parts) for parts in self._by_layer(tensors, rows)]
        grad_weights, *grad_rows = zip(*layers, strict=True)
        return _shaped_as(tensors[0], grad_weights), [torch.cat(parts) for parts in grad_rows]

    def _by_layer(self, tensors: Sequence[Tensors], rows: Tensors) -> Iterator[tuple[torch.Tensor, ...]]:
        """Each layer's tensors as units (u, n), and its part of the rows."""
        parts = zip(*[row.split(self.num_units) for row in rows], strict=True)
        for num_units, layer, part in zip(self.num_units, zip(*tensors, strict=True), parts, strict=True):
            yield *[as_units(tensor, num_units) for tensor in layer], *part


def _shaped_as(weights: Tensors, values: Tensors) -> list[torch.Tensor]:
    return [value.view(weight.shape) for weight, value in zip(weights, values, strict=True)]


class _InOneGo(ABC):
    """All units of all layers through one function of ``self.launch`` a step; see ``Arithmetic``.

    A unit's weights must lie in one block of memory in any order (plain or channels-last layout), because every
    operation is element by element or a sum over the unit.

    Raises:
        ValueError: they do not, or are not float32.
    """

    needs_levels = False  # they are computed again, which costs less than to read them
    launch: Callable[..., None]

    def __init__(self, weights: Tensors, quantisers: Sequence[QuantisedWeight]) -> None:
        if any(weight.dtype != torch.float32 for weight in weights):
            raise ValueError("weights are read as float32, and some are not")
        self.blocks = Blocks(weights, [len(q.bits_u) for q in quantisers])

    @abstractmethod
    def room_for_gradients(self, weights: Tensors) -> list[torch.Tensor]:
        """New tensors of the weights' shapes and layouts, to be filled and handed over."""

    def room_for_levels(self, weights: Tensors) -> list[torch.Tensor]:
        """Where the quantised weights go."""
        return self.room_for_gradients(weights)

    def quantise(self, weights: Tensors, *rows: torch.Tensor) -> Tensors:
        """See ``Arithmetic``."""
        return self._forward("quantise", weights, rows)

    def quantise_backward(
        self, grads: Tensors, weights: Tensors, _quantised: Tensors, *rows: torch.Tensor
    ) -> tuple[Tensors, Tensors]:
        """See ``Arithmetic``."""
        return self._backward("quantise_backward", grads, weights, rows, num_grad_rows=1)

    def mix(self, weights: Tensors, *rows: torch.Tensor) -> Tensors:
        """See ``Arithmetic``."""
        return self._forward("mix", weights, rows)

    def mix_backward(self, grads: Tensors, weights: Tensors, *rows: torch.Tensor) -> tuple[Tensors, Tensors]:
        """See ``Arithmetic``."""
        return self._backward("mix_backward", grads, weights, rows, num_grad_rows=3)

    def _forward(self, name: str, weights: Tensors, rows: Tensors) -> Tensors:
        room = self.room_for_levels(weights)
        self.launch(name, self.blocks, [weights, room], _contiguous(rows))
        return room

    def _backward(
        self, name: str, grads: Tensors, weights: Tensors, rows: Tensors, *, num_grad_rows: int
    ) -> tuple[Tensors, Tensors]:
        room = self.room_for_gradients(weights)
        grad_rows = [torch.empty_like(rows[0]) for _ in range(num_grad_rows)]
        layers = [weights, _laid_out_as(grads, weights), room]
        self.launch(name, self.blocks, layers, [*_contiguous(rows), *grad_rows])
        return room, grad_rows


class OneLaunch(_InOneGo):
    """The Triton kernels of ``quant.at_once_kernels``."""

    def __init__(self, weights: Tensors, quantisers: Sequence[QuantisedWeight]) -> None:
        from fqsweep.quant import at_once_kernels

        super().__init__(weights, quantisers)
        self.launch = at_once_kernels.run

    def room_for_gradients(self, weights: Tensors) -> list[torch.Tensor]:
        return _room_like(weights)


class OneCall(_InOneGo):
    """The C++ functions of ``quant.at_once_native``.

    The quantised weights have one place for good, as a new one in every step would be pages to fill with zeros first.
    They are new in every step: a graph of an earlier one cannot be gone through any more, and autograd says so.

    Raises:
        ValueError: see ``_InOneGo``.
        NativeBuildError: this machine cannot build them.
    """

    def __init__(self, weights: Tensors, quantisers: Sequence[QuantisedWeight]) -> None:
        super().__init__(weights, quantisers)
        at_once_native.load_library()
        self.launch = at_once_native.run
        self.levels = [torch.empty_like(weight, requires_grad=False) for weight in weights]

    def room_for_levels(self, weights: Tensors) -> list[torch.Tensor]:
        pairs = zip(self.levels, weights, strict=True)
        assert all(level.stride() == weight.stride() for level, weight in pairs), "another memory layout"
        torch.autograd.graph.increment_version(self.levels)
        return [level.detach() for level in self.levels]

    def room_for_gradients(self, weights: Tensors) -> list[torch.Tensor]:
        return [torch.empty_like(weight) for weight in weights]


def _contiguous(rows: Tensors) -> list[torch.Tensor]:
    return [row.contiguous() for row in rows]


def _room_like(weights: Tensors) -> list[torch.Tensor]:
    """Uninitialised float32 tensors of the weights' shapes and layouts, in one piece of memory."""
    whole = torch.empty(sum(w.numel() for w in weights), dtype=torch.float32, device=weights[0].device)
    parts = whole.split([w.numel() for w in weights])
    return [
        part.as_strided(w.shape, w.stride(), part.storage_offset())
        for part, w in zip(parts, weights, strict=True)
    ]


def _laid_out_as(tensors: Tensors, weights: Tensors) -> list[torch.Tensor]:
    """Gradients in float32 with the memory layout of their weights."""
    found = []
    for tensor, weight in zip(tensors, weights, strict=True):
        fits = tensor.stride() == weight.stride() and tensor.dtype == torch.float32
        found.append(tensor if fits else torch.empty_like(weight, dtype=torch.float32).copy_(tensor))
    return found
