"""Bits per unit from a cost table and a bit budget, with a certificate. NumPy and SciPy only.

Axes: g groups, u units, b bit choices (ascending).

The problem is a multiple-choice knapsack: minimise sum_u cost[u, b_u] under
sum_u n_u b_u <= B sum_u n_u. Per unit only the lower convex hull of (bits, cost) matters to its
linear relaxation, which a sort of all hull segments by slope solves exactly (Sinha and Zoltners
1979). The relaxation's value is the certificate: no allocation can cost less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

Float = NDArray[np.float64]
Int = NDArray[np.int64]
EXACT_BELOW_UNITS = 200
MAX_CUTS = 60
CUT_TOLERANCE = 1e-4
MAX_EXACT_STATES = 400_000
QUANTILE_MIX = (0.2, 0.4, 0.4)


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """Bits per unit and how good they provably are.

    Attributes:
        bits_u: int64 (u,).
        objective: what was minimised, at ``bits_u``.
        lower_bound: no allocation within the budget has a smaller objective; ``-inf`` where none is known.
        mean_bits: sum n_u b_u / sum n_u, never above the budget.
    """

    bits_u: Int
    objective: float
    lower_bound: float
    mean_bits: float

    @property
    def gap_frac(self) -> float:
        """How far the objective may be from the optimum, relative to it."""
        return (self.objective - self.lower_bound) / max(abs(self.objective), 1e-300)


def allocate_bits(
    cost_gub: Float,
    num_weights_u: NDArray[np.integer],
    *,
    budget_bits: float,
    choices: Sequence[int],
    objective: Literal["mean", "minimax"] = "mean",
    group_weights: Sequence[float] | Float | None = None,
    group_offset: Sequence[float] | Float | None = None,
) -> Allocation:
    """Choose bits per unit under a budget of mean bits per weight; never over it.

    ``mean`` minimises the mean over groups (weighted by ``group_weights``) of the summed cost;
    ``minimax`` the largest group's summed cost plus its ``group_offset``. With the groups'
    full-precision losses as offsets this is the worst resulting loss, without it the worst increase.
    Under 200 units the optimum is returned; above, hull and sort (``mean``) or cutting planes on
    the groups' weights around it (``minimax``), with the bound as certificate.

    Args:
        cost_gub: float64 (groups, units, choices); +inf forbids a choice for a unit.
        num_weights_u: weights per unit, positive whole numbers.
        budget_bits: mean bits per weight.
        choices: ascending bit-widths, one per column.
        objective: see above.
        group_weights: not negative, for ``mean`` only; equal weights where not given.
        group_offset: one number per group, for ``minimax`` only.

    Raises:
        ValueError: the shapes do not fit, a cost is NaN, or no allocation fits the budget.

    Example:
        >>> cost = np.array([[[4.0, 1.0, 0.0], [9.0, 2.0, 0.0]]])
        >>> allocate_bits(cost, np.array([1, 1]), budget_bits=3, choices=[0, 2, 4]).bits_u.tolist()
        [2, 4]
    """
    cost_gub, num_weights_u, choice_b = _checked(cost_gub, num_weights_u, choices)
    capacity = _capacity(cost_gub, num_weights_u, choice_b, budget_bits)
    num_groups = len(cost_gub)
    if objective == "mean":
        weight_g = _unit_weights(group_weights, num_groups)
        cost_ub = _weighted_cost(cost_gub, weight_g)
        index_u, lower_bound = _allocate_mean(cost_ub, num_weights_u, choice_b, capacity)
        value = float(_chosen(cost_ub, index_u).sum())
    elif objective == "minimax":
        if group_weights is not None:
            raise ValueError("group_weights belongs to objective 'mean'; for 'minimax' scale the costs")
        offset_g = np.zeros(num_groups) if group_offset is None else np.asarray(group_offset, dtype=np.float64)
        if offset_g.shape != (num_groups,):
            raise ValueError(
                f"group_offset must have one number per group ({num_groups}), got {offset_g.shape}"
            )
        index_u, lower_bound = _allocate_minimax(cost_gub, num_weights_u, choice_b, capacity, offset_g)
        value = _worst(cost_gub, index_u, offset_g)
    else:
        raise ValueError(f"objective must be 'mean' or 'minimax', got {objective!r}")
    bits_u = choice_b[index_u]
    spent = int(num_weights_u @ bits_u)
    assert spent <= capacity
    mean_bits = spent / int(num_weights_u.sum())
    return Allocation(bits_u=bits_u, objective=value, lower_bound=min(lower_bound, value), mean_bits=mean_bits)


def allocate_by_quantile(
    importance_u: Float, num_weights_u: NDArray[np.integer], *, budget_bits: float, choices: Sequence[int]
) -> Allocation:
    """The paper's rule at an exact budget: units ranked by importance get the choices in fixed fractions.

    The published fractions (0.2, 0.4, 0.4 of the channels for 2, 4, 8 bits) spend what they spend. Here
    they are moved towards all-lowest or all-highest, by bisection, until the parameter-weighted mean
    is as near below the budget as the family allows. Ties keep the units' order.

    Args:
        importance_u: float64 (u,), larger is more important.
        num_weights_u: weights per unit.
        budget_bits: mean bits per weight.
        choices: ascending bit-widths.

    Raises:
        ValueError: no allocation fits the budget, or an importance is not finite.
    """
    importance_u = np.asarray(importance_u, dtype=np.float64)
    if not np.isfinite(importance_u).all():
        raise ValueError("importance must be finite")
    shape = (1, len(importance_u), len(choices))
    _, num_weights_u, choice_b = _checked(np.zeros(shape), num_weights_u, choices)
    capacity = _capacity(np.zeros(shape), num_weights_u, choice_b, budget_bits)
    order = np.argsort(importance_u, kind="stable")
    mix_b = _published_mix(len(choice_b))

    def ranked_bits(level: float) -> Int:
        """All-lowest at level 0, the published mix at 1, all-highest at 2."""
        end_b = np.eye(len(choice_b))[0 if level < 1 else -1]
        share = abs(level - 1)
        border = np.floor(np.cumsum((1 - share) * mix_b + share * end_b) * len(order) + 1e-9).astype(int)
        bits_u = np.empty(len(order), dtype=np.int64)
        bits_u[order] = choice_b[np.searchsorted(border[:-1], np.arange(len(order)), side="right")]
        return bits_u

    low, high = 0.0, 2.0
    if int(num_weights_u @ ranked_bits(high)) <= capacity:
        low = high
    while high - low > 1e-9:
        middle = (low + high) / 2
        if int(num_weights_u @ ranked_bits(middle)) <= capacity:
            low = middle
        else:
            high = middle
    bits_u = ranked_bits(low)
    mean_bits = int(num_weights_u @ bits_u) / int(num_weights_u.sum())
    return Allocation(bits_u=bits_u, objective=float("nan"), lower_bound=-float("inf"), mean_bits=mean_bits)


def _published_mix(num_choices: int) -> Float:
    if num_choices == len(QUANTILE_MIX):
        return np.array(QUANTILE_MIX)
    return np.full(num_choices, 1 / num_choices)


# --- checks --------------------------------------------------------------------------------------


def _checked(
    cost_gub: Float, num_weights_u: NDArray[np.integer], choices: Sequence[int]
) -> tuple[Float, Int, Int]:
    cost_gub = np.asarray(cost_gub, dtype=np.float64)
    choice_b = np.asarray(choices, dtype=np.int64)
    weights_u = np.asarray(num_weights_u)
    if cost_gub.ndim != 3 or 0 in cost_gub.shape:
        raise ValueError(f"cost_gub must be (groups, units, choices) and not empty, got shape {cost_gub.shape}")
    if weights_u.shape != cost_gub.shape[1:2]:
        raise ValueError(f"num_weights_u must have {cost_gub.shape[1]} entries, got shape {weights_u.shape}")
    if choice_b.shape != cost_gub.shape[2:] or (np.diff(choice_b) <= 0).any() or choice_b[0] < 0:
        raise ValueError(f"choices must be {cost_gub.shape[2]} ascending bit-widths, got {list(choices)}")
    if (weights_u != weights_u.astype(np.int64)).any() or (weights_u <= 0).any():
        raise ValueError("num_weights_u must be positive whole numbers")
    if np.isnan(cost_gub).any() or (cost_gub == -np.inf).any():
        raise ValueError("cost_gub holds NaN or -inf: the importance it comes from is not usable")
    return cost_gub, weights_u.astype(np.int64), choice_b


def _capacity(cost_gub: Float, num_weights_u: Int, choice_b: Int, budget_bits: float) -> int:
    """The budget in bits over all weights; checks that some allocation fits."""
    if not np.isfinite(budget_bits) or budget_bits < 0:
        raise ValueError(f"budget_bits must be a number of at least 0, got {budget_bits}")
    total = int(num_weights_u.sum())
    capacity = int(np.floor(budget_bits * total * (1 + 1e-12)))
    allowed_ub = np.asarray(np.isfinite(cost_gub).all(axis=0))
    if not allowed_ub.any(axis=1).all():
        unit = int(np.flatnonzero(~allowed_ub.any(axis=1))[0])
        raise ValueError(f"unit {unit} has no allowed bit choice")
    smallest = int(num_weights_u @ choice_b[allowed_ub.argmax(axis=1)])
    if smallest > capacity:
        raise ValueError(
            f"no allocation fits: the smallest allowed bits already spend {smallest / total:.4g} mean bits, "
            f"the budget is {budget_bits:g}; raise the budget or allow smaller choices"
        )
    return capacity


def _unit_weights(group_weights: Sequence[float] | Float | None, num_groups: int) -> Float:
    weight_g = np.ones(num_groups) if group_weights is None else np.asarray(group_weights, dtype=np.float64)
    if weight_g.shape != (num_groups,) or not np.isfinite(weight_g).all() or (weight_g < 0).any():
        raise ValueError(f"group_weights must be {num_groups} numbers of at least 0")
    if weight_g.sum() <= 0:
        raise ValueError("group_weights must not all be 0")
    return np.asarray(weight_g / weight_g.sum())


def _weighted_cost(cost_gub: Float, weight_g: Float) -> Float:
    """Sum over groups; a choice that any group forbids stays forbidden, also at weight 0."""
    finite_ub = np.isfinite(cost_gub).all(axis=0)
    cost_ub = np.einsum("g,gub->ub", weight_g, np.where(np.isfinite(cost_gub), cost_gub, 0.0))
    return np.where(finite_ub, cost_ub, np.inf)


def _chosen(cost_ub: Float, index_u: Int) -> Float:
    return np.asarray(cost_ub[np.arange(len(cost_ub)), index_u])


def _worst(cost_gub: Float, index_u: Int, offset_g: Float) -> float:
    return float((cost_gub[:, np.arange(len(index_u)), index_u].sum(axis=1) + offset_g).max())


# --- objective mean ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Relaxed:
    """Solution of the linear relaxation.

    Attributes:
        index_u: each unit's last whole hull step.
        split: the one unit between two choices, its next choice and the share of it, or None.
        value: the relaxation's objective; price: cost that one more bit of budget saves.
    """

    index_u: Int
    split: tuple[int, int, float] | None
    value: float
    price: float
    segment_unit: Int
    segment_index: Int
    segment_size: Int
    taken: int


def _allocate_mean(cost_ub: Float, num_weights_u: Int, choice_b: Int, capacity: int) -> tuple[Int, float]:
    relaxed = _relax(cost_ub, num_weights_u, choice_b, capacity)
    index_u = _fill(relaxed, num_weights_u, choice_b, capacity)
    if len(num_weights_u) < EXACT_BELOW_UNITS:
        exact = _search_exactly(cost_ub, num_weights_u, choice_b, capacity, relaxed, index_u)
        if exact is not None:
            return exact, float(_chosen(cost_ub, exact).sum())
    return index_u, relaxed.value


def _hull_segments(cost_ub: Float, num_weights_u: Int, choice_b: Int) -> tuple[Int, Int, Int, Int, Float]:
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
        for _ in range(len(choice_b) - 1):
            here = index_u[active]
            run = (choice_b[None, :] - choice_b[here][:, None]) * num_weights_u[active][:, None]
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
            sizes.append((choice_b[best] - choice_b[index_u[active]]) * num_weights_u[active])
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


def _relax(cost_ub: Float, num_weights_u: Int, choice_b: Int, capacity: int) -> _Relaxed:
    start_u, unit_s, target_s, size_s, slope_s = _hull_segments(cost_ub, num_weights_u, choice_b)
    # Segments of one unit come in rising slope, and the sort is stable: order within a unit is kept.
    order = np.argsort(slope_s, kind="stable")
    unit_s, target_s, size_s, slope_s = unit_s[order], target_s[order], size_s[order], slope_s[order]
    left = capacity - int(num_weights_u @ choice_b[start_u])
    filled = np.cumsum(size_s)
    taken = int(np.searchsorted(filled, left, side="right"))
    index_u = start_u.copy()
    # Later segments of a unit overwrite earlier ones: assignment is in order.
    index_u[unit_s[:taken]] = target_s[:taken]
    value = float(_chosen(cost_ub, index_u).sum())
    split, price = None, 0.0
    if taken < len(size_s):
        rest = left - (int(filled[taken - 1]) if taken else 0)
        share = rest / int(size_s[taken])
        price = -float(slope_s[taken])
        value -= price * rest
        split = (int(unit_s[taken]), int(target_s[taken]), share)
    return _Relaxed(
        index_u=index_u,
        split=split,
        value=value,
        price=price,
        segment_unit=unit_s,
        segment_index=target_s,
        segment_size=size_s,
        taken=taken,
    )


def _fill(relaxed: _Relaxed, num_weights_u: Int, choice_b: Int, capacity: int) -> Int:
    """Spend what the split unit leaves: later segments, best first, whose predecessor was taken and that fit."""
    index_u = relaxed.index_u.copy()
    left = capacity - int(num_weights_u @ choice_b[index_u])
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


def _search_exactly(
    cost_ub: Float, num_weights_u: Int, choice_b: Int, capacity: int, relaxed: _Relaxed, index_u: Int
) -> Int | None:
    """Dynamic programming over non-dominated (bits, cost) states, pruned by the relaxation's prices.

    A state's summed reduced cost above (best known - bound) cannot lead to something better (Pisinger
    1995). Returns None where too many states survive; the caller keeps hull and sort with its bound.
    """
    upper = float(_chosen(cost_ub, index_u).sum())
    slack = (upper - relaxed.value) * (1 + 1e-9) + 1e-12 * max(1.0, abs(upper))
    size_ub = num_weights_u[:, None] * choice_b[None, :]
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


# --- objective minimax ---------------------------------------------------------------------------


def _allocate_minimax(
    cost_gub: Float, num_weights_u: Int, choice_b: Int, capacity: int, offset_g: Float
) -> tuple[Int, float]:
    index_u, lower_bound = _cut_planes(cost_gub, num_weights_u, choice_b, capacity, offset_g)
    if len(num_weights_u) >= EXACT_BELOW_UNITS:
        return index_u, lower_bound
    upper = _worst(cost_gub, index_u, offset_g)
    if upper - lower_bound <= 1e-12 * max(1.0, abs(upper)):
        return index_u, lower_bound
    exact = _solve_minimax_exactly(cost_gub, num_weights_u, choice_b, capacity, offset_g, lower_bound, upper)
    if exact is None:
        return index_u, lower_bound
    found_u, proven = exact
    if _worst(cost_gub, found_u, offset_g) > upper:
        found_u = index_u
    return found_u, _worst(cost_gub, found_u, offset_g) if proven else lower_bound


def _cut_planes(
    cost_gub: Float, num_weights_u: Int, choice_b: Int, capacity: int, offset_g: Float
) -> tuple[Int, float]:
    """Kelley's cutting planes on the groups' weights, then rounding of the best mixture.

    max over weights m in the simplex of min over allocations of m . (cost + offset) bounds the
    minimax from below; every inner minimum gives a cut. The mixture of cuts that proves the bound
    differs in few units, on which a small linear program and rounding give the allocation.
    """
    num_groups = len(cost_gub)
    cut_kg: list[Float] = []
    visited: list[_Relaxed] = []
    best_index, best_value, bound = None, np.inf, -np.inf
    queue = [np.full(num_groups, 1 / num_groups), *(list(np.eye(num_groups)) if num_groups > 1 else [])]
    share_k = np.ones(1)
    for _ in range(MAX_CUTS):
        weight_g = queue.pop(0)
        relaxed = _relax(_weighted_cost(cost_gub, weight_g), num_weights_u, choice_b, capacity)
        bound = max(bound, relaxed.value + float(weight_g @ offset_g))
        visited.append(relaxed)
        cut_kg.append(_group_cost(cost_gub, relaxed) + offset_g)
        candidate = _fill(relaxed, num_weights_u, choice_b, capacity)
        value = _worst(cost_gub, candidate, offset_g)
        if value < best_value:
            best_index, best_value = candidate, value
        if queue:
            continue
        weight_g, ceiling, share_k = _master(np.array(cut_kg))
        if ceiling - bound <= CUT_TOLERANCE * max(abs(ceiling), 1e-300):
            break
        queue.append(weight_g)
    assert best_index is not None
    active = [relaxed for relaxed, share in zip(visited, share_k, strict=False) if share > 1e-9]
    mixed = _round_mixture(cost_gub, num_weights_u, choice_b, capacity, offset_g, active)
    for candidate in mixed:
        value = _worst(cost_gub, candidate, offset_g)
        if value < best_value:
            best_index, best_value = candidate, value
    return best_index, bound


def _group_cost(cost_gub: Float, relaxed: _Relaxed) -> Float:
    """Each group's summed cost at a relaxed solution, the split unit between its two choices."""
    rows = np.arange(len(relaxed.index_u))
    cost_g = cost_gub[:, rows, relaxed.index_u].sum(axis=1)
    if relaxed.split is not None:
        unit, target, share = relaxed.split
        cost_g = cost_g + share * (cost_gub[:, unit, target] - cost_gub[:, unit, relaxed.index_u[unit]])
    return np.asarray(cost_g)


