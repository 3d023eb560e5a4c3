"""The paper's allocation by rank, moved to an exact budget.

Axes: u units, b bit choices (ascending).
"""

from __future__ import annotations

import numpy as np

from fqsweep.allocation.problem import Float, Int, spent

QUANTILE_MIX = (0.2, 0.4, 0.4)


def allocate_ranks(importance_u: Float, size_ub: Int, capacity: int) -> Int:
    """Choice per unit, int64 (u,): the published fractions, moved until the budget is nearly spent."""
    order = np.argsort(importance_u, kind="stable")
    low, high = 0.0, 2.0
    if spent(size_ub, _ranked(order, high, size_ub.shape[1])) <= capacity:
        low = high
    while high - low > 1e-9:
        middle = (low + high) / 2
        if spent(size_ub, _ranked(order, middle, size_ub.shape[1])) <= capacity:
            low = middle
        else:
            high = middle
    return _ranked(order, low, size_ub.shape[1])


def _ranked(order: Int, level: float, num_choices: int) -> Int:
    """All-lowest at level 0, the published mix at 1, all-highest at 2; between them, straight lines."""
    end_b = np.eye(num_choices)[0 if level < 1 else -1]
    share = abs(level - 1)
    border = np.floor(np.cumsum((1 - share) * _mix(num_choices) + share * end_b) * len(order) + 1e-9).astype(
        int
    )
    index_u = np.empty(len(order), dtype=np.int64)
    index_u[order] = np.searchsorted(border[:-1], np.arange(len(order)), side="right")
    return index_u


def _mix(num_choices: int) -> Float:
    if num_choices == len(QUANTILE_MIX):
        return np.array(QUANTILE_MIX)
    return np.full(num_choices, 1 / num_choices)
