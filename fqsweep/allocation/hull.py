"""Objective ``mean``: hull and sort, with the linear relaxation's value as certificate.

Axes: u units, b bit choices (ascending), s hull segments.

The problem is a multiple-choice knapsack. Per unit only the lower convex hull of (size, cost) matters to its
linear relaxation, which a sort of all hull segments by slope solves exactly (Sinha and Zoltners 1979).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fqsweep.allocation.problem import Float, Int, chosen, spent

EXACT_BELOW_UNITS = 200
MAX_EXACT_STATES = 400_000


@dataclass(frozen=True, kw_only=True)
class Relaxed:
    """Solution of the linear relaxation.

    Attributes:
        index_u: each unit's last whole hull step.
        split: the one unit between two choices, its next choice and the share of it, or None.
        value: the relaxation's objective; price: cost that one more bit of budget saves.
        segment_unit, segment_index, segment_size: all hull segments by rising slope: their unit, the choice that they
            lead to, the bits that they cost; the first ``taken`` of them fit into the budget.
    """

    index_u: Int
    split: tuple[int, int, float] | None
    value: float
    price: float
    segment_unit: Int
    segment_index: Int
    segment_size: Int
    taken: int


def allocate_mean(cost_ub: Float, size_ub: Int, capacity: int) -> tuple[Int, float]:
    """Choice per unit that minimises the summed cost, int64 (u,), and the relaxation's bound; few units exactly."""
    relaxed = relax(cost_ub, size_ub, capacity)
    index_u = fill(relaxed, size_ub, capacity)
    if len(size_ub) < EXACT_BELOW_UNITS:
        exact = _search_exactly(cost_ub, size_ub, capacity, relaxed, index_u)
        if exact is not None:
            return exact, float(chosen(cost_ub, exact).sum())
    return index_u, relaxed.value


def _hull_segments(cost_ub: Float, size_ub: Int) -> tuple[Int, Int, Int, Int, Float]:
    """Lower convex hulls of all units at once, only their falling part.

    From each unit's smallest allowed choice the steepest descent is followed (gift wrapping: at most
    one step a choice, vectorised over units).

    Returns:
        start index per unit; then per segment: unit, index it leads to, bits it costs, slope (< 0).
    """
    num_units = len(cost_ub)
    rows = np.arange(num_units)
    index_u = np.isfinite(cost_ub).argmax(axis=1)
    start_u = index_u.copy()
    units, targets, sizes, slopes = [], [], [], []
    active = rows
    with np.errstate(invalid="ignore"):
        for _ in range(size_ub.shape[1] - 1):
            here = index_u[active]
            run = size_ub[active] - size_ub[active, here][:, None]
            rise = cost_ub[active] - cost_ub[active, here][:, None]
            slope = np.where((run > 0) & np.isfinite(rise), rise / np.where(run > 0, run, 1), np.inf)
            # The furthest choice among equal slopes: collinear points are one segment.
            best = slope.shape[1] - 1 - slope[:, ::-1].argmin(axis=1)
            steepest = slope[np.arange(len(active)), best]
            falls = steepest < 0
            active, best, steepest = active[falls], best[falls], steepest[falls]
            if not len(active):
                break
            units.append(active)
            targets.append(best)
            sizes.append(size_ub[active, best] - size_ub[active, here[falls]])
            slopes.append(steepest)
            index_u[active] = best
    if not units:
        empty = np.zeros(0, dtype=np.int64)
        return start_u, empty, empty, empty, np.zeros(0)
    return (
        start_u,
        np.concatenate(units),
        np.concatenate(targets),
        np.concatenate(sizes),
        np.concatenate(slopes),
    )


