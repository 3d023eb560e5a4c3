"""What is to be allocated, checked: costs, sizes and the budget as whole numbers of bits.

Axes: g groups, u units, b bit choices (ascending).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]
Int = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A checked instance.

    Attributes:
        cost_gub: float64 (g, u, b); +inf forbids a choice.
        num_weights_u: int64 (u,).
        choice_b: int64 (b,), ascending bit-widths.
        size_ub: int64 (u, b), bits that a choice spends of the budget.
        capacity: the budget in bits.
    """

    cost_gub: Float
    num_weights_u: Int
    choice_b: Int
    size_ub: Int
    capacity: int


def state_problem(
    cost_gub: Float,
    num_weights_u: NDArray[np.integer],
    *,
    choices: Sequence[int],
    budget_bits: float | None,
    budget_bytes: int | None,
    side_bits: int,
) -> Problem:
    """Check an instance and count its budget; for arguments and errors see ``allocate_bits``."""
    cost_gub, weights_u, choice_b = _checked(cost_gub, num_weights_u, choices)
    if (budget_bits is None) == (budget_bytes is None):
        raise ValueError("give one budget: budget_bits (mean bits per weight) or budget_bytes")
    if side_bits < 0 or (side_bits and budget_bytes is None):
        raise ValueError(
            "side_bits counts what lies beside the codes: not negative, and with budget_bytes only"
        )
    size_ub = weights_u[:, None] * choice_b[None, :] + side_bits * (choice_b > 0)[None, :]
    total = int(weights_u.sum())
    if budget_bytes is not None:
        capacity, unit = 8 * int(budget_bytes), f"{budget_bytes:,} bytes"
    else:
        assert budget_bits is not None
        if not np.isfinite(budget_bits) or budget_bits < 0:
            raise ValueError(f"budget_bits must be a number of at least 0, got {budget_bits}")
        capacity, unit = int(np.floor(budget_bits * total * (1 + 1e-12))), f"{budget_bits:g}"
    allowed_ub = np.asarray(np.isfinite(cost_gub).all(axis=0))
    if not allowed_ub.any(axis=1).all():
        row = int(np.flatnonzero(~allowed_ub.any(axis=1))[0])
        raise ValueError(f"unit {row} has no allowed bit choice")
    smallest = spent(size_ub, allowed_ub.argmax(axis=1))
    if smallest > capacity:
        raise ValueError(
            f"no allocation fits: the smallest allowed bits already spend {smallest / total:.4g} mean bits "
            f"({-(-smallest // 8):,} bytes), the budget is {unit}; raise the budget or allow smaller choices"
        )
    return Problem(
        cost_gub=cost_gub, num_weights_u=weights_u, choice_b=choice_b, size_ub=size_ub, capacity=capacity
    )


def _checked(
    cost_gub: Float, num_weights_u: NDArray[np.integer], choices: Sequence[int]
) -> tuple[Float, Int, Int]:
    cost_gub = np.asarray(cost_gub, dtype=np.float64)
    if any(choice != int(choice) for choice in choices):
        raise ValueError(f"choices must be whole numbers of bits, got {list(choices)}")
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


def spent(size_ub: Int, index_u: Int) -> int:
    """Bits that an allocation spends of the budget."""
    return int(size_ub[np.arange(len(index_u)), index_u].sum())


def chosen(cost_ub: Float, index_u: Int) -> Float:
    """Each unit's cost at its choice, float64 (u,)."""
    return np.asarray(cost_ub[np.arange(len(cost_ub)), index_u])


def worst_cost(cost_gub: Float, index_u: Int, offset_g: Float) -> float:
    """The largest group's summed cost plus its offset."""
    return float((cost_gub[:, np.arange(len(index_u)), index_u].sum(axis=1) + offset_g).max())


def weighted_cost(cost_gub: Float, weight_g: Float) -> Float:
    """Sum over groups; a choice that any group forbids stays forbidden, also at weight 0."""
    finite_ub = np.isfinite(cost_gub).all(axis=0)
    cost_ub = np.einsum("g,gub->ub", weight_g, np.where(np.isfinite(cost_gub), cost_gub, 0.0))
    return np.where(finite_ub, cost_ub, np.inf)
