"""What a packed file can hold at most once dropped channels have left, known before anything is trained.

Which channels leave depends on the bits, and what they leave behind on values that training changes: a constant that
an activation makes 0 leaves without a trace, another one may stay as a column of floats. Here every constant is one
that counts and every weight of 1 bit or more is not 0, so that the file of a network trained with these bits is no
larger.

Axes: u units.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from fqsweep.quant.packed_model import read_notes, removable_channels
from fqsweep.quant.packing import REMOVED, UnpackedWeights
from fqsweep.quant.removal import FLOAT_BITS, take_out_channels
from fqsweep.quant.units import UnitTable

# What training can add to the header: a merged column, or a bias that takes up constants.
NEW_ENTRY_BYTES = 128
# What a channel without codes takes: four entries of a norm, a bias, half a byte for its width.
EMPTY_CHANNEL_BYTES = 21


@dataclass(frozen=True, kw_only=True)
class Remainder:
    """What is left of a network for given bits.

    Attributes:
        most_bytes: the packed file is no larger, whatever the weights become.
        counted_u: int64 (u,), what a bit of each unit counts in the file: the weights whose codes it holds, 1 where
            a unit leaves although it has bits, and all its weights where it is dropped.
    """

    most_bytes: int
    counted_u: np.ndarray


def bound_remainder(
    tensors: Mapping[str, torch.Tensor], units: UnitTable, bits_u: np.ndarray, *, metadata: Mapping[str, str]
) -> Remainder:
    """What a packed file holds for these bits, counted by packing a network that keeps as much as any can.

    Args:
        tensors: a state dict of the plain model.
        metadata: what will be noted in the file; it names the network.

    Raises:
        PackedFileError: the metadata do not name a network.
    """
    whole = _keeping_most(tensors, units, bits_u)
    small = take_out_channels(whole, removable_channels(read_notes(metadata)))
    blob = small.pack({**metadata, REMOVED: f"{1 / 3:.6g}"})
    counted_u = units.num_weights_u
    for layer in units.layers:
        key = f"{layer.name}.weight"
        left = layer.start + small.numbers[key]
        gone = np.setdiff1d(np.flatnonzero(bits_u[layer.start : layer.stop]) + layer.start, left)
        counted_u[left] = np.where(bits_u[left] > 0, _coded_weights(small, key), layer.num_weights)
        counted_u[gone] = 1
    unmerged = sum(_unmerged_bytes(small, key) for key in small.float_columns)
    return Remainder(most_bytes=len(blob) + unmerged + NEW_ENTRY_BYTES, counted_u=counted_u)


def _keeping_most(tensors: Mapping[str, torch.Tensor], units: UnitTable, bits_u: np.ndarray) -> UnpackedWeights:
    """Weights of 1, on grids of these bits, behind norms that hand on 1: nothing cancels, and no constant is 0."""
    state = UnpackedWeights()
    for name, tensor in tensors.items():
        counts = tensor.is_floating_point() and not name.endswith("running_mean")
        state[name] = torch.full_like(tensor, int(counts), device="cpu")
    for name, own_u in units.split(bits_u).items():
        key = f"{name}.weight"
        step_u = np.where(own_u == 1, 2.0, 1.0).astype(np.float32)  # the levels of 1 bit are halves
        shape = (-1, *[1] * (state[key].ndim - 1))
        state[key] = state[key] * torch.from_numpy(own_u > 0).view(shape)
        state.bits[key], state.steps[key] = own_u.astype(np.uint8), step_u
        state.numbers[key] = np.arange(len(own_u))
    return state


def _coded_weights(small: UnpackedWeights, key: str) -> int:
    """Weights of one unit that lie in codes."""
    num_columns = small[key].shape[1] - small.float_columns.get(key, 0)
    return small[key][:, :num_columns].numel() // len(small.bits[key])


def _unmerged_bytes(small: UnpackedWeights, key: str) -> int:
    """What channels take by themselves that are constants but too few to be merged."""
    bits_u = small.bits[key].astype(np.int64)
    most = FLOAT_BITS * int((bits_u > 0).sum()) // max(int(bits_u.sum()), 1)
    return most * EMPTY_CHANNEL_BYTES