def relax(cost_ub: Float, size_ub: Int, capacity: int) -> Relaxed:
    """Solve the linear relaxation: all hull segments by slope, as far as the budget goes."""
    start_u, unit_s, target_s, size_s, slope_s = _hull_segments(cost_ub, size_ub)
    # Segments of one unit come in rising slope, and the sort is stable: order within a unit is kept.
    order = np.argsort(slope_s, kind="stable")
    unit_s, target_s, size_s, slope_s = unit_s[order], target_s[order], size_s[order], slope_s[order]
    left = capacity - spent(size_ub, start_u)
    filled = np.cumsum(size_s)
    taken = int(np.searchsorted(filled, left, side="right"))
    index_u = start_u.copy()
    # Later segments of a unit overwrite earlier ones: assignment is in order.
    index_u[unit_s[:taken]] = target_s[:taken]
    value = float(chosen(cost_ub, index_u).sum())
    split, price = None, 0.0
    if taken < len(size_s):
        rest = left - (int(filled[taken - 1]) if taken else 0)
        share = rest / int(size_s[taken])
        price = -float(slope_s[taken])
        value -= price * rest
        split = (int(unit_s[taken]), int(target_s[taken]), share)
    return Relaxed(
        index_u=index_u,
        split=split,
        value=value,
        price=price,
        segment_unit=unit_s,
        segment_index=target_s,
        segment_size=size_s,
        taken=taken,
    )


def fill(relaxed: Relaxed, size_ub: Int, capacity: int) -> Int:
    """Spend what the split unit leaves: later segments, best first, whose predecessor was taken and that fit."""
    index_u = relaxed.index_u.copy()
    left = capacity - spent(size_ub, index_u)
    sizes = relaxed.segment_size[relaxed.taken :]
    if not len(sizes):
        return index_u
    smallest_ahead = np.minimum.accumulate(sizes[::-1])[::-1]
    blocked: set[int] = set()
    position = 0
    while position < len(sizes) and left >= smallest_ahead[position]:
        fits = np.flatnonzero(sizes[position:] <= left)
        if not len(fits):
            break
        for skipped in range(position, position + int(fits[0])):
            blocked.add(int(relaxed.segment_unit[relaxed.taken + skipped]))
        position += int(fits[0])
        unit = int(relaxed.segment_unit[relaxed.taken + position])
        if unit not in blocked:
            index_u[unit] = relaxed.segment_index[relaxed.taken + position]
            left -= int(sizes[position])
        position += 1
    return index_u


def _search_exactly(cost_ub: Float, size_ub: Int, capacity: int, relaxed: Relaxed, index_u: Int) -> Int | None:
    """Dynamic programming over non-dominated (bits, cost) states, pruned by the relaxation's price of a bit.

    A state's summed reduced cost above (best known - bound) cannot lead to something better (Pisinger
    1995). Returns None where too many states survive; the caller keeps hull and sort with its bound.
    """
    upper = float(chosen(cost_ub, index_u).sum())
    slack = (upper - relaxed.value) * (1 + 1e-9) + 1e-12 * (abs(upper) + relaxed.price * capacity)
    priced_ub = cost_ub + relaxed.price * size_ub
    reduced_ub = priced_ub - priced_ub.min(axis=1, keepdims=True)
    allowed_ub = np.isfinite(cost_ub)
    smallest_u = np.where(allowed_ub, size_ub, np.iinfo(np.int64).max).min(axis=1)
    ahead_u = np.concatenate([np.cumsum(smallest_u[::-1])[::-1][1:], [0]])
    size_s, cost_s, reduced_s = np.zeros(1, dtype=np.int64), np.zeros(1), np.zeros(1)
    history: list[tuple[Int, Int]] = []
    for unit in range(len(cost_ub)):
        options = np.flatnonzero(allowed_ub[unit] & (reduced_ub[unit] <= slack))
        size = (size_s[:, None] + size_ub[unit, options]).ravel()
        cost = (cost_s[:, None] + cost_ub[unit, options]).ravel()
        reduced = (reduced_s[:, None] + reduced_ub[unit, options]).ravel()
        keep = np.flatnonzero((reduced <= slack) & (size + ahead_u[unit] <= capacity))
        if not len(keep) or len(keep) > MAX_EXACT_STATES:
            return None
        keep = keep[np.lexsort((cost[keep], size[keep]))]
        best_before = np.minimum.accumulate(np.concatenate([[np.inf], cost[keep][:-1]]))
        keep = keep[cost[keep] < best_before]
        size_s, cost_s, reduced_s = size[keep], cost[keep], reduced[keep]
        history.append((keep // len(options), options[keep % len(options)]))
    state = int(cost_s.argmin())
    if cost_s[state] > upper:
        return index_u
    found_u = np.empty(len(cost_ub), dtype=np.int64)
    for unit in range(len(cost_ub) - 1, -1, -1):
        came_from, choice = history[unit]
        found_u[unit] = choice[state]
        state = int(came_from[state])
    return found_u
