"""What a file holds at most once dropped channels have left: never less than it really holds, and hardly more."""

from __future__ import annotations

import numpy as np
import pytest

from fqsweep.quant.packed_model import shrink
from fqsweep.quant.packing import UnpackedWeights, unpack_weights
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


@pytest.mark.parametrize(
    ("name", "drop_frac"),
    [(name, 0.6) for name in SIZE_BY_NAME] + [("resnet18", 0.1), ("resnet18", 0.95), ("tiny_vit_5m_224", 0.95)],
)
def test_no_file_is_larger_than_the_bound_and_the_bound_is_near(name: str, drop_frac: float) -> None:
    whole = packed_network(name, drop_frac=drop_frac)
    units, bits_u = units_of(unpack_weights(whole))
    found = bound_remainder(unpack_weights(whole), units, bits_u, metadata=notes_of(name, SIZE_BY_NAME[name]))
    small = shrink(whole)
    assert len(small) <= found.most_bytes <= len(small) * (1.002 if drop_frac < 0.9 else 1.02)
    assert int(found.counted_u @ bits_u) == pytest.approx(coded_bits(small), rel=0.004)


@pytest.mark.parametrize("name", ["resnet18", "deit_tiny_patch16_224", "tiny_vit_5m_224"])
def test_what_a_unit_counts_is_what_a_bit_of_it_adds_to_the_file(name: str) -> None:
    state = unpack_weights(packed_network(name, drop_frac=0.6, widths=(3, 4, 5)))
    units, bits_u = units_of(state)
    metadata = notes_of(name, SIZE_BY_NAME[name])
    before = bound_remainder(state, units, bits_u, metadata=metadata)
    # Bits for units that have all their weights in the file, from those that have few or leave.
    is_whole_u = before.counted_u == units.num_weights_u
    other_u = np.where(bits_u > 0, bits_u + np.where(is_whole_u, 2, -1), 0)
    after = bound_remainder(state, units, other_u, metadata=metadata)
    added = int(before.counted_u @ (other_u - bits_u)) / 8
    assert abs(added) > 0.05 * before.most_bytes
    assert after.most_bytes - before.most_bytes == pytest.approx(added, abs=0.002 * before.most_bytes)


@pytest.mark.parametrize("name", ["test_byobnet", "test_efficientnet", "test_convnext", "test_vit"])
def test_other_networks_and_exempt_layers_are_bounded_too(name: str) -> None:
    whole = packed_network(name, drop_frac=0.4, size=64)
    state = unpack_weights(whole)
    for key in list(state.bits)[1:3]:
        del state.bits[key], state.steps[key]
    units, bits_u = units_of(state)
    found = bound_remainder(state, units, bits_u, metadata=notes_of(name, 64))
    assert len(shrink(state.pack(notes_of(name, 64)))) <= found.most_bytes