def _master(cut_kg: Float) -> tuple[Float, float, Float]:
    """Weights that maximise the lowest cut, its value, and the mixture of cuts that proves it."""
    num_cuts, num_groups = cut_kg.shape
    scale = float(np.abs(cut_kg).max()) or 1.0
    solved = linprog(
        np.concatenate([np.zeros(num_groups), [-1.0]]),
        A_ub=np.hstack([-cut_kg / scale, np.ones((num_cuts, 1))]),
        b_ub=np.zeros(num_cuts),
        A_eq=np.concatenate([np.ones(num_groups), [0.0]])[None, :],
        b_eq=[1.0],
        bounds=[(0, None)] * num_groups + [(None, None)],
        method="highs",
    )
    weight_g = np.maximum(solved.x[:num_groups], 0)
    return weight_g / weight_g.sum(), float(solved.x[-1]) * scale, np.abs(solved.ineqlin.marginals)


def _round_mixture(
    cost_gub: Float, num_weights_u: Int, choice_b: Int, capacity: int, offset_g: Float, active: list[_Relaxed]
) -> list[Int]:
    """Allocations from a mixture of relaxed solutions: where they differ, a linear program chooses.

    A vertex of that program has at most (groups + 1) units between choices; those are rounded down and
    the budget that this leaves is spent best first for the worst group.
    """
    option_uk = np.stack([relaxed.index_u for relaxed in active], axis=1)
    for column, relaxed in enumerate(active):
        if relaxed.split is not None:
            extra = option_uk[:, column].copy()
            extra[relaxed.split[0]] = relaxed.split[1]
            option_uk = np.concatenate([option_uk, extra[:, None]], axis=1)
    differs = np.flatnonzero((option_uk != option_uk[:, :1]).any(axis=1))
    base_u = option_uk.min(axis=1)
    if not len(differs):
        return [_spend(cost_gub, num_weights_u, choice_b, capacity, offset_g, base_u)]
    pairs = sorted({(int(u), int(i)) for u in differs for i in option_uk[u]})
    unit_p = np.array([u for u, _ in pairs])
    index_p = np.array([i for _, i in pairs])
    share_p = _mixture_program(cost_gub, num_weights_u, choice_b, capacity, offset_g, base_u, unit_p, index_p)
    if share_p is None:
        return [_spend(cost_gub, num_weights_u, choice_b, capacity, offset_g, base_u)]
    whole_u = base_u.copy()
    whole = share_p > 1 - 1e-7
    whole_u[unit_p[whole]] = index_p[whole]
    return [_spend(cost_gub, num_weights_u, choice_b, capacity, offset_g, whole_u)]


