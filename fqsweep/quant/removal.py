"""Dropped channels leave the network: the same logits from smaller layers.

A unit of 0 bits is a row of zeros: its channel is a constant (bias, then norm and activation). Within a chain
(``chains``) and within attention (``heads``) such channels are taken out, with the rows, norm entries and columns
that fed or read only them:

- The constants that leave are folded into the next layer's bias, or into the mean of its batch norm.
- A convolution that pads its input with zeros sees a border in a constant channel, which no bias can say. There
  all constant channels become one: the contributions c_k W[:, k] of K channels are those of a single channel of
  value c_m with the column sum_k (c_k / c_m) W[:, k]. That column lies on no grid and is stored in float32, for
  rows that are not dropped, so the merger is done only where it is smaller than the columns that it replaces.
- A channel that no row of the next layers reads (columns of zeros) leaves whatever it computes.
- A constant that enters a padded depthwise convolution gives a map and not a constant: it stays.
- Every layer keeps at least one channel. Dropped rows that feed a residual sum stay as rows of zeros.

A network without chains comes back as it was, and nothing comes back before the logits of both were compared.

Axes: c channels of a chain, r rows (output channels) of a layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fqsweep.quant.chains import Chain, Consumer, Depthwise, Norm, find_chains
from fqsweep.quant.heads import Attention, find_attention, remove_head_channels
from fqsweep.quant.packing import UnpackedWeights
from fqsweep.quant.resizing import fit_layers

TOLERANCE = 1e-5
NORM_ENTRIES = ("weight", "bias", "running_mean", "running_var")
FLOAT_BITS = 32
VERIFICATION_IMAGES = 2


class RemovalError(RuntimeError):
    """The smaller network does not compute what the whole one does: a fault of fqsweep."""


@dataclass(frozen=True, kw_only=True)
class Removable:
    """Where channels of a network can leave; the same for all its weights."""

    chains: tuple[Chain, ...]
    attention: Mapping[str, Attention]


def find_removable(build: Callable[[], nn.Module], *, image_size: int) -> Removable:
    """Trace the network once; arguments as in ``remove_dropped_channels``."""
    return Removable(
        attention=find_attention(build()), chains=tuple(find_chains(build().eval(), image_size=image_size))
    )


def remove_dropped_channels(
    state: UnpackedWeights,
    build: Callable[[], nn.Module],
    *,
    image_size: int,
    removable: Removable | None = None,
) -> UnpackedWeights:
    """Weights of a smaller network with the same logits; ``resizing.fit_layers`` makes the network fit them.

    Args:
        state: all weights of the network, with bits and steps of the quantised ones; left as it is.
        build: the untrained network that these weights belong to.
        image_size: pixels.
        removable: what ``find_removable`` says of the network, where it was asked before.

    Returns:
        Smaller weights with their ``bits``, ``steps``, ``float_columns`` and ``heads``; equal to ``state`` where
        nothing can leave, or where channels were removed before.

    Raises:
        RemovalError: the smaller network does not run, or its logits on seeded random images differ by more than
            1e-5 of the largest one (or of 1).
    """
    if state.float_columns or state.heads:
        return state
    small = take_out_channels(state, removable or find_removable(build, image_size=image_size))
    _compare(state, small, build, image_size)
    return small


def take_out_channels(state: UnpackedWeights, removable: Removable) -> UnpackedWeights:
    """``remove_dropped_channels`` without the comparison of logits; the given state is left as it is."""
    small = state.copy()
    # From the output backwards: what a later layer stops reading can leave an earlier one.
    for chain in reversed(removable.chains):
        _shorten(small, chain)
    for name, attention in removable.attention.items():
        shape = remove_head_channels(small, name, attention)
        if shape is not None:
            small.heads[name] = shape
    return small


def _compare(
    state: UnpackedWeights, small: UnpackedWeights, build: Callable[[], nn.Module], image_size: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(VERIFICATION_IMAGES, 3, image_size, image_size, generator=generator).double()
    network = build()
    with torch.no_grad():
        whole = load_weights(copy.deepcopy(network), state).double()(images)
        try:
            shrunk = load_weights(network, small).double()(images)
        except RuntimeError as refusal:
            raise RemovalError(f"the network's own code does not take fewer channels: {refusal}") from refusal
    error = float((whole - shrunk).abs().max())
    # Written so that an error that is not a number fails too.
    if not error <= TOLERANCE * max(1.0, float(whole.abs().max())):
        raise RemovalError(
            f"the network without its dropped channels has other logits (by {error:.1e}): this is a fault of "
            "fqsweep"
        )


def load_weights(model: nn.Module, state: UnpackedWeights) -> nn.Module:
    """The network with these weights, in eval mode; its layers take their shapes. The model is changed in place."""
    fit_layers(model, state, heads=state.heads)
    model.load_state_dict(dict(state))
    return model.eval()


# --- one chain -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Channels:
    """What the consumers see: which channels are constant, and their values (float64; 0 where not constant)."""

    is_constant_c: torch.Tensor
    value_c: torch.Tensor


def _shorten(state: UnpackedWeights, chain: Chain) -> None:
    seen = _look_through(state, chain)
    is_unread_c = _unread(state, chain)
    is_silent_c = is_unread_c | (seen.is_constant_c & (seen.value_c == 0))
    speaks_c = seen.is_constant_c & ~is_silent_c
    if any(consumer.is_padded for consumer in chain.consumers):
        folded = torch.zeros(0, dtype=torch.long)
        merged = speaks_c.nonzero()[:, 0]
        if len(merged) < 2 or not _merger_pays(state, chain.consumers, len(merged)):
            merged = merged[:0]
    else:
        folded, merged = speaks_c.nonzero()[:, 0], torch.zeros(0, dtype=torch.long)
    leaves_c = is_silent_c.clone()
    leaves_c[folded] = leaves_c[merged] = True
    if bool(leaves_c.all()) and not len(merged):
        leaves_c[0] = False
        folded = folded[folded != 0]
    if not leaves_c.any():
        return
    kept = (~leaves_c).nonzero()[:, 0]
    for consumer in chain.consumers:
        _fold(state, consumer, folded, seen.value_c[folded])
        _keep_columns(state, consumer.name, kept, merged, seen.value_c[merged])
    if len(merged):
        kept = torch.cat([kept, merged[_loudest(seen.value_c[merged])][None]])
    state.keep_rows(chain.producer, kept)
    for step in chain.steps:
        if isinstance(step, Depthwise):
            state.keep_rows(step.name, kept)
        elif isinstance(step, Norm):
            _keep_entries(state, [f"{step.name}.{entry}" for entry in NORM_ENTRIES], kept)


def _look_through(state: UnpackedWeights, chain: Chain) -> _Channels:
    """Follow the channels of dropped rows through the chain."""
    is_constant_c, value_c = _rows_of(state, chain.producer)
    for step in chain.steps:
        if isinstance(step, Norm):
            value_c = _normalise(state, step, value_c)
        elif isinstance(step, Depthwise):
            is_dropped_c, bias_c = _rows_of(state, step.name)
            gain_c = state[f"{step.name}.weight"].double().sum(dim=(1, 2, 3))
            # Zeros and constants without a border stay constant; a dropped filter makes one of anything.
            passes_c = is_constant_c & ((value_c == 0) if step.is_padded else torch.ones_like(is_constant_c))
            is_constant_c = is_dropped_c | passes_c
            value_c = bias_c + gain_c * value_c
        else:
            value_c = step.apply(value_c)
        value_c = torch.where(is_constant_c, value_c, 0.0)
    return _Channels(is_constant_c=is_constant_c, value_c=value_c)


def _rows_of(state: UnpackedWeights, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows of a layer are zeros, bool (r,), and its biases, float64 (r,)."""
    weight = state[f"{name}.weight"]
    bias = state.get(f"{name}.bias")
    bias_r = torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias.double()
    return weight.flatten(1).eq(0).all(dim=1), bias_r


