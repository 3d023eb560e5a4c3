"""What a quantised model costs: mean bits and effective bit-operations, counted by parameter."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fqsweep.quant.units import UnitTable

ACTIVATION_BITS = 32
FULL_PRECISION_BITS = 32


def mean_weight_bits(units: UnitTable, bits_u: np.ndarray) -> float:
    """Mean bits per quantised weight: sum n_u b_u / sum n_u."""
    num_weights_u = units.num_weights_u
    return int(num_weights_u @ bits_u.astype(np.int64)) / int(num_weights_u.sum())


def effective_gbops(
    layer_macs: Mapping[str, int], activation_macs: int, units: UnitTable, bits_u: np.ndarray
) -> float:
    """Effective bit-operations of one image, in 1e9.

    A multiply-accumulate with a weight counts weight bits times activation bits; activations are not
    quantised and count 32. Products between activations (attention) count 32 x 32. Norms and other
    elementwise work are left out.

    Args:
        layer_macs: layer name -> multiply-accumulates, every token and position counted.
        activation_macs: multiply-accumulates between activations.
    """
    total = float(activation_macs) * ACTIVATION_BITS * ACTIVATION_BITS
    for layer in units.layers:
        # All units of a layer do the same number of operations.
        mean_bits = float(np.mean(bits_u[layer.start : layer.stop]))
        total += layer_macs.get(layer.name, 0) * mean_bits * ACTIVATION_BITS
    return total / 1e9
