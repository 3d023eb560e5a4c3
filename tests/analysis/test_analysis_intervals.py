from __future__ import annotations

import math

import numpy as np
import pytest
from runs_table import run_row, runs_of
from scipy import stats as scipy_stats

from analysis.intervals import image_intervals, share_interval, stratified_bootstrap, summarize
from analysis.pareto import select_cells

METRIC = "val/acc_worst"


def test_the_interval_is_students():
    values = [0.80, 0.82, 0.87]
    summary = summarize(values)
    half = scipy_stats.t.ppf(0.975, 2) * np.std(values, ddof=1) / math.sqrt(3)
    assert summary.high - summary.mean == pytest.approx(half)


@pytest.mark.parametrize("values", [[], [0.8], [0.8, 0.8], [0.8, math.nan]])
def test_there_is_no_interval_where_none_can_be_known(values):
    assert math.isnan(summarize(values).low)


def test_wilsons_interval_has_room_even_at_full_marks():
    low, high = share_interval(1.0, 20)
    assert low < 0.9
    assert high == 1.0


def test_the_bootstrap_over_images_is_that_of_single_images_drawn_within_groups():
    right_g, size_g = (40, 150), (50, 200)
    images = [np.repeat([1.0, 0.0], [k, n - k]) for k, n in zip(right_g, size_g, strict=True)]
    rng = np.random.default_rng(1)
    drawn = np.array([[rng.choice(group, len(group)).mean() for group in images] for _ in range(4000)])
    found = stratified_bootstrap([[k / n for k, n in zip(right_g, size_g, strict=True)]], [size_g])
    slow = {"acc_worst": drawn.min(axis=1), "acc_avg": drawn.mean(axis=1)}
    slow["acc_gap"] = slow["acc_avg"] - slow["acc_worst"]
    for key, values in slow.items():
        assert found[key][0] == pytest.approx(np.quantile(values, (0.025, 0.975)), abs=0.01), key


def test_the_bootstrap_of_one_group_is_close_to_the_normal_interval():
    low, high = stratified_bootstrap([[0.8]], [[10_000]])["acc_worst"][0]
    half = 1.96 * math.sqrt(0.8 * 0.2 / 10_000)
    assert (low, high) == (pytest.approx(0.8 - half, abs=1e-3), pytest.approx(0.8 + half, abs=1e-3))


def test_a_group_without_a_count_has_no_interval_and_one_that_was_not_scored_takes_no_part():
    found = stratified_bootstrap([[0.8, 0.9], [0.8, math.nan]], [[100, math.nan], [100, 3]])["acc_worst"]
    assert np.isnan(found[0]).all()
    assert found[1, 0] < 0.8 < found[1, 1]


def test_runs_without_groups_have_no_interval_over_images():
    cells = select_cells(runs_of(run_row("a", 1, 0, 0.9)), metric=METRIC)
    assert image_intervals(cells).isna().all(axis=None)
