"""From a cost table to bits per unit, as a method's settings say: reducer, allocator, limits of layers, budget.

Axes: u units, b bit choices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fqsweep.allocation import Allocation, Objective, allocate_bits, allocate_by_quantile
from fqsweep.config import Allocating
from fqsweep.cost_table import Importance, reduce_groups
from fqsweep.errors import TrialError
from fqsweep.quant.costs import mean_weight_bits
from fqsweep.quant.remainder import Remainder
from fqsweep.quant.units import LayerUnits, UnitTable, matching_names

OBJECTIVES: dict[str, Objective] = {
    "mean": "mean",
    "minimax": "minimax",
    "minimax_loss": "minimax",
    "gap": "gap",
}
STEP_BITS = 32
# A file is full when so little of its budget is left; half of that is aimed at.
NEAR_FRAC = 0.005
MOST_ROUNDS = 8  # of allocations that look for a full file


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What the units may spend: mean bits per weight, or bytes for their codes and steps."""

    mean_bits: float | None = None
    code_bytes: int | None = None


def assign_bits(
    settings: Allocating, importance: Importance, units: UnitTable, *, budget: Budget
) -> Allocation:
    """Bits per unit, as the method's reducer and allocator say; never over the budget.

    Raises:
        TrialError: no allocation fits the budget with the layers' limits.
    """
    spending: dict[str, Any] = {
        "choices": importance.choices,
        "budget_bits": budget.mean_bits,
        "budget_bytes": budget.code_bytes,
        "side_bits": STEP_BITS if budget.code_bytes is not None else 0,
    }
    try:
        if settings.allocator == "quantile":
            rank_u = reduce_groups(importance.cost_gub, settings.reducer, loss_g=importance.loss_g)[:, 0]
            return allocate_by_quantile(
                rank_u, units.num_weights_u, **{**spending, "choices": settings.choices}
            )
        if settings.reducer == "none":
            cost_gub = importance.cost_gub
        else:
            cost_gub = reduce_groups(importance.cost_gub, settings.reducer, loss_g=importance.loss_g)[None]
        allowed_ub = allowed_choices(settings, units, importance.choices)
        return allocate_bits(
            np.where(allowed_ub, cost_gub, np.inf),
            units.num_weights_u,
            objective=OBJECTIVES[settings.allocator],
            group_offset=importance.loss_g if settings.allocator in ("minimax_loss", "gap") else None,
            **spending,
        )
    except ValueError as error:
        raise TrialError(f"allocation: {error}") from error


def assign_bits_in_file(
    settings: Allocating,
    importance: Importance,
    units: UnitTable,
    *,
    budget_bytes: int,
    fixed_bytes: int,
    remainder_of: Callable[[np.ndarray], Remainder],
) -> tuple[Allocation, Remainder]:
    """Bits per unit that fill a packed file of ``budget_bytes``, and what that file holds.

    Where channels of 0 bits leave the file, what they free goes to the others: codes and steps are given more bytes
    for as long as the file still fits.

    Args:
        fixed_bytes: of the file with all channels in it, what is neither code nor step.
        remainder_of: bits (u,) -> what the file holds at most.

    Raises:
        TrialError: the smallest allocation does not fit.
    """

    def spend(code_bytes: int) -> tuple[Allocation, Remainder]:
        allocation = assign_bits(settings, importance, units, budget=Budget(code_bytes=code_bytes))
        return allocation, remainder_of(allocation.bits_u)

    margin = int(NEAR_FRAC / 2 * budget_bytes)
    smallest = _smallest_code_bytes(settings, units)
    code_bytes = max(budget_bytes - fixed_bytes, smallest)
    allocation, remainder = spend(code_bytes)
    while remainder.most_bytes > budget_bytes:
        if code_bytes == smallest:
            raise TrialError(
                f"a budget of {budget_bytes:,} bytes does not hold the smallest allocation, which takes up to "
                f"{remainder.most_bytes:,} bytes with biases, norms, exempt layers and the index of bits; raise it, "
                "or allow smaller choices"
            )
        code_bytes = max(code_bytes - (remainder.most_bytes - budget_bytes) - margin, smallest)
        allocation, remainder = spend(code_bytes)
    slope = 1.0  # code bytes for each byte by which the file may grow
    for _ in range(MOST_ROUNDS):
        left = budget_bytes - remainder.most_bytes
        if left <= 2 * margin or allocation.bits_u.all():
            break
        more_bytes = code_bytes + max(int((left - margin) * slope), 1)
        richer, fuller = spend(more_bytes)
        if fuller.most_bytes > budget_bytes:
            slope = (more_bytes - code_bytes) / (fuller.most_bytes - remainder.most_bytes)
        elif (richer.bits_u == allocation.bits_u).all():
            break
        else:
            code_bytes, allocation, remainder = more_bytes, richer, fuller
    return allocation, remainder