def _normalise(state: UnpackedWeights, norm: Norm, value_c: torch.Tensor) -> torch.Tensor:
    mean_c, variance_c = (state[f"{norm.name}.{entry}"].double() for entry in ("running_mean", "running_var"))
    value_c = (value_c - mean_c) / (variance_c + norm.eps).sqrt()
    if f"{norm.name}.weight" in state:
        value_c = value_c * state[f"{norm.name}.weight"].double() + state[f"{norm.name}.bias"].double()
    return value_c


def _unread(state: UnpackedWeights, chain: Chain) -> torch.Tensor:
    """Channels whose columns are zeros in every consumer, bool (c,)."""
    weights = [state[f"{consumer.name}.weight"] for consumer in chain.consumers]
    return torch.stack([w.transpose(0, 1).flatten(1).eq(0).all(dim=1) for w in weights]).all(dim=0)


def _merger_pays(state: UnpackedWeights, consumers: Sequence[Consumer], num_columns: int) -> bool:
    """Whether float32 columns, one a consumer, of the rows in use take less room than those they stand for."""
    saved = 0
    for consumer in consumers:
        weight = state[f"{consumer.name}.weight"]
        bits_u = state.bits.get(f"{consumer.name}.weight", np.array([FLOAT_BITS]))
        coded = num_columns * int(bits_u.astype(np.int64).sum()) - FLOAT_BITS * int((bits_u > 0).sum())
        saved += coded * (weight[:, 0].numel() // len(bits_u))
    return saved > 0


def _loudest(value_c: torch.Tensor) -> torch.Tensor:
    """The constant to divide by: the largest."""
    return value_c.abs().argmax()


def _fold(state: UnpackedWeights, consumer: Consumer, channels: torch.Tensor, value_c: torch.Tensor) -> None:
    """Add what these constant channels contribute to the consumer's norm or bias."""
    column_rc = state[f"{consumer.name}.weight"][:, channels].double()
    shift_r = column_rc.flatten(2).sum(dim=2) @ value_c if column_rc.ndim > 2 else column_rc @ value_c
    if not shift_r.any():
        return
    if consumer.norm is not None:
        mean = state[f"{consumer.norm}.running_mean"]
        state[f"{consumer.norm}.running_mean"] = (mean.double() - shift_r).to(mean.dtype)
        return
    _, bias_r = _rows_of(state, consumer.name)
    state[f"{consumer.name}.bias"] = (bias_r + shift_r).to(state[f"{consumer.name}.weight"].dtype)


def _keep_columns(
    state: UnpackedWeights, name: str, kept: torch.Tensor, merged: torch.Tensor, value_c: torch.Tensor
) -> None:
    """Keep some input channels of a layer, and the merged ones as one last column."""
    key = f"{name}.weight"
    weight = state[key]
    columns = weight[:, kept]
    if len(merged):
        share_c = value_c / value_c[_loudest(value_c)]
        merger = torch.einsum("rc...,c->r...", weight[:, merged].double(), share_c)
        columns = torch.cat([columns, merger[:, None].to(weight.dtype)], dim=1)
        if key in state.bits:
            state.float_columns[key] = 1
    state[key] = columns.contiguous()


def _keep_entries(state: UnpackedWeights, keys: list[str], kept: torch.Tensor) -> None:
    for key in keys:
        if key in state:
            state[key] = state[key][kept].contiguous()
