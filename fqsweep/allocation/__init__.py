"""Bits per unit from a cost table and a budget, with a certificate. NumPy and SciPy only.

Axes: g groups, u units, b bit choices (ascending).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fqsweep.allocation.hull import allocate_mean
from fqsweep.allocation.minimax import allocate_minimax
from fqsweep.allocation.problem import (
    Float,
    Int,
    Problem,
    chosen,
    spent,
    state_problem,
    weighted_cost,
    worst_cost,
)
from fqsweep.allocation.quantile import allocate_ranks

__all__ = ["Allocation", "allocate_bits", "allocate_by_quantile"]

Objective = Literal["mean", "minimax", "gap"]


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """Bits per unit and how good they provably are.

    Attributes:
        bits_u: int64 (u,).
        objective: what was minimised, at ``bits_u``.
        lower_bound: no allocation within the budget has a smaller objective; ``-inf`` where none is known.
        mean_bits: sum n_u b_u / sum n_u.
        spent_bits: what the allocation spends of the budget, in bits; never above it.
    """

    bits_u: Int
    objective: float
    lower_bound: float
    mean_bits: float
    spent_bits: int

    @property
    def gap_frac(self) -> float:
        """How far the objective may be from the optimum, relative to it."""
        return (self.objective - self.lower_bound) / max(abs(self.objective), 1e-300)


def allocate_bits(
    cost_gub: Float,
    num_weights_u: NDArray[np.integer],
    *,
    choices: Sequence[int],
    budget_bits: float | None = None,
    budget_bytes: int | None = None,
    side_bits: int = 0,
    objective: Objective = "mean",
    group_weights: Sequence[float] | Float | None = None,
    group_offset: Sequence[float] | Float | None = None,
) -> Allocation:
    """Choose bits per unit under a budget of mean bits per weight, or of bytes; never over it.

    - ``mean`` minimises the mean over groups (weighted by ``group_weights``) of the summed cost;
    - ``minimax`` the largest group's summed cost plus its ``group_offset``: with the groups' full-precision
      losses as offsets this is the worst resulting loss, without it the worst increase;
    - ``gap`` the largest difference between two groups' summed costs plus offsets, plus the mean cost: without
      the mean, the cheapest way to close a gap is to make the better group worse.

    Under 200 units the optimum is returned, but for instances on which the exact search has too many states
    (``mean``) or does not prove it within 2,000 nodes of a branch and bound (the others). There, and from 200 units
    on, the answer is that of hull and sort (``mean``) or of cutting planes on the groups' weights around it, or the
    best node if that is better; ``lower_bound`` says how far from the optimum it can be.

    Args:
        cost_gub: float64 (groups, units, choices); +inf forbids a choice for a unit.
        num_weights_u: weights per unit, positive whole numbers.
        choices: ascending bit-widths, one per column.
        budget_bits: mean bits per weight; or
        budget_bytes: bytes for the codes of all units and for what lies beside them.
        side_bits: with ``budget_bytes``: bits stored for every unit of more than 0 bits (its scale).
        objective: see above.
        group_weights: not negative, for ``mean`` only; equal weights where not given.
        group_offset: one number per group, for ``minimax`` and ``gap``.

    Raises:
        ValueError: the shapes do not fit, a cost is NaN, or no allocation fits the budget.

    Example:
        >>> cost = np.array([[[4.0, 1.0, 0.0], [9.0, 2.0, 0.0]]])
        >>> allocate_bits(cost, np.array([1, 1]), budget_bits=3, choices=[0, 2, 4]).bits_u.tolist()
        [2, 4]
    """
    problem = state_problem(
        cost_gub,
        num_weights_u,
        choices=choices,
        budget_bits=budget_bits,
        budget_bytes=budget_bytes,
        side_bits=side_bits,
    )
    if objective == "mean":
        cost_ub = weighted_cost(problem.cost_gub, _unit_weights(group_weights, len(problem.cost_gub)))
        index_u, lower_bound = allocate_mean(cost_ub, problem.size_ub, problem.capacity)
        value = float(chosen(cost_ub, index_u).sum())
    elif objective in ("minimax", "gap"):
        if group_weights is not None:
            raise ValueError(f"group_weights belongs to objective 'mean'; for {objective!r} scale the costs")
        table_gub, offset_g = problem.cost_gub, _offsets(group_offset, len(problem.cost_gub))
        if objective == "gap":
            table_gub, offset_g = _pairs(table_gub, offset_g)
        index_u, lower_bound = allocate_minimax(table_gub, problem.size_ub, problem.capacity, offset_g)
        value = worst_cost(table_gub, index_u, offset_g)
    else:
        raise ValueError(f"objective must be 'mean', 'minimax' or 'gap', got {objective!r}")
    return _allocation(problem, problem.choice_b[index_u], value, lower_bound)


def allocate_by_quantile(
    importance_u: Float,
    num_weights_u: NDArray[np.integer],
    *,
    choices: Sequence[int],
    budget_bits: float | None = None,
    budget_bytes: int | None = None,
    side_bits: int = 0,
) -> Allocation:
    """The paper's rule at an exact budget: units ranked by importance get the choices in fixed fractions.

    The published fractions (0.2, 0.4, 0.4 of the channels for 2, 4, 8 bits) spend what they spend. Here
    they are moved towards all-lowest or all-highest, by bisection, until the budget is as nearly
    spent as the family allows. Ties keep the units' order.

    Args:
        importance_u: float64 (u,), larger is more important.
        num_weights_u, choices, budget_bits, budget_bytes, side_bits: as for ``allocate_bits``.

    Raises:
        ValueError: no allocation fits the budget, or an importance is not finite.
    """
    importance_u = np.asarray(importance_u, dtype=np.float64)
    if not np.isfinite(importance_u).all():
        raise ValueError("importance must be finite")
    problem = state_problem(
        np.zeros((1, len(importance_u), len(choices))),
        num_weights_u,
        choices=choices,
        budget_bits=budget_bits,
        budget_bytes=budget_bytes,
        side_bits=side_bits,
    )
    index_u = allocate_ranks(importance_u, problem.size_ub, problem.capacity)
    return _allocation(problem, problem.choice_b[index_u], float("nan"), -float("inf"))


def _allocation(problem: Problem, bits_u: Int, value: float, lower_bound: float) -> Allocation:
    spent_bits = spent(problem.size_ub, np.searchsorted(problem.choice_b, bits_u))
    assert spent_bits <= problem.capacity
    return Allocation(
        bits_u=bits_u,
        objective=value,
        lower_bound=lower_bound if np.isnan(value) else min(lower_bound, value),
        mean_bits=int(problem.num_weights_u @ bits_u) / int(problem.num_weights_u.sum()),
        spent_bits=spent_bits,
    )


def _unit_weights(group_weights: Sequence[float] | Float | None, num_groups: int) -> Float:
    weight_g = np.ones(num_groups) if group_weights is None else np.asarray(group_weights, dtype=np.float64)
    if weight_g.shape != (num_groups,) or not np.isfinite(weight_g).all() or (weight_g < 0).any():
        raise ValueError(f"group_weights must be {num_groups} numbers of at least 0")
    if weight_g.sum() <= 0:
        raise ValueError("group_weights must not all be 0")
    return np.asarray(weight_g / weight_g.sum())


def _offsets(group_offset: Sequence[float] | Float | None, num_groups: int) -> Float:
    offset_g = np.zeros(num_groups) if group_offset is None else np.asarray(group_offset, dtype=np.float64)
    if offset_g.shape != (num_groups,) or not np.isfinite(offset_g).all():
        raise ValueError(f"group_offset must have one number per group ({num_groups}), got {offset_g.shape}")
    return offset_g


def _pairs(cost_gub: Float, offset_g: Float) -> tuple[Float, Float]:
    """Objective ``gap`` as a minimax over ordered pairs of groups: difference of their costs plus the mean cost."""
    num_groups = len(cost_gub)
    allowed_ub = np.isfinite(cost_gub).all(axis=0)
    finite_gub = np.where(allowed_ub, cost_gub, 0.0)
    mean_ub = finite_gub.mean(axis=0)
    pairs = [(g, h) for g in range(num_groups) for h in range(num_groups) if g != h] or [(0, 0)]
    table_pub = np.stack([finite_gub[g] - finite_gub[h] + mean_ub for g, h in pairs])
    return np.where(allowed_ub, table_pub, np.inf), np.array([offset_g[g] - offset_g[h] for g, h in pairs])
