"""Whether a difference between two variants is more than noise.

Few seeds carry little information, and this file says so instead of guessing: one seed has no interval,
and below ``MIN_SEEDS`` paired seeds no verdict is given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy import stats

from analysis import cli
from analysis.columns import PANEL, is_full_precision, is_maximized, of_panel, on_test
from analysis.intervals import summarize
from analysis.pareto import aggregate, leaders, select_cells

MIN_SEEDS = 5
ALPHA = 0.05
PAIR_COLUMNS = (*PANEL, "budget", "variant", "other", "num_pairs", "difference", "low", "high", "p_value")
Test = Literal["ttest", "wilcoxon"]
Verdict = Literal["better", "no evidence", "worse", "cannot be told"]


@dataclass(frozen=True, kw_only=True)
class PairedTest:
    """Mean of paired differences, its interval and the two-sided p-value; NaN where they do not exist."""

    num_pairs: int
    mean: float
    low: float
    high: float
    p_value: float


def paired_test(differences: Any, *, test: Test = "ttest") -> PairedTest:
    """Test whether paired differences have mean (``ttest``) or centre (``wilcoxon``) zero.

    The t-test is the default because Wilcoxon's signed ranks cannot fall below p = 0.0625 with five pairs.
    Differences that all agree have no variance to test against: Wilcoxon decides there.
    """
    d = np.asarray(differences, dtype=float)
    summary = summarize(d)
    if summary.num < 2:
        p_value = math.nan
    elif not d.any():
        p_value = 1.0
    elif test == "wilcoxon" or np.ptp(d) <= 1e-12 * np.abs(d).max():
        p_value = float(stats.wilcoxon(d, zero_method="zsplit", method="auto").pvalue)
    else:
        p_value = float(stats.ttest_1samp(d, 0.0).pvalue)
    return PairedTest(
        num_pairs=summary.num, mean=summary.mean, low=summary.low, high=summary.high, p_value=p_value
    )


def holm(p_values: Any) -> np.ndarray:
    """Holm's step-down adjustment, which keeps the chance of any false verdict below alpha; NaN stays NaN.

    Sorted ascending, p_(i) becomes the running maximum of (m - i) p_(i), i from 0, cut at 1.
    Source: S. Holm, Scandinavian Journal of Statistics 1979.

    >>> holm([0.01, 0.04, 0.03]).tolist()
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, dtype=float)
    adjusted = np.full(p.shape, np.nan)
    known = np.flatnonzero(np.isfinite(p))
    order = known[np.argsort(p[known], kind="stable")]
    steps = (len(order) - np.arange(len(order))) * p[order]
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def verdict(difference: float, p_value: float, num_pairs: int, *, maximize: bool) -> Verdict:
    """What an adjusted p-value says of the first of two variants, in plain words."""
    if num_pairs < MIN_SEEDS or not math.isfinite(p_value):
        return "cannot be told"
    if p_value >= ALPHA:
        return "no evidence"
    return "better" if (difference > 0) == maximize else "worse"


def compare_variants(
    cells: pd.DataFrame, *, metric: str, leaders: pd.DataFrame, test: Test = "ttest"
) -> pd.DataFrame:
    """Compare each budget's leader with every other variant at that budget, paired by seed.

    Args:
        cells: one row a cell (``pareto.select_cells``).
        metric: full metric key that is compared; with leaders chosen on validation, one on ``test/``.
        leaders: rows with the panel's columns, ``budget`` and ``variant`` (``pareto.leaders``).
        test: see ``paired_test``.

    Returns:
        One row a pair: panel, ``budget, variant, other, num_pairs, difference, low, high, p_value,
        p_holm, verdict``. ``difference`` is variant minus other; Holm's family is the panel.
    """
    rows = [row for _, leader in leaders.iterrows() for row in _pairs(cells, leader, metric, test)]
    frame = pd.DataFrame(rows, columns=list(PAIR_COLUMNS))
    if frame.empty:
        return frame.assign(p_holm=pd.Series(dtype=float), verdict=pd.Series(dtype=str))
    testable = frame["p_value"].where(frame["num_pairs"] >= MIN_SEEDS)
    frame["p_holm"] = testable.groupby([frame[c] for c in PANEL]).transform(lambda p: holm(p))
    maximize = is_maximized(metric)
    numbers = zip(frame["difference"], frame["p_holm"], frame["num_pairs"], strict=True)
    frame["verdict"] = [verdict(by, p, num, maximize=maximize) for by, p, num in numbers]
    return frame


def _pairs(cells: pd.DataFrame, leader: pd.Series, metric: str, test: Test) -> list[dict[str, Any]]:
    at_budget = cells[~is_full_precision(cells) & (cells["budget"] == leader["budget"])]
    at_budget = of_panel(at_budget, leader[list(PANEL)])
    by_seed = at_budget.pivot_table(index="seed", columns="variant", values=metric, dropna=False)
    if leader["variant"] not in by_seed:
        return []
    rows = []
    for other in by_seed.columns.drop(leader["variant"]):
        result = paired_test((by_seed[leader["variant"]] - by_seed[other]).dropna(), test=test)
        rows.append(
            {
                **{column: leader[column] for column in (*PANEL, "budget", "variant")},
                "other": other,
                "num_pairs": result.num_pairs,
                "difference": result.mean,
                "low": result.low,
                "high": result.high,
                "p_value": result.p_value,
            }
        )
    return rows


def main(argv: list[str] | None = None) -> int:
    """Print each budget's leader against the others."""
    parser = cli.source_parser("analysis.stats", "Compare variants at equal budget over seeds, on test data.")
    cli.add_metric(parser)
    parser.add_argument("--test", choices=["ttest", "wilcoxon"], default="ttest", help="paired test")

    def act(arguments: Any) -> None:
        cells = select_cells(cli.read_source(arguments), metric=arguments.metric)
        print(arguments.chosen_by, end="\n\n")
        lead = leaders(aggregate(cells), metric=arguments.metric)
        result = compare_variants(cells, metric=on_test(arguments.metric), leaders=lead, test=arguments.test)
        if result.empty:
            print("No comparison: two variants must share a budget and a seed.")
            return
        print(result.to_string(index=False, float_format=lambda value: f"{value:.4g}"))

    return cli.run(parser, act, argv)


if __name__ == "__main__":
    raise SystemExit(main())
