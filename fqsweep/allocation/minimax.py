"""Objective ``minimax``: the largest group's cost, by cutting planes on the groups' weights.

Axes: g groups, u units, b bit choices (ascending), k cuts, p pairs of unit and choice.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from fqsweep.allocation.hull import EXACT_BELOW_UNITS, Relaxed, fill, relax
from fqsweep.allocation.problem import Float, Int, spent, weighted_cost, worst_cost

MAX_CUTS = 200  # after those of single groups; far more than a handful of groups needs
CUT_TOLERANCE = 1e-4
# Of HiGHS's tree: seconds, a minute where there are many groups. Not seconds, so that all machines end alike.
MAX_NODES = 2000
# Where rounding ends further than that from the bound, so many units are chosen anew, by a tree of so many nodes.
ROUNDING_TOLERANCE = 5e-3
NUM_CHOSEN_ANEW = 40
MOST_ROWS_ANEW = 30  # of the program: groups, or pairs of six groups; more would take ten seconds
NODES_ANEW = 200


def allocate_minimax(cost_gub: Float, size_ub: Int, capacity: int, offset_g: Float) -> tuple[Int, float]:
    """Choice per unit that minimises the largest group's summed cost plus offset, and a bound; few units exactly."""
    index_u, lower_bound = _cut_planes(cost_gub, size_ub, capacity, offset_g)
    if len(size_ub) >= EXACT_BELOW_UNITS:
        return index_u, lower_bound
    upper = worst_cost(cost_gub, index_u, offset_g)
    if upper - lower_bound <= 1e-12 * abs(upper):
        return index_u, lower_bound
    exact = _solve_minimax_exactly(
        cost_gub, size_ub, capacity, offset_g, lower_bound, upper, max_nodes=MAX_NODES
    )
    if exact is None:
        return index_u, lower_bound
    found_u, proven_bound = exact
    if worst_cost(cost_gub, found_u, offset_g) > upper:
        found_u = index_u
    return found_u, min(max(lower_bound, proven_bound), worst_cost(cost_gub, found_u, offset_g))


def _cut_planes(cost_gub: Float, size_ub: Int, capacity: int, offset_g: Float) -> tuple[Int, float]:
    """Kelley's cutting planes on the groups' weights, then rounding of the best mixture.

    max over weights m in the simplex of min over allocations of m . (cost + offset) bounds the
    minimax from below; every inner minimum gives a cut. The mixture of cuts that proves the bound
    differs in few units, on which a small linear program and rounding give the allocation; a tree search over those
    units and some more where that ends far from the bound.
    """
    num_groups = len(cost_gub)
    cut_kg: list[Float] = []
    visited: list[Relaxed] = []
    best_index, best_value, bound, priced_ub = None, np.inf, -np.inf, np.zeros(size_ub.shape)
    queue = [np.full(num_groups, 1 / num_groups), *(list(np.eye(num_groups)) if num_groups > 1 else [])]
    share_k = np.ones(1)
    for _ in range(len(queue) + MAX_CUTS):
        weight_g = queue.pop(0)
        cost_ub = weighted_cost(cost_gub, weight_g)
        relaxed = relax(cost_ub, size_ub, capacity)
        own_bound = relaxed.value + float(weight_g @ offset_g)
        if own_bound > bound:
            bound = own_bound
            priced_ub = cost_ub + relaxed.price * size_ub
        visited.append(relaxed)
        cut_kg.append(_group_cost(cost_gub, relaxed) + offset_g)
        candidate = fill(relaxed, size_ub, capacity)
        value = worst_cost(cost_gub, candidate, offset_g)
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
    whole_u, split = _round_mixture(cost_gub, size_ub, capacity, offset_g, active)
    found = [best_index, _spend(cost_gub, size_ub, capacity, offset_g, whole_u)]
    best_value = min(worst_cost(cost_gub, index_u, offset_g) for index_u in found)
    is_far = best_value - bound > ROUNDING_TOLERANCE * abs(best_value)
    if is_far and len(size_ub) >= EXACT_BELOW_UNITS and num_groups <= MOST_ROWS_ANEW:
        found += _choose_anew(
            cost_gub, size_ub, capacity, offset_g, whole_u, split, priced_ub, bound, best_value
        )
    return min(found, key=lambda index_u: worst_cost(cost_gub, index_u, offset_g)), bound


