"""Bits that fill a file: never more than the budget, nearly all of it, and a clear word where nothing fits."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np
import pytest
from torch import nn

from fqsweep.allocation import Allocation
from fqsweep.assignment import Budget, allowed_choices, assign_bits, assign_bits_in_file
from fqsweep.config import StaticMethod
from fqsweep.cost_table import Importance
from fqsweep.errors import TrialError
from fqsweep.quant.costs import fixed_packed_bytes
from fqsweep.quant.packed_model import shrink
from fqsweep.quant.packing import pack_weights
from fqsweep.quant.remainder import Remainder, bound_remainder
from fqsweep.quant.units import UnitTable, list_units
from tests.quant.packed_networks import notes_of, random_network

SMALL = "test_resnet"
SIZE = 32


@cache
def network(name: str) -> nn.Module:
    return random_network(name, image_size=SIZE, seed=0)


def drawn_importance(units: UnitTable, choices: tuple[int, ...]) -> Importance:
    generator = np.random.default_rng(0)
    scale_gu1 = generator.lognormal(0, 2, (2, units.num_units, 1)) * units.num_weights_u[:, None]
    return Importance(
        cost_gub=scale_gu1 * 4.0 ** -np.array(choices),
        choices=choices,
        step_ub=np.ones((units.num_units, 9), dtype=np.float32),
        loss_g=np.array([1.0, 1.2]),
        count_g=np.array([10, 10]),
        passes=1,
        seconds=1,
    )


def fixed_bytes(name: str, units: UnitTable) -> int:
    return fixed_packed_bytes(network(name).state_dict(), units, metadata=notes_of(name, SIZE))


def fill_file(
    budget_bytes: int, *, name: str = SMALL, **options: Any
) -> tuple[Allocation, Remainder, UnitTable]:
    settings = StaticMethod(method="static", **options)
    units = list_units(network(name), granularity=settings.granularity, exempt=settings.exempt)
    found = assign_bits_in_file(
        settings,
        drawn_importance(units, settings.measured_choices),
        units,
        budget_bytes=budget_bytes,
        fixed_bytes=fixed_bytes(name, units),
        remainder_of=partial(bound_remainder, network(name).state_dict(), units, metadata=notes_of(name, SIZE)),
    )
    return *found, units


def size_of_file(allocation: Allocation, units: UnitTable) -> int:
    bits = {f"{layer}.weight": own_u for layer, own_u in units.split(allocation.bits_u).items()}
    return len(shrink(pack_weights(network(SMALL).state_dict(), bits, metadata=notes_of(SMALL, SIZE))))


def test_an_end_that_is_exempt_is_not_pinned_in_its_neighbour() -> None:
    settings = StaticMethod(method="static", exempt=("first",), pin={"first": 8})
    units = list_units(network(SMALL), granularity="channel", exempt=settings.exempt)
    with pytest.raises(TrialError, match=r"pin 'first' means conv1\.0, exempt here: leave one of the two out"):
        allowed_choices(settings, units, settings.measured_choices)


def test_of_a_layer_that_is_limited_and_pinned_the_pin_counts() -> None:
    units = list_units(network(SMALL), granularity="tensor")
    settings = StaticMethod(method="static", pin={"first": 8}, limits={"*": {"min": 1, "max": 4}})
    allowed_ub = allowed_choices(settings, units, settings.measured_choices)
    assert np.flatnonzero(allowed_ub[0]).tolist() == [8]
    assert (np.array([np.flatnonzero(own_b) for own_b in allowed_ub[1:]]) == [1, 2, 3, 4]).all()


def test_two_pins_of_one_layer_agree_or_are_refused() -> None:
    units = list_units(network(SMALL), granularity="tensor")
    settings = StaticMethod(method="static", pin={"first": 8, "*": 8})
    assert allowed_choices(settings, units, settings.measured_choices)[:, -1].all()
    settings = StaticMethod(method="static", pin={"first": 8, "*": 2})
    with pytest.raises(
        TrialError, match=r"'first' and pin '\*' give layer conv1\.0 two widths \(8 and 2 bits\)"
    ):
        allowed_choices(settings, units, settings.measured_choices)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"choices": (2, 4)},
        {"choices": (2, 4, 8)},
        {"choices": (0, 4, 8), "pin": {"last": 8}},
        {"exempt": ("last",)},
        {"allocator": "quantile", "reducer": "max", "choices": (2, 4, 8)},
        {"allocator": "mean", "reducer": "mean", "limits": {"layer1.*": {"min": 2}}},
    ],
    ids=str,
)
def test_a_file_is_filled_and_never_too_large(options: dict[str, Any]) -> None:
    for budget_bytes in (160_000, 200_000, 260_000):
        allocation, remainder, units = fill_file(budget_bytes, **options)
        assert size_of_file(allocation, units) <= remainder.most_bytes <= budget_bytes
        has_all = (allocation.bits_u == max(options.get("choices", [8]))).all()
        assert has_all or remainder.most_bytes > 0.99 * budget_bytes


def test_whole_tensors_are_bounded_though_they_cannot_fill_a_file() -> None:
    allocation, remainder, units = fill_file(200_000, granularity="tensor")
    assert size_of_file(allocation, units) <= remainder.most_bytes <= 200_000


def test_what_dropped_channels_free_goes_to_the_others() -> None:
    allocation, _, units = fill_file(400_000, name="resnet18")
    settings = StaticMethod(method="static")
    importance = drawn_importance(units, settings.measured_choices)
    code_bytes = 400_000 - fixed_bytes("resnet18", units)
    counted_whole = assign_bits(settings, importance, units, budget=Budget(code_bytes=code_bytes))
    assert (allocation.bits_u == 0).mean() > 0.2
    assert allocation.mean_bits > 1.2 * counted_whole.mean_bits


def test_the_smallest_allocation_is_tried_before_a_budget_is_refused() -> None:
    smallest = fill_file(10**9, choices=(2,))[1].most_bytes
    assert fill_file(smallest, choices=(2, 4))[1].most_bytes <= smallest
    with pytest.raises(
        TrialError, match=rf"{smallest - 1:,} bytes does not hold the smallest .* {smallest:,} bytes"
    ):
        fill_file(smallest - 1, choices=(2, 4))
