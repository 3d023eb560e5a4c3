"""Intervals: of means over seeds, and of accuracies over the images that they were measured on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from analysis.columns import GROUP_ACCURACY, GROUP_COUNT, group_names

CONFIDENCE = 0.95
NUM_DRAWS, DRAWS_SEED = 2000, 0
RUNS_AT_ONCE = 200  # keeps the draws of many runs in a few MB


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Mean over ``num`` seeds, standard deviation and interval; NaN where they do not exist."""

    num: int
    mean: float
    std: float
    low: float
    high: float


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


def half_width(means: Any, key: str) -> Any:
    """Half of the interval over seeds of a group metric, of points or of one; NaN where there is none."""
    return (means[f"{key}:high"] - means[f"{key}:low"]) / 2


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
