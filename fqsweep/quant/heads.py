"""Dropped channels of attention: which queries, keys, values and heads can leave, exactly.

- A value channel of zeros is its bias for every token, and attention weights sum to one: its contribution is a
  constant behind the projection, folded into the projection's bias. A value that the projection does not read leaves.
- A key channel of zeros adds the same to a query's product with every key, which softmax does not see: the
  channel leaves from queries and keys. A query channel of zeros leaves only where its bias is zero too.
- A head whose values all leave has nothing to say and leaves whole.

Heads keep equal numbers of channels, as the layers' own reshaping asks: the largest number that a head needs; the
others fill up with channels that could have left. Fewer query channels change the scale 1/sqrt(dim) of the
product, so queries are multiplied by the square root of the ratio: through their steps, so that they stay on
their grids.

Axes: h heads, d channels of a head, r rows of a layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fqsweep.quant.levels import limits_of, round_to_levels
from fqsweep.quant.packing import HeadShape, UnpackedWeights

PLAIN, WINDOWED = "timm.layers.attention.Attention", "timm.models.tiny_vit.Attention"


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Where rows of queries, keys and values lie in the layer ``qkv``: (h, d) each."""

    shape: HeadShape
    query_hd: torch.Tensor
    key_hd: torch.Tensor
    value_hd: torch.Tensor
    has_equal_dims: bool


