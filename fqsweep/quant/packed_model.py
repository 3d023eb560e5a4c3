"""A packed file as a network that can be used, and the same file without its dropped channels."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
from torch import nn

from fqsweep.models import Normalisation, build_untrained
from fqsweep.quant.packing import (
    CHECKSUM,
    REMOVED,
    PackedFileError,
    UnpackedWeights,
    read_metadata,
    stored_shapes,
    unpack_weights,
)
from fqsweep.quant.removal import Removable, find_removable, load_weights, remove_dropped_channels

NOTES = ("architecture", "image_size", "classes", "normalisation")
LARGEST_IMAGE = 4096


@dataclass(frozen=True, kw_only=True)
class ModelNotes:
    """What a packed file says of its network.

    Attributes:
        image_size: pixels of a square image; ``normalisation``: for pixels in [0, 1], RGB.
    """

    architecture: str
    image_size: int
    class_names: tuple[str, ...]
    normalisation: Normalisation


def read_notes(metadata: Mapping[str, str]) -> ModelNotes:
    """The notes in a packed file's metadata.

    Raises:
        PackedFileError: the file holds weights without saying which network they belong to.
    """
    missing = [name for name in NOTES if name not in metadata]
    if missing:
        raise PackedFileError(
            f"the packed file does not say its {', '.join(missing)}: it was not written by a trial of fqsweep"
        )
    try:
        normalisation: dict[str, Any] = json.loads(metadata["normalisation"])
        notes = ModelNotes(
            architecture=metadata["architecture"],
            image_size=int(metadata["image_size"]),
            class_names=tuple(json.loads(metadata["classes"])),
            normalisation=Normalisation(mean=tuple(normalisation["mean"]), std=tuple(normalisation["std"])),
        )
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise PackedFileError(f"damaged packed model: its notes cannot be read ({error})") from error
    if not 0 < notes.image_size <= LARGEST_IMAGE:
        raise PackedFileError(f"damaged packed model: it takes images of {notes.image_size} px")
    channels = (*notes.normalisation.mean, *notes.normalisation.std)
    scales = all(isinstance(value, int | float) and math.isfinite(value) for value in channels)
    if not scales or len(channels) != 6 or min(notes.normalisation.std) <= 0:
        raise PackedFileError("damaged packed model: its normalisation is not of three channels")
    if not notes.class_names or not all(isinstance(name, str) for name in notes.class_names):
        raise PackedFileError("damaged packed model: it names no classes")
    return notes


def _untrained(notes: ModelNotes, metadata: Mapping[str, str]) -> nn.Module:
    """The network of the notes, which the file's layers fit.

    Raises:
        PackedFileError: a layer is none of the network's, or larger: nothing is made of the size that a file names.
    """
    network = build_untrained(
        notes.architecture, num_classes=len(notes.class_names), image_size=notes.image_size
    )
    sizes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    for name, shape in stored_shapes(metadata).items():
        own = sizes.get(name, ())
        if len(shape) != len(own) or any(given > whole for given, whole in zip(shape, own, strict=True)):
            raise PackedFileError(
                f"damaged packed model: {name} of shape {list(shape)} does not fit {notes.architecture} ({list(own)})"
            )
    return network


def load_model(blob: bytes) -> nn.Module:
    """The network in a packed file, whole or without its dropped channels, on the CPU in eval mode.

    Nothing but the file is needed.

    Raises:
        PackedFileError: the file cannot be read or does not say what it holds.
        InputError: this timm does not know the architecture.
    """
    metadata = read_metadata(blob)
    notes = read_notes(metadata)
    network = _untrained(notes, metadata)
    try:
        return load_weights(network, unpack_weights(blob))
    except (RuntimeError, LookupError) as error:
        first = str(error).splitlines()[0]
        raise PackedFileError(
            f"damaged packed model: its weights do not fit {notes.architecture}: {first}"
        ) from error


def shrink(blob: bytes) -> bytes:
    """The packed file of the same network without its dropped channels; as given where nothing is gained.

    The mean bits per weight of the whole network are noted as ``whole_mean_bits``: those that are left have more
    bits each, but fewer in all.

    Raises:
        PackedFileError: as ``load_model``.
        RemovalError: the smaller network does not compute the same; nothing is returned.
    """
    metadata = read_metadata(blob)
    notes = read_notes(metadata)
    state = unpack_weights(blob)
    build = partial(_untrained, notes, metadata)
    removable = removable_channels(notes)
    small = remove_dropped_channels(state, build, image_size=notes.image_size, removable=removable)
    if count_values(small) == count_values(state):
        return blob
    del metadata[CHECKSUM]
    return min(small.pack({**metadata, REMOVED: f"{mean_bits(state):.6g}"}), blob, key=len)


@lru_cache(maxsize=8)
def removable_channels(notes: ModelNotes) -> Removable:
    """Traced once a process: a sweep has many trials of one network."""
    return find_removable(partial(_untrained, notes, {}), image_size=notes.image_size)


def count_values(state: UnpackedWeights) -> int:
    """Numbers of all kinds in a network's weights."""
    return sum(tensor.numel() for tensor in state.values())


def mean_bits(state: UnpackedWeights) -> float:
    """Mean bits per quantised weight; 32 where nothing is quantised."""
    spent = sum(
        int(bits_u.astype(np.int64).sum()) * (state[name].numel() // len(bits_u))
        for name, bits_u in state.bits.items()
    )
    count = sum(state[name].numel() for name in state.bits)
    return spent / count if count else 32.0
