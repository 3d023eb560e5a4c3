"""Instances of the allocation problem, and their optimum by other means: every allocation tried, or HiGHS.

Axes: g groups, u units, b bit choices.
"""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import numpy as np
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

OBJECTIVES = ("mean", "minimax", "gap")


def realistic(
    seed: int, *, groups: int = 2, units: int = 60, choices: tuple[int, ...] = tuple(range(9))
) -> Any:
    """Costs that fall about fourfold a bit, units of very different size and sensitivity, groups that disagree."""
    generator = np.random.default_rng(seed)
    scale_gu = generator.lognormal(0.0, 1.5, units) * generator.lognormal(0.0, 0.7, (groups, units))
    noise_gub = generator.lognormal(0.0, 0.2, (groups, units, len(choices)))
    cost_gub = scale_gu[:, :, None] * 4.0 ** -np.array(choices, dtype=float) * noise_gub
    return cost_gub, generator.choice([9, 27, 64, 576, 1152], units)


def objective_of(cost_gub: np.ndarray, bits_u: np.ndarray, choices: Any, objective: str) -> float:
    index_u = np.searchsorted(choices, bits_u)
    total_g = cost_gub[:, np.arange(len(bits_u)), index_u].sum(axis=1)
    if objective == "gap":
        return float(total_g.max() - total_g.min() + total_g.mean())
    return float(total_g.mean() if objective == "mean" else total_g.max())


def brute_force(
    cost_gub: np.ndarray, num_weights_u: np.ndarray, *, budget_bits: float, choices: Any, objective: str
) -> float:
    """The optimum over every allocation; +inf where none fits."""
    best = np.inf
    limit = Fraction(budget_bits) * int(num_weights_u.sum()) * (1 + Fraction(1, 10**12))
    for bits in itertools.product(choices, repeat=len(num_weights_u)):
        if int(num_weights_u @ np.array(bits)) <= limit:
            best = min(best, objective_of(cost_gub, np.array(bits), choices, objective))
    return best


def by_highs(
    cost_gub: np.ndarray,
    num_weights_u: np.ndarray,
    *,
    budget_bits: float,
    choices: Any,
    objective: str,
    relaxed: bool = False,
) -> float:
    """The same problem as one dense program; ``relaxed`` lets units lie between choices."""
    num_groups, num_units, num_choices = cost_gub.shape
    pairs = num_units * num_choices
    flat_gp = cost_gub.reshape(num_groups, pairs)
    one = np.zeros((num_units, pairs + 1))
    one[np.repeat(np.arange(num_units), num_choices), np.arange(pairs)] = 1
    size = np.append(np.outer(num_weights_u, choices).ravel(), 0)
    limit = np.floor(budget_bits * num_weights_u.sum())
    if objective == "mean":
        target = np.append(flat_gp.mean(axis=0), 0)
        groups = np.zeros((1, pairs + 1))
    else:
        target = np.append(np.zeros(pairs), 1)
        rows_gp = flat_gp
        if objective == "gap":
            mean_p = flat_gp.mean(axis=0)
            rows_gp = np.array([a - b + mean_p for a in flat_gp for b in flat_gp])
        groups = np.hstack([rows_gp, -np.ones((len(rows_gp), 1))])
    if relaxed:
        solved = linprog(
            target,
            A_ub=np.vstack([groups, size]),
            b_ub=np.append(np.zeros(len(groups)), limit),
            A_eq=one,
            b_eq=np.ones(num_units),
            bounds=[(0, 1)] * pairs + [(None, None)],
        )
    else:
        solved = milp(
            target,
            integrality=np.append(np.ones(pairs), 0),
            bounds=Bounds(np.append(np.zeros(pairs), -np.inf), np.append(np.ones(pairs), np.inf)),
            constraints=[
                LinearConstraint(groups, -np.inf, 0),
                LinearConstraint(size[None], -np.inf, limit),
                LinearConstraint(one, 1, 1),
            ],
            options={"mip_rel_gap": 1e-6, "time_limit": 20.0},
        )
    assert solved.status == 0, solved.message
    return float(solved.fun)


@st.composite
def small_instances(draw: Any) -> dict[str, Any]:
    """Up to five units with small whole costs, so that ties, zeros and rising costs are common."""
    choices = sorted(draw(st.sets(st.integers(0, 8), min_size=1, max_size=4)))
    groups, units = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    count = groups * units * len(choices)
    cost = draw(st.lists(st.integers(0, 12), min_size=count, max_size=count))
    weights = draw(st.lists(st.integers(1, 9), min_size=units, max_size=units))
    budget = draw(st.floats(choices[0], choices[-1] + 1))
    return {
        "cost_gub": np.array(cost, dtype=float).reshape(groups, units, len(choices)),
        "num_weights_u": np.array(weights),
        "budget_bits": budget,
        "choices": choices,
        "objective": draw(st.sampled_from(OBJECTIVES)),
    }