def allowed_choices(settings: Allocating, units: UnitTable, choices: tuple[int, ...]) -> np.ndarray:
    """Which widths each unit may have, bool (u, b): the method's, within the limits of its layer, or the pinned one.

    Raises:
        TrialError: a pattern that fits no layer, limits that leave a layer no choice, or two widths for one layer.
    """
    choice_b = np.array(choices)
    allowed_ub = np.tile(np.isin(choice_b, settings.choices), (units.num_units, 1))
    for pattern, limits in settings.limits.items():
        for layer in _layers_fitting(pattern, units, option="limits"):
            rows = slice(layer.start, layer.stop)
            allowed_ub[rows] &= (choice_b >= limits.min) & (choice_b <= limits.max)
            if not allowed_ub[layer.start].any():
                raise TrialError(
                    f"limits {pattern!r} ({limits.min} to {limits.max} bits) leave layer {layer.name} none of the "
                    f"choices {list(settings.choices)}"
                )
    pinned: dict[str, str] = {}
    for pattern, bits in settings.pin.items():
        for layer in _layers_fitting(pattern, units, option="pin"):
            other = pinned.setdefault(layer.name, pattern)
            if settings.pin[other] != bits:
                raise TrialError(
                    f"pin {other!r} and pin {pattern!r} give layer {layer.name} two widths "
                    f"({settings.pin[other]} and {bits} bits); let one of them leave it out"
                )
            allowed_ub[layer.start : layer.stop] = choice_b == bits
    return allowed_ub


def smallest_mean_bits(settings: Allocating, units: UnitTable) -> float:
    """The mean bits of the smallest allocation that the method's choices and the limits of layers allow.

    Raises:
        TrialError: as ``allowed_choices``.
    """
    return mean_weight_bits(units, _smallest_bits(settings, units))


def smallest_file_bytes(
    settings: Allocating, units: UnitTable, remainder_of: Callable[[np.ndarray], Remainder]
) -> int:
    """What the packed file of that allocation takes at most, in bytes.

    Raises:
        TrialError: as ``allowed_choices``.
    """
    return remainder_of(_smallest_bits(settings, units)).most_bytes


def _smallest_code_bytes(settings: Allocating, units: UnitTable) -> int:
    """Bytes of codes and steps of that allocation, rounded up."""
    smallest_u = _smallest_bits(settings, units)
    num_bits = int(units.num_weights_u @ smallest_u) + STEP_BITS * int((smallest_u > 0).sum())
    return -(-num_bits // 8)


def _smallest_bits(settings: Allocating, units: UnitTable) -> np.ndarray:
    choice_b = np.array(settings.measured_choices)
    return choice_b[allowed_choices(settings, units, settings.measured_choices).argmax(axis=1)]


def _layers_fitting(pattern: str, units: UnitTable, *, option: str) -> list[LayerUnits]:
    by_name = {layer.name: layer for layer in units.layers}
    if ends := units.ends.get(pattern):
        if not by_name.keys() & set(ends):
            raise TrialError(
                f"{option} {pattern!r} means {' and '.join(ends)}, exempt here: leave one of the two out"
            )
        return [by_name[name] for name in ends if name in by_name]
    try:
        return [by_name[name] for name in matching_names(pattern, list(by_name))]
    except ValueError as error:
        raise TrialError(f"{option} {error}") from error