def _mixture_program(
    cost_gub: Float,
    num_weights_u: Int,
    choice_b: Int,
    capacity: int,
    offset_g: Float,
    base_u: Int,
    unit_p: Int,
    index_p: Int,
) -> Float | None:
    """Shares of (unit, choice) pairs that minimise the worst group's cost; other units stay at ``base_u``."""
    num_pairs, num_groups = len(unit_p), len(cost_gub)
    fixed = np.setdiff1d(np.arange(len(base_u)), unit_p)
    fixed_g = cost_gub[:, fixed, base_u[fixed]].sum(axis=1) + offset_g
    left = capacity - int(num_weights_u[fixed] @ choice_b[base_u[fixed]])
    cost_gp = cost_gub[:, unit_p, index_p]
    scale = float(max(np.abs(cost_gp).max(), np.abs(fixed_g).max())) or 1.0
    size_p = (num_weights_u[unit_p] * choice_b[index_p]).astype(np.float64)
    units, row_p = np.unique(unit_p, return_inverse=True)
    groups = sparse.hstack([sparse.csr_array(cost_gp / scale), sparse.csr_array(-np.ones((num_groups, 1)))])
    size = sparse.csr_array(np.concatenate([size_p / max(left, 1), [0.0]])[None, :])
    one = sparse.csr_array(
        (np.ones(num_pairs), (row_p, np.arange(num_pairs))), shape=(len(units), num_pairs + 1)
    )
    solved = linprog(
        np.concatenate([np.zeros(num_pairs), [1.0]]),
        A_ub=sparse.vstack([groups, size]),
        b_ub=np.concatenate([-fixed_g / scale, [left / max(left, 1)]]),
        A_eq=one,
        b_eq=np.ones(len(units)),
        bounds=[(0, None)] * num_pairs + [(None, None)],
        method="highs-ds",
    )
    return np.asarray(solved.x[:num_pairs]) if solved.status == 0 else None