def _choose_anew(
    cost_gub: Float,
    size_ub: Int,
    capacity: int,
    offset_g: Float,
    whole_u: Int,
    split: Int,
    priced_ub: Float,
    lower_bound: float,
    upper: float,
) -> list[Int]:
    """The rounded mixture with a few units chosen by a tree search: those that are split between two choices, and
    those that move some group's cost most for what the move costs at the bound's prices. Both together make up for
    what whole bits leave over. Empty where the search ends without an allocation."""
    rows = np.arange(len(whole_u))
    regret_ub = priced_ub - priced_ub[rows, whole_u][:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        move_ub = np.abs(cost_gub - cost_gub[:, rows, whole_u][:, :, None]).max(axis=0)
        # What costs more than the rounding may win cannot be part of anything better.
        rate_ub = np.where((move_ub > 0) & (regret_ub <= upper - lower_bound), regret_ub / move_ub, np.inf)
    rate_u = rate_ub.min(axis=1)
    rate_u[split] = -np.inf
    free = np.argsort(rate_u, kind="stable")[: max(NUM_CHOSEN_ANEW, len(split))]
    kept = np.setdiff1d(np.arange(len(whole_u)), free)
    solved = _solve_minimax_exactly(
        cost_gub[:, free],
        size_ub[free],
        capacity - spent(size_ub[kept], whole_u[kept]),
        offset_g + cost_gub[:, kept, whole_u[kept]].sum(axis=1),
        lower_bound,
        upper,
        max_nodes=NODES_ANEW,
    )
    if solved is None:
        return []
    found_u = whole_u.copy()
    found_u[free] = solved[0]
    return [found_u]


def _group_cost(cost_gub: Float, relaxed: Relaxed) -> Float:
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
    cost_gub: Float, size_ub: Int, capacity: int, offset_g: Float, active: list[Relaxed]
) -> tuple[Int, Int]:
    """An allocation from a mixture of relaxed solutions: where they differ, a linear program chooses.

    Returns:
        a choice per unit, and the units that a vertex of that program leaves between choices, at most (groups + 1):
        those have their smallest choice.
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
        return base_u, differs
    pairs = sorted({(int(u), int(i)) for u in differs for i in option_uk[u]})
    unit_p = np.array([u for u, _ in pairs])
    index_p = np.array([i for _, i in pairs])
    share_p = _mixture_program(cost_gub, size_ub, capacity, offset_g, base_u, unit_p, index_p)
    if share_p is None:
        return base_u, differs
    whole_u = base_u.copy()
    whole = share_p > 1 - 1e-7
    whole_u[unit_p[whole]] = index_p[whole]
    return whole_u, np.setdiff1d(differs, unit_p[whole])


def _mixture_program(
    cost_gub: Float,
    size_ub: Int,
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
    left = capacity - int(size_ub[fixed, base_u[fixed]].sum())
    cost_gp = cost_gub[:, unit_p, index_p]
    scale = float(max(np.abs(cost_gp).max(), np.abs(fixed_g).max())) or 1.0
    size_p = size_ub[unit_p, index_p].astype(np.float64)
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


def _spend(cost_gub: Float, size_ub: Int, capacity: int, offset_g: Float, index_u: Int) -> Int:
    """Raise units while the budget lasts, each time by what lowers the worst group most per bit."""
    index_u = index_u.copy()
    rows = np.arange(len(index_u))
    allowed_ub = np.isfinite(cost_gub).all(axis=0)
    left = capacity - spent(size_ub, index_u)
    for _ in range(4 * len(cost_gub) + 64):
        cost_g = cost_gub[:, rows, index_u].sum(axis=1) + offset_g
        worst = int(cost_g.argmax())
        more_ub = size_ub - size_ub[rows, index_u][:, None]
        with np.errstate(invalid="ignore"):
            gain_ub = cost_gub[worst, rows, index_u][:, None] - cost_gub[worst]
        fits_ub = (more_ub > 0) & (more_ub <= left) & allowed_ub & (gain_ub > 0)
        if not fits_ub.any():
            break
        rate_ub = np.where(fits_ub, gain_ub / np.where(more_ub > 0, more_ub, 1), -np.inf)
        unit, choice = np.unravel_index(int(rate_ub.argmax()), rate_ub.shape)
        index_u[unit] = choice
        left -= int(more_ub[unit, choice])
    return index_u


def _solve_minimax_exactly(
    cost_gub: Float,
    size_ub: Int,
    capacity: int,
    offset_g: Float,
    lower_bound: float,
    upper: float,
    *,
    max_nodes: int,
) -> tuple[Int, float] | None:
    """HiGHS on the whole problem, for few units; returns the allocation and the bound that it proved.

    Costs are scaled so that the distance from bound to best known value is 1000: the solver's absolute
    tolerance of 1e-6 then lies far below any difference that matters.
    """
    num_groups, num_units, num_choices = cost_gub.shape
    allowed = np.isfinite(cost_gub).all(axis=0).ravel()
    num_pairs = num_units * num_choices
    scale = 1e3 / max(upper - lower_bound, 1e-9 * max(abs(upper), 1e-300))
    flat_gp = np.where(allowed, cost_gub.reshape(num_groups, num_pairs), 0.0) * scale
    groups = sparse.hstack([sparse.csr_array(flat_gp), sparse.csr_array(-np.ones((num_groups, 1)))])
    size_p = size_ub.ravel()
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
        options={"mip_rel_gap": 0.0, "node_limit": max_nodes},
    )
    if solved.x is None:
        return None
    index_u = solved.x[:num_pairs].reshape(num_units, num_choices).argmax(axis=1)
    if spent(size_ub, index_u) > capacity:
        return None
    return index_u, np.inf if solved.status == 0 else float(solved.mip_dual_bound) / scale
