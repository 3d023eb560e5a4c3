"""Spread over seeds, and whether a difference between two variants is more than noise.

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

from analysis.columns import (
    GROUP_ACCURACY,
    GROUP_COUNT,
    PANEL,
    group_names,
    is_full_precision,
    is_maximized,
    of_panel,
)

MIN_SEEDS = 5
ALPHA = 0.05
CONFIDENCE = 0.95
NUM_DRAWS, DRAWS_SEED = 2000, 0
RUNS_AT_ONCE = 200  # keeps the draws of many runs in a few MB
PAIR_COLUMNS = (*PANEL, "budget", "variant", "other", "num_pairs", "difference", "low", "high", "p_value")
Test = Literal["ttest", "wilcoxon"]
Verdict = Literal["better", "no evidence", "worse", "cannot be told"]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Mean over ``num`` seeds, standard deviation and interval; NaN where they do not exist."""

    num: int
    mean: float
    std: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class PairedTest:
    """Mean of paired differences, its interval and the two-sided p-value; NaN where they do not exist."""

    num_pairs: int
    mean: float
    low: float
    high: float
    p_value: float


def summarize(values: Any) -> Summary:
    """Mean, sample standard deviation and Student's t interval of the mean; NaN values take no part.

    The interval is mean +- t(n-1) * std / sqrt(n). It needs two different values: with one seed, or seeds
    that agree to the last digit, there is none.

    >>> summarize([0.80, 0.82, 0.84]).num
    3
    >>> summarize([0.8]).low
    nan
    """
    x = np.asarray(values, dtype=float)
    x = x[np.isfinite(x)]
    mean = float(x.mean()) if len(x) else math.nan
    std = float(x.std(ddof=1)) if len(x) > 1 else math.nan
    if len(x) > 1 and np.ptp(x) == 0:
        std = 0.0
    half = float(student_half_width(std, len(x)))
    return Summary(num=len(x), mean=mean, std=std, low=mean - half, high=mean + half)


def student_half_width(std: Any, num: Any) -> Any:
    """Half of Student's t interval of a mean; NaN where ``num`` < 2 or nothing varies. Arrays go value by value."""
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, np.where(np.asarray(num) > 1, np.asarray(num) - 1, np.nan))
    return np.where(np.asarray(std) > 0, quantile, np.nan) * std / np.sqrt(np.maximum(num, 1))


def stratified_bootstrap(accuracy_rg: Any, count_rg: Any) -> dict[str, np.ndarray]:
    """Percentile intervals of runs' worst, mean and gap of group accuracies over test images, drawn within groups.

    Drawing n images anew from a group's n, of which k were right, makes Binomial(n, k / n) right: no prediction of a
    single image is needed. Groups keep their sizes. The worst of several drawn accuracies lies lower than the worst
    itself, so that interval leans down where groups are close. Source: B. Efron, Annals of Statistics 1979.

    Args:
        accuracy_rg: fractions, (runs, groups); NaN where a run lacks a group.
        count_rg: test images of each group, same shape; a run with a group of unknown size has no interval.

    Returns:
        ``acc_worst``, ``acc_avg``, ``acc_gap``: (runs, 2), low and high, NaN where there is none.

    >>> found = stratified_bootstrap([[0.8, 0.9]], [[100, 400]])
    >>> found["acc_worst"].round(2).tolist()
    [[0.72, 0.87]]
    """
    accuracy_rg, count_rg = np.asarray(accuracy_rg, dtype=float), np.asarray(count_rg, dtype=float)
    known_rg = np.isfinite(accuracy_rg)
    sound_r = known_rg.any(axis=1) & np.where(known_rg, count_rg >= 1, True).all(axis=1)
    right_rg = np.where(known_rg, np.rint(np.nan_to_num(accuracy_rg * count_rg)), 0)
    size_rg = np.where(known_rg & (count_rg >= 1), count_rg, 1)
    rng = np.random.default_rng(DRAWS_SEED)
    drawn_brg = (
        rng.binomial(size_rg.astype(int), right_rg / size_rg, size=(NUM_DRAWS, *size_rg.shape)) / size_rg
    )
    worst_br = np.where(known_rg, drawn_brg, 1.0).min(axis=2, initial=1.0)
    mean_br = np.where(known_rg, drawn_brg, 0.0).sum(axis=2) / np.maximum(known_rg.sum(axis=1), 1)
    ends = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    drawn = {"acc_worst": worst_br, "acc_avg": mean_br, "acc_gap": mean_br - worst_br}
    return {
        key: np.where(sound_r[:, None], np.quantile(values_br, ends, axis=0).T, np.nan)
        for key, values_br in drawn.items()
    }


def image_intervals(cells: pd.DataFrame) -> pd.DataFrame:
    """``stratified_bootstrap`` of each run on test data, as columns such as ``test/acc_worst:images_low``."""
    names = group_names(cells, split="test")
    accuracy_rg = cells[[f"test/{GROUP_ACCURACY}{name}" for name in names]].to_numpy(dtype=float)
    count_rg = cells.reindex(columns=[f"test/{GROUP_COUNT}{name}" for name in names]).to_numpy(dtype=float)
    parts = []
    for start in range(0, len(cells), RUNS_AT_ONCE):
        rows = slice(start, start + RUNS_AT_ONCE)
        found = stratified_bootstrap(accuracy_rg[rows], count_rg[rows])
        ends = {
            f"test/{key}:images_{end}": v[:, i]
            for key, v in found.items()
            for i, end in enumerate(("low", "high"))
        }
        parts.append(pd.DataFrame(ends, index=cells.index[rows]))
    return pd.concat(parts)


def share_interval(share_frac: float, count: int) -> tuple[float, float]:
    """Wilson's interval of an accuracy measured on ``count`` images: the noise of the images themselves.

    Source: E. B. Wilson, JASA 1927.

    >>> low, high = share_interval(0.8, 100)
    >>> round(low, 2), round(high, 2)
    (0.71, 0.87)
    """
    interval = stats.binomtest(round(share_frac * count), count).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


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
    from analysis import cli
    from analysis.columns import on_test
    from analysis.pareto import aggregate, leaders, select_cells

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