def _spend(
    cost_gub: Float, num_weights_u: Int, choice_b: Int, capacity: int, offset_g: Float, index_u: Int
) -> Int:
    """Raise units while the budget lasts, each time by what lowers the worst group most per bit."""
    index_u = index_u.copy()
    rows = np.arange(len(index_u))
    allowed_ub = np.isfinite(cost_gub).all(axis=0)
    left = capacity - int(num_weights_u @ choice_b[index_u])
    for _ in range(4 * len(cost_gub) + 64):
        cost_g = cost_gub[:, rows, index_u].sum(axis=1) + offset_g
        worst = int(cost_g.argmax())
        size_ub = num_weights_u[:, None] * (choice_b[None, :] - choice_b[index_u][:, None])
        with np.errstate(invalid="ignore"):
            gain_ub = cost_gub[worst, rows, index_u][:, None] - cost_gub[worst]
        fits_ub = (size_ub > 0) & (size_ub <= left) & allowed_ub & (gain_ub > 0)
        if not fits_ub.any():
            break
        rate_ub = np.where(fits_ub, gain_ub / np.where(size_ub > 0, size_ub, 1), -np.inf)
        unit, choice = np.unravel_index(int(rate_ub.argmax()), rate_ub.shape)
        index_u[unit] = choice
        left -= int(size_ub[unit, choice])
    return index_u


