"""Units of a model, and what their bits cost."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fqsweep.config import ArchitectureConfig
from fqsweep.models import build_model
from fqsweep.quant.costs import effective_gbops, mean_weight_bits
from fqsweep.quant.units import UnitTable, as_units, list_units


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1, groups=2), nn.Linear(5, 2))


def test_units_are_output_channels_layer_by_layer() -> None:
    units = list_units(small(), granularity="channel")
    assert [(u.name, u.start, u.stop, u.num_weights) for u in units.layers] == [
        ("0", 0, 4, 27),
        ("2", 4, 10, 2),
        ("3", 10, 12, 5),
    ]
    assert units.num_units == 12
    assert units.num_weights_u.tolist() == [27] * 4 + [2] * 6 + [5] * 2


def test_units_may_be_whole_tensors() -> None:
    units = list_units(small(), granularity="tensor")
    assert units.num_weights_u.tolist() == [108, 12, 10]


def test_all_weights_are_counted_once_at_both_granularities() -> None:
    total = sum(m.weight.numel() for m in small() if isinstance(m, nn.Conv2d | nn.Linear))
    for granularity in ("channel", "tensor"):
        assert list_units(small(), granularity=granularity).num_weights_u.sum() == total


def test_splitting_and_joining_are_inverse() -> None:
    units = list_units(small(), granularity="channel")
    values = np.arange(12)
    parts = units.split(values)
    assert {name: len(part) for name, part in parts.items()} == {"0": 4, "2": 6, "3": 2}
    shuffled = {name: parts[name] for name in reversed(list(parts))}
    assert np.array_equal(units.join(shuffled), values)


def test_weights_are_seen_as_rows_of_units() -> None:
    weight = torch.arange(24.0).reshape(4, 3, 2, 1)
    assert torch.equal(as_units(weight, 4)[1], torch.arange(6.0, 12.0))
    assert as_units(weight, 1).shape == (1, 24)


def test_last_means_every_classifier_of_a_distilled_network() -> None:
    architecture = ArchitectureConfig(name="deit_tiny_distilled_patch16_224")
    model = build_model(architecture, num_classes=4, image_size=32, device="meta")
    units = list_units(model, granularity="tensor", exempt=("last",))
    assert units.ends["last"] == ("head", "head_dist")
    assert not {"head", "head_dist"} & {layer.name for layer in units.layers}


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="no Conv2d or Linear layer"):
        list_units(nn.Sequential(nn.BatchNorm2d(3)), granularity="channel")


def two_layers() -> UnitTable:
    return list_units(nn.Sequential(nn.Linear(10, 2), nn.Linear(2, 3)), granularity="channel")


def test_mean_bits_are_weighted_by_weights_not_by_channels() -> None:
    assert mean_weight_bits(two_layers(), np.array([8, 0, 2, 2, 2])) == pytest.approx((8 * 10 + 2 * 6) / 26)


def test_mean_bits_of_small_integers_do_not_overflow() -> None:
    units = list_units(nn.Linear(4096, 8), granularity="channel")
    assert mean_weight_bits(units, np.full(8, 8, dtype=np.uint8)) == 8.0


def test_bit_operations_count_tokens_attention_and_activation_bits() -> None:
    bits = np.array([8, 0, 2, 2, 2])
    found = effective_gbops({"0": 1000, "1": 300}, 50, two_layers(), bits)
    assert found == pytest.approx((1000 * 4 * 32 + 300 * 2 * 32 + 50 * 32 * 32) / 1e9)


def test_full_precision_counts_32_bits() -> None:
    found = effective_gbops({"0": 1000, "1": 300}, 0, two_layers(), np.full(5, 32))
    assert found == pytest.approx(1300 * 32 * 32 / 1e9)


def test_a_layer_that_no_image_passes_costs_nothing() -> None:
    assert effective_gbops({"0": 1000}, 0, two_layers(), np.full(5, 4)) == pytest.approx(1000 * 4 * 32 / 1e9)


def test_layers_that_stay_in_full_precision_count_32_bits() -> None:
    network = nn.Sequential(nn.Linear(10, 2), nn.Linear(2, 3))
    units = list_units(network, granularity="channel", exempt=["last"])
    found = effective_gbops({"0": 1000, "1": 300}, 0, units, np.full(2, 4))
    assert found == pytest.approx((1000 * 4 * 32 + 300 * 32 * 32) / 1e9)