def class_path(module: nn.Module) -> str:
    """Module and name of an object's class."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def find_attention(model: nn.Module) -> dict[str, Attention]:
    """The attention layers of known classes, by name; others keep all their channels."""
    found = {}
    for name, module in model.named_modules():
        if class_path(module) == PLAIN and _is_bare(module):
            found[name] = _plain_layout(HeadShape(module.num_heads, module.head_dim, module.head_dim))
        elif class_path(module) == WINDOWED:
            found[name] = _windowed_layout(HeadShape(module.num_heads, module.key_dim, module.val_dim))
    return found


def _is_bare(module: Any) -> bool:
    """Nothing stands between rows of ``qkv``, the product and the projection (as timm has it since 1.0.20)."""
    between = [getattr(module, part, None) for part in ("q_norm", "k_norm", "norm")]
    is_free = all(isinstance(part, nn.Identity) for part in between)
    return is_free and hasattr(module, "attn_dim") and getattr(module, "gate", None) is None


def _plain_layout(shape: HeadShape) -> Attention:
    """Rows in the order (query, key, value), heads, channels."""
    rows = torch.arange(3 * shape.num_heads * shape.key_dim).view(3, shape.num_heads, shape.key_dim)
    return Attention(shape=shape, query_hd=rows[0], key_hd=rows[1], value_hd=rows[2], has_equal_dims=True)


def _windowed_layout(shape: HeadShape) -> Attention:
    """Rows in the order heads, (query, key, value), channels."""
    sizes = [shape.key_dim, shape.key_dim, shape.value_dim]
    rows = torch.arange(shape.num_heads * sum(sizes)).view(shape.num_heads, sum(sizes))
    query_hd, key_hd, value_hd = rows.split(sizes, dim=1)
    return Attention(shape=shape, query_hd=query_hd, key_hd=key_hd, value_hd=value_hd, has_equal_dims=False)


def set_head_shape(module: Any, shape: HeadShape) -> None:
    """Make an attention layer of a known class split its rows in this way, in place."""
    module.num_heads = shape.num_heads
    module.scale = shape.key_dim**-0.5
    if class_path(module) == WINDOWED:
        module.key_dim, module.val_dim = shape.key_dim, shape.value_dim
        module.out_dim = shape.num_heads * shape.value_dim
    else:
        module.head_dim, module.attn_dim = shape.key_dim, shape.num_heads * shape.key_dim


def remove_head_channels(state: UnpackedWeights, name: str, attention: Attention) -> HeadShape | None:
    """Take out what can leave one attention layer, in place; None where nothing can."""
    shape = attention.shape
    needs_value_hd, is_constant_hd = _needed_values(state, name, attention)
    heads = needs_value_hd.any(dim=1).nonzero()[:, 0]
    if not len(heads):
        heads = torch.zeros(1, dtype=torch.long)
    needs_key_hd = _needed_keys(state, name, attention)
    key_dim = max(1, int(needs_key_hd[heads].sum(dim=1).max()))
    value_dim = max(1, int(needs_value_hd[heads].sum(dim=1).max()))
    if attention.has_equal_dims:
        key_dim = value_dim = max(key_dim, value_dim)
    small = HeadShape(len(heads), key_dim, value_dim)
    if small == shape:
        return None
    key_pick = _pick(needs_key_hd, heads, key_dim)
    value_pick = _pick(needs_value_hd, heads, value_dim)
    stays_hd = torch.zeros_like(needs_value_hd)
    stays_hd[heads[:, None], value_pick] = True
    _fold_values(state, name, attention, is_constant_hd & ~stays_hd)
    _scale_queries(state, name, attention, math.sqrt(key_dim / shape.key_dim))
    picked = [
        rows_hd[heads[:, None], pick]
        for rows_hd, pick in (
            (attention.query_hd, key_pick),
            (attention.key_hd, key_pick),
            (attention.value_hd, value_pick),
        )
    ]
    # Heads come first in the windowed order, last but one in the plain one.
    rows = torch.stack(picked).flatten() if attention.has_equal_dims else torch.cat(picked, dim=1).flatten()
    state.keep_rows(f"{name}.qkv", rows)
    columns = (heads[:, None] * shape.value_dim + value_pick).flatten()
    state[f"{name}.proj.weight"] = state[f"{name}.proj.weight"][:, columns].contiguous()
    if f"{name}.attention_biases" in state:
        state[f"{name}.attention_biases"] = state[f"{name}.attention_biases"][heads].contiguous()
    return small


def _needed_values(
    state: UnpackedWeights, name: str, attention: Attention
) -> tuple[torch.Tensor, torch.Tensor]:
    """Value channels that say something, and those that are constant: bool (h, d)."""
    is_constant_hd = _is_zero(state, name, attention.value_hd)
    projection = state[f"{name}.proj.weight"]
    is_read_hd = projection.ne(0).any(dim=0).view(attention.value_hd.shape)
    return is_read_hd & ~is_constant_hd, is_constant_hd


def _needed_keys(state: UnpackedWeights, name: str, attention: Attention) -> torch.Tensor:
    """Query and key channels whose product softmax sees, bool (h, d)."""
    bits_u = state.bits.get(f"{name}.qkv.weight")
    if bits_u is not None and len(bits_u) != len(state[f"{name}.qkv.weight"]):
        # One step for the whole layer: queries cannot be scaled by themselves.
        return torch.ones_like(attention.key_hd, dtype=torch.bool)
    is_silent_hd = _is_zero(state, name, attention.query_hd)
    bias = state.get(f"{name}.qkv.bias")
    if bias is not None:
        is_silent_hd = is_silent_hd & bias[attention.query_hd].eq(0)
    return ~(is_silent_hd | _is_zero(state, name, attention.key_hd))


def _is_zero(state: UnpackedWeights, name: str, rows_hd: torch.Tensor) -> torch.Tensor:
    return state[f"{name}.qkv.weight"].eq(0).all(dim=1)[rows_hd]


def _pick(needed_hd: torch.Tensor, heads: torch.Tensor, count: int) -> torch.Tensor:
    """For each head that stays its needed channels, filled up to ``count``, in ascending order: (heads, count)."""
    needed_first = torch.argsort(needed_hd[heads].int(), dim=1, descending=True, stable=True)
    return needed_first[:, :count].sort(dim=1).values


def _fold_values(state: UnpackedWeights, name: str, attention: Attention, leaves_hd: torch.Tensor) -> None:
    """Add what constant values that leave contribute to the projection's bias."""
    bias = state.get(f"{name}.qkv.bias")
    if bias is None or not leaves_hd.any():
        return
    value_c = torch.where(leaves_hd, bias[attention.value_hd].double(), 0.0).flatten()
    weight = state[f"{name}.proj.weight"]
    shift_r = weight.double() @ value_c
    before = state.get(f"{name}.proj.bias")
    state[f"{name}.proj.bias"] = (shift_r if before is None else shift_r + before.double()).to(weight.dtype)


def _scale_queries(state: UnpackedWeights, name: str, attention: Attention, factor: float) -> None:
    if factor == 1.0:
        return
    rows = attention.query_hd.flatten()
    key = f"{name}.qkv.weight"
    weight = state[key].clone()
    if key in state.bits:
        step_u1 = torch.from_numpy(state.steps[key])[rows][:, None]
        limits = limits_of(torch.from_numpy(state.bits[key].astype("int64"))[rows])
        level_un = round_to_levels(weight[rows].float(), step_u1, *limits)
        steps = state.steps[key].copy()
        steps[rows.numpy()] *= factor
        state.steps[key] = steps
        weight[rows] = (level_un * torch.from_numpy(steps)[rows][:, None]).to(weight.dtype)
    else:
        weight[rows] *= factor
    state[key] = weight
    if f"{name}.qkv.bias" in state:
        bias = state[f"{name}.qkv.bias"].clone()
        bias[rows] *= factor
        state[f"{name}.qkv.bias"] = bias