def _solve_minimax_exactly(
    cost_gub: Float,
    num_weights_u: Int,
    choice_b: Int,
    capacity: int,
    offset_g: Float,
    lower_bound: float,
    upper: float,
) -> tuple[Int, bool] | None:
    """HiGHS on the whole problem, for few units; returns the allocation and whether its optimality is proven.

    Costs are scaled so that the distance from bound to best known value is 1000: the solver's absolute
    tolerance of 1e-6 then lies far below any difference that matters.
    """
    num_groups, num_units, num_choices = cost_gub.shape
    allowed = np.isfinite(cost_gub).all(axis=0).ravel()
    num_pairs = num_units * num_choices
    scale = 1e3 / max(upper - lower_bound, 1e-9 * max(abs(upper), 1e-300))
    flat_gp = np.where(allowed, cost_gub.reshape(num_groups, num_pairs), 0.0) * scale
    groups = sparse.hstack([sparse.csr_array(flat_gp), sparse.csr_array(-np.ones((num_groups, 1)))])
    size_p = (num_weights_u[:, None] * choice_b[None, :]).ravel()
    size = sparse.csr_array(np.concatenate([size_p, [0]])[None, :].astype(np.float64))
    row_p = np.repeat(np.arange(num_units), num_choices)
    one = sparse.csr_array(
        (np.ones(num_pairs), (row_p, np.arange(num_pairs))), shape=(num_units, num_pairs + 1)
    )
    solved = milp(
        np.concatenate([np.zeros(num_pairs), [1.0]]),
        integrality=np.concatenate([np.ones(num_pairs), [0]]),
        bounds=Bounds(
            np.concatenate([np.zeros(num_pairs), [lower_bound * scale - 1]]),
            np.concatenate([allowed.astype(float), [upper * scale + 1]]),
        ),
        constraints=[
            LinearConstraint(groups, -np.inf, -offset_g * scale),
            LinearConstraint(size, -np.inf, capacity),
            LinearConstraint(one, 1, 1),
        ],
        options={"mip_rel_gap": 0.0, "time_limit": 20.0},
    )
    if solved.x is None:
        return None
    index_u = solved.x[:num_pairs].reshape(num_units, num_choices).argmax(axis=1)
    if int(num_weights_u @ choice_b[index_u]) > capacity:
        return None
    return index_u, solved.status == 0
