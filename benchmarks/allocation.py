"""Allocation side by side: hull and sort against HiGHS, and minimax over groups, at the sizes of real networks.

    python -m benchmarks.allocation [--out benchmarks/results/allocation.md]

Costs are drawn like measured ones (log-normal over units, falling by about 4 a bit, groups correlated). A time
counts only where the results agree: HiGHS must not find anything below our certificate, nor above ours by
more than its own gap.
"""

from __future__ import annotations

import itertools
import time

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from benchmarks.result_file import result_parser, write_result
from fqsweep.allocation import Allocation, allocate_bits

CHOICES = list(range(9))
BUDGETS_BITS = (0.25, 1.5, 4.0)
SIZES = {"ResNet18": 4_808, "DeiT-Tiny": 20_936, "ResNet50": 26_568}
RIVAL_BUDGET_BITS = 1.5
HIGHS_LIMIT_S = 30.0
REPEATS = 3


def draw_costs(num_units: int, num_groups: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Costs (groups, units, choices) and weights per unit."""
    rng = np.random.default_rng(seed)
    weights_u = rng.choice([64, 192, 512, 576, 768, 1152, 2304, 4608], num_units)
    size_u = rng.lognormal(0, 2, num_units) * weights_u * 1e-6
    fall_b = np.array([1.5, 0.6, *(3.0 * 4.0**-b for b in range(2, 9))])
    noise_gub = rng.lognormal(0, 0.1, (num_groups, num_units, len(CHOICES)))
    tilt_gu = rng.lognormal(0, 0.5, (num_groups, num_units))
    return size_u[None, :, None] * tilt_gu[:, :, None] * fall_b * noise_gub, weights_u


def solve_with_highs(
    cost_ub: np.ndarray, weights_u: np.ndarray, budget_bits: float
) -> tuple[float | None, float]:
    """HiGHS on the same problem: its objective (None: no solution in the limit) and its time."""
    num_units, num_choices = cost_ub.shape
    capacity = int(budget_bits * int(weights_u.sum()))
    size_p = (weights_u[:, None] * np.array(CHOICES)[None, :]).ravel().astype(float)
    rows = np.repeat(np.arange(num_units), num_choices)
    one = sparse.csr_array((np.ones(rows.size), (rows, np.arange(rows.size))))
    constraints = [
        LinearConstraint(sparse.csr_array(size_p[None, :]), -np.inf, capacity),
        LinearConstraint(one, 1, 1),
    ]
    start = time.perf_counter()
    solved = milp(
        cost_ub.ravel() / cost_ub.mean(),
        integrality=np.ones(rows.size),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"time_limit": HIGHS_LIMIT_S, "mip_rel_gap": 1e-5},
    )
    seconds = time.perf_counter() - start
    return (None if solved.x is None else float(solved.fun * cost_ub.mean())), seconds


def timed(
    cost_gub: np.ndarray, weights_u: np.ndarray, objective: str, budget_bits: float
) -> tuple[Allocation, float]:
    """The allocation and the median of a few times."""
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        found = allocate_bits(
            cost_gub, weights_u, budget_bits=budget_bits, choices=CHOICES, objective=objective
        )  # type: ignore[arg-type]
        seconds.append(time.perf_counter() - start)
    return found, float(np.median(seconds))


def measure() -> list[str]:
    """One row a size and objective, as a Markdown table."""
    rows = [
        "| units | objective | groups | budget | time (s) | gap | mean bits | HiGHS |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, num_units in SIZES.items():
        asked = itertools.product((("mean", 2), ("minimax", 2), ("minimax", 6), ("gap", 6)), BUDGETS_BITS)
        for (objective, num_groups), budget_bits in asked:
            cost_gub, weights_u = draw_costs(num_units, num_groups, seed=0)
            found, seconds = timed(cost_gub, weights_u, objective, budget_bits)
            rival = "-"
            if objective == "mean" and budget_bits == RIVAL_BUDGET_BITS:
                value, rival_s = solve_with_highs(cost_gub.mean(axis=0), weights_u, budget_bits)
                assert value is None or value >= found.lower_bound * (1 - 1e-9)
                rival = f"no solution in {rival_s:.0f} s"
                if value is not None:
                    assert value >= found.objective * (1 - 2e-5)
                    rival = f"{rival_s:.1f} s, {value / found.objective - 1:+.1e}"
            rows.append(
                f"| {num_units:,} ({name}) | {objective} | {num_groups} | {budget_bits:g} | {seconds:.2f} "
                f"| {found.gap_frac:.1e} | {found.mean_bits:.5f} | {rival} |"
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure and write the dated result."""
    parser = result_parser(__doc__)
    options = parser.parse_args()
    rows = measure()
    notes = [
        f"One thread of a 2-core machine; budgets in mean bits, choices 0..8; times are medians of {REPEATS}.",
        "HiGHS: time, and its objective relative to ours (positive: worse).",
    ]
    write_result(options.out, title="Allocation", notes=notes, lines=rows)


if __name__ == "__main__":
    main()
