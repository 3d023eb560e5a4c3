"""The Triton kernels of ``quant.at_once``: one program a unit. Imported only where Triton is.

In every kernel: ``layers``, ``starts``, ``nums`` say where a unit's weights lie (``quant.blocks``); tables of
addresses have an entry a layer; all values are float32. Formulas: ``quant.levels`` and ``quant.kernels``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from fqsweep.quant.blocks import Blocks

WEIGHTS_AT_A_TIME = 1024
# Adding and taking away 1.5 * 2^23 rounds a float32 below 2^22 to the nearest whole number, halves to even.
ROUNDER = tl.constexpr(12582912.0)
# Weights beyond the outermost level get no gradient; a little room for rounding.
ROOM = tl.constexpr(1.000001)


@triton.jit
def _place(table, layer, start):
    return tl.load(table + layer).to(tl.pointer_type(tl.float32)) + start


@triton.jit
def _within(level, limit):
    # What is not a number stays so: a network that diverges must show it.
    above = tl.maximum(level, -limit, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(above, limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _on_grid(weight, step, limit, offset):
    divisor = tl.where(step > 0, step, 1.0)
    level = tl.math.div_rn(weight, divisor + tl.zeros_like(weight)) - offset
    # Beyond the limit the exact level is of no interest, and huge numbers would not be rounded.
    level = _within(level, 1000.0)
    level = (level + ROUNDER) - ROUNDER + offset
    return _within(level, limit) * step


@triton.jit
def _reach(step, limit, offset):
    reach = tl.where(offset > 0, float("inf"), limit * step * ROOM)
    return tl.where(step > 0, reach, -1.0)


@triton.jit
def _step_gradient(along_level, along_weight, step, offset):
    divisor = tl.where(step > 0, step, 1.0)
    along_weight = tl.where(offset > 0, 0.0, along_weight)
    return tl.where(step > 0, (along_level - along_weight) / divisor, 0.0)


@triton.jit
def _quantise(layers, starts, nums, weights, outs, steps, limits, offsets, SIZE: tl.constexpr):
    unit = tl.program_id(0)
    layer, start, num = tl.load(layers + unit), tl.load(starts + unit), tl.load(nums + unit)
    step, limit, offset = tl.load(steps + unit), tl.load(limits + unit), tl.load(offsets + unit)
    weight_at, out_at = _place(weights, layer, start), _place(outs, layer, start)
    for begin in range(0, num, SIZE):
        at = begin + tl.arange(0, SIZE)
        weight = tl.load(weight_at + at, mask=at < num, other=0.0)
        tl.store(out_at + at, _on_grid(weight, step, limit, offset), mask=at < num)


@triton.jit
def _quantise_backward(
    layers, starts, nums, weights, grads, outs, steps, limits, offsets, grad_steps, SIZE: tl.constexpr
):  # fmt: skip
    unit = tl.program_id(0)
    layer, start, num = tl.load(layers + unit), tl.load(starts + unit), tl.load(nums + unit)
    step, limit, offset = tl.load(steps + unit), tl.load(limits + unit), tl.load(offsets + unit)
    weight_at, grad_at = _place(weights, layer, start), _place(grads, layer, start)
    out_at = _place(outs, layer, start)
    reach = _reach(step, limit, offset)
    along_level = tl.zeros((SIZE,), tl.float32)
    along_weight = tl.zeros((SIZE,), tl.float32)
    for begin in range(0, num, SIZE):
        at = begin + tl.arange(0, SIZE)
        weight = tl.load(weight_at + at, mask=at < num, other=0.0)
        grad = tl.load(grad_at + at, mask=at < num, other=0.0)
        passed = tl.where(tl.abs(weight) > reach, 0.0, grad)
        along_level += grad * _on_grid(weight, step, limit, offset)
        along_weight += passed * weight
        tl.store(out_at + at, passed, mask=at < num)
    total = _step_gradient(tl.sum(along_level), tl.sum(along_weight), step, offset)
    tl.store(grad_steps + unit, total)


@triton.jit
def _mix(
    layers, starts, nums, weights, outs, shares, low_steps, low_limits, low_offsets, high_steps, high_limits,
    high_offsets, SIZE: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(0)
    layer, start, num = tl.load(layers + unit), tl.load(starts + unit), tl.load(nums + unit)
    share = tl.load(shares + unit)
    low_step, low_limit, low_offset = (
        tl.load(low_steps + unit), tl.load(low_limits + unit), tl.load(low_offsets + unit),
    )  # fmt: skip
    high_step, high_limit, high_offset = (
        tl.load(high_steps + unit), tl.load(high_limits + unit), tl.load(high_offsets + unit),
    )  # fmt: skip
    weight_at, out_at = _place(weights, layer, start), _place(outs, layer, start)
    for begin in range(0, num, SIZE):
        at = begin + tl.arange(0, SIZE)
        weight = tl.load(weight_at + at, mask=at < num, other=0.0)
        low = _on_grid(weight, low_step, low_limit, low_offset)
        high = _on_grid(weight, high_step, high_limit, high_offset)
        tl.store(out_at + at, low + share * (high - low), mask=at < num)


@triton.jit
def _mix_backward(
    layers, starts, nums, weights, grads, outs, shares, low_steps, low_limits, low_offsets, high_steps,
    high_limits, high_offsets, grad_shares, grad_lows, grad_highs, SIZE: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(0)
    layer, start, num = tl.load(layers + unit), tl.load(starts + unit), tl.load(nums + unit)
    share = tl.load(shares + unit)
    low_step, low_limit, low_offset = (
        tl.load(low_steps + unit), tl.load(low_limits + unit), tl.load(low_offsets + unit),
    )  # fmt: skip
    high_step, high_limit, high_offset = (
        tl.load(high_steps + unit), tl.load(high_limits + unit), tl.load(high_offsets + unit),
    )  # fmt: skip
    weight_at, grad_at = _place(weights, layer, start), _place(grads, layer, start)
    out_at = _place(outs, layer, start)
    low_reach, high_reach = _reach(low_step, low_limit, low_offset), _reach(high_step, high_limit, high_offset)
    low_level = tl.zeros((SIZE,), tl.float32)
    high_level = tl.zeros((SIZE,), tl.float32)
    low_weight = tl.zeros((SIZE,), tl.float32)
    high_weight = tl.zeros((SIZE,), tl.float32)
    for begin in range(0, num, SIZE):
        at = begin + tl.arange(0, SIZE)
        weight = tl.load(weight_at + at, mask=at < num, other=0.0)
        grad = tl.load(grad_at + at, mask=at < num, other=0.0)
        low_passed = tl.where(tl.abs(weight) > low_reach, 0.0, grad)
        high_passed = tl.where(tl.abs(weight) > high_reach, 0.0, grad)
        low_level += grad * _on_grid(weight, low_step, low_limit, low_offset)
        high_level += grad * _on_grid(weight, high_step, high_limit, high_offset)
        low_weight += low_passed * weight
        high_weight += high_passed * weight
        tl.store(out_at + at, low_passed + share * (high_passed - low_passed), mask=at < num)
    along_low, along_high = tl.sum(low_level), tl.sum(high_level)
    tl.store(grad_shares + unit, along_high - along_low)
    grad_low = _step_gradient(along_low, tl.sum(low_weight), low_step, low_offset)
    grad_high = _step_gradient(along_high, tl.sum(high_weight), high_step, high_offset)
    tl.store(grad_lows + unit, grad_low * (1 - share))
    tl.store(grad_highs + unit, grad_high * share)


KERNELS = {
    "quantise": _quantise,
    "quantise_backward": _quantise_backward,
    "mix": _mix,
    "mix_backward": _mix_backward,
}


def run(
    name: str, blocks: Blocks, layers: Sequence[Sequence[torch.Tensor]], rows: Sequence[torch.Tensor]
) -> None:
    """Run a kernel over all units; arguments as ``at_once_native.run``, of a GPU."""
    kernel: Any = KERNELS[name]
    kernel[(blocks.num_units,)](
        blocks.layer_u,
        blocks.start_u,
        blocks.num_u,
        *blocks.addresses(layers),
        *rows,
        SIZE=WEIGHTS_AT_A_TIME,
    )
