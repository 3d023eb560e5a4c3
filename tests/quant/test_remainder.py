"""What a file holds at most once dropped channels have left: never less than it really holds, and hardly more."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fqsweep.quant import fake_quantize
from fqsweep.quant.packed_model import shrink
from fqsweep.quant.packing import UnpackedWeights, pack_weights, unpack_weights
from fqsweep.quant.remainder import bound_remainder
from fqsweep.quant.units import LayerUnits, UnitTable
from tests.quant.packed_networks import SIZE_BY_NAME, notes_of, packed_network


def units_of(state: UnpackedWeights) -> tuple[UnitTable, np.ndarray]:
    """The units of a network, and their bits."""
    layers, start = [], 0
    for key, bits_u in state.bits.items():
        num_weights = state[key].numel() // len(bits_u)
        name, stop = key.removesuffix(".weight"), start + len(bits_u)
        layers.append(LayerUnits(name=name, start=start, stop=stop, num_weights=num_weights))
        start = stop
    return UnitTable(tuple(layers)), np.concatenate(list(state.bits.values())).astype(np.int64)


def coded_bits(blob: bytes) -> int:
    state = unpack_weights(blob)
    units, bits_u = units_of(state)
    floats = sum(
        count * state[key][:, 0].numel() // len(state.bits[key]) * int(state.bits[key].astype(int).sum())
        for key, count in state.float_columns.items()
    )
    return int(units.num_weights_u @ bits_u) - floats


@pytest.mark.parametrize("drop_frac", [0.1, 0.6, 0.95])
@pytest.mark.parametrize("name", SIZE_BY_NAME)
def test_no_file_is_larger_than_the_bound_and_the_bound_is_near(name: str, drop_frac: float) -> None:
    whole = packed_network(name, drop_frac=drop_frac)
    units, bits_u = units_of(unpack_weights(whole))
    found = bound_remainder(unpack_weights(whole), units, bits_u, metadata=notes_of(name, SIZE_BY_NAME[name]))
    small = shrink(whole)
    assert len(small) <= found.most_bytes <= len(small) * (1.002 if drop_frac < 0.9 else 1.02)
    assert int(found.num_weights_u @ bits_u) == pytest.approx(coded_bits(small), rel=0.004)


@pytest.mark.parametrize("name", ["resnet18", "deit_tiny_patch16_224", "tiny_vit_5m_224"])
def test_the_bound_holds_for_other_widths_of_the_same_channels_that_count_no_more(name: str) -> None:
    state = unpack_weights(packed_network(name, drop_frac=0.6, widths=(3, 4, 5)))
    units, bits_u = units_of(state)
    metadata = notes_of(name, SIZE_BY_NAME[name])
    bound = bound_remainder(state, units, bits_u, metadata=metadata)
    generator = np.random.default_rng(3)
    # From units that leave, or have fewer weights in the file than in the network, to all others: the worst case.
    gains_u = np.where(bound.num_weights_u == units.num_weights_u, generator.integers(0, 4, len(bits_u)), -2)
    other_u = np.where(bits_u > 0, (bits_u + gains_u).clip(1, 8), 0)
    order = generator.permutation(np.flatnonzero(other_u > 1))
    for unit in np.concatenate([order, order, order]):
        if bound.num_weights_u @ other_u <= bound.num_weights_u @ bits_u:
            break
        other_u[unit] = max(other_u[unit] - 1, 1)
    assert bound.num_weights_u @ other_u <= bound.num_weights_u @ bits_u
    assert (other_u != bits_u).any() and ((other_u > 0) == (bits_u > 0)).all()
    for layer_name, own_u in units.split(other_u).items():
        weight = state[f"{layer_name}.weight"]
        rows = [fake_quantize(row.reshape(1, -1), int(b)) for row, b in zip(weight, own_u, strict=True)]
        state[f"{layer_name}.weight"] = torch.cat(rows).view_as(weight)
    bits = {f"{layer_name}.weight": own_u for layer_name, own_u in units.split(other_u).items()}
    assert len(shrink(pack_weights(state, bits, metadata=metadata))) <= bound.most_bytes
