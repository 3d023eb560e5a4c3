"""What a quantised model costs: mean bits and effective bit-operations, counted by parameter."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from fqsweep.quant.packing import pack_weights
from fqsweep.quant.units import UnitTable

ACTIVATION_BITS = 32
FULL_PRECISION_BITS = 32
# A header entry such as "codes.8":{"dtype":"U8","shape":[11000000],"data_offsets":[11000000,22000000]}, the byte
# to which its codes are rounded up, and longer offsets of the tensors behind it.
CODE_ENTRY_BYTES = 128
NUM_CODE_ENTRIES = 8


def mean_weight_bits(units: UnitTable, bits_u: np.ndarray) -> float:
    """Mean bits per quantised weight: sum n_u b_u / sum n_u."""
    num_weights_u = units.num_weights_u
    return int(num_weights_u @ bits_u.astype(np.int64)) / int(num_weights_u.sum())


def effective_gbops(
    layer_macs: Mapping[str, int], activation_macs: int, units: UnitTable, bits_u: np.ndarray
) -> float:
    """Effective bit-operations of one image, in 1e9.

    A multiply-accumulate with a weight counts weight bits times activation bits; activations are not
    quantised and count 32, and so do weights that are in no unit (exempt layers). Products between activations
    (attention) count 32 x 32. Norms and other elementwise work are left out.

    Args:
        layer_macs: layer name -> multiply-accumulates, every token and position counted.
        activation_macs: multiply-accumulates between activations.
    """
    total = float(activation_macs) * ACTIVATION_BITS * ACTIVATION_BITS
    quantised = {layer.name for layer in units.layers}
    exempt_macs = sum(macs for name, macs in layer_macs.items() if name not in quantised)
    total += float(exempt_macs) * FULL_PRECISION_BITS * ACTIVATION_BITS
    for layer in units.layers:
        # All units of a layer do the same number of operations.
        mean_bits = float(np.mean(bits_u[layer.start : layer.stop]))
        total += layer_macs.get(layer.name, 0) * mean_bits * ACTIVATION_BITS
    return total / 1e9


def fixed_packed_bytes(
    tensors: Mapping[str, torch.Tensor], units: UnitTable, *, metadata: Mapping[str, str]
) -> int:
    """Bytes of a packed file that do not depend on the bits, rounded up: all but codes and steps.

    Measured by packing the model with every unit dropped; the header's entries for codes, which such a file
    lacks, are added at their longest.

    Args:
        tensors: a state dict of the plain model.
        metadata: what will be noted in the file.
    """
    dropped = {f"{layer.name}.weight": np.zeros(layer.num_units, dtype=np.int64) for layer in units.layers}
    blob = pack_weights({name: t.cpu() for name, t in tensors.items()}, dropped, metadata=dict(metadata))
    return len(blob) + NUM_CODE_ENTRIES * CODE_ENTRY_BYTES
