from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs_table import run_row, runs_of
from scipy import stats as scipy_stats

from analysis.pareto import aggregate, leaders, select_cells
from analysis.stats import compare_variants, holm, paired_test, verdict

METRIC = "val/acc_worst"
P_VALUES = st.lists(st.floats(0, 1), max_size=8)


@given(P_VALUES)
def test_holm_agrees_with_its_definition(p_values):
    adjusted = holm(p_values)
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    highest = 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        assert adjusted[i] == pytest.approx(highest)


def test_holm_leaves_what_was_not_tested_out_of_the_family():
    assert holm([0.01, math.nan])[0] == 0.01


def test_equal_differences_are_no_certainty():
    assert paired_test([0.0] * 6).p_value == 1.0
    assert paired_test([0.01] * 5).p_value == pytest.approx(0.0625)


def test_the_paired_test_is_scipys():
    a, b = np.array([0.8, 0.82, 0.85, 0.81, 0.84]), np.array([0.79, 0.80, 0.85, 0.80, 0.82])
    assert paired_test(a - b).p_value == pytest.approx(scipy_stats.ttest_rel(a, b).pvalue)


@pytest.mark.parametrize(
    ("difference", "p_value", "num", "maximize", "word"),
    [
        (0.1, 0.01, 5, True, "better"),
        (0.1, 0.01, 5, False, "worse"),
        (-0.1, 0.01, 5, True, "worse"),
        (0.1, 0.05, 5, True, "no evidence"),
        (0.1, 0.001, 4, True, "cannot be told"),
        (0.1, math.nan, 9, True, "cannot be told"),
    ],
)
def test_verdicts_are_plain_words(difference, p_value, num, maximize, word):
    assert verdict(difference, p_value, num, maximize=maximize) == word


def comparisons_of(num_seeds: int):
    rng = np.random.default_rng(0)
    rows = []
    for seed in range(num_seeds):
        noise = rng.normal(0, 0.002, 3)
        rows += [
            run_row(v, 1, seed, 0.8 + up + e)
            for v, up, e in zip("abc", (0.03, 0.0, 0.0295), noise, strict=True)
        ]
    cells = select_cells(runs_of(*rows), metric=METRIC)
    lead = leaders(aggregate(cells), metric=METRIC)
    return compare_variants(cells, metric="test/acc_worst", leaders=lead)


def test_five_seeds_tell_a_large_difference_from_a_small_one():
    result = comparisons_of(5).set_index("other")
    other_top = ({"a", "c"} & set(result.index)).pop()
    assert result.loc["b", "verdict"] == "better"
    assert result.loc[other_top, "verdict"] == "no evidence"
    assert (result["p_holm"] >= result["p_value"]).all()


def test_three_seeds_tell_nothing():
    assert set(comparisons_of(3)["verdict"]) == {"cannot be told"}


def test_only_common_seeds_are_paired():
    rows = [run_row("a", 1, s, 0.9) for s in (0, 1, 2)] + [run_row("b", 1, s, 0.8) for s in (2, 3)]
    cells = select_cells(runs_of(*rows), metric=METRIC)
    result = compare_variants(cells, metric=METRIC, leaders=leaders(aggregate(cells), metric=METRIC))
    assert result["num_pairs"].tolist() == [1]
    assert result["difference"].item() == pytest.approx(0.1)


def test_one_variant_alone_is_compared_with_nothing():
    cells = select_cells(runs_of(run_row("a", 1, 0, 0.9)), metric=METRIC)
    result = compare_variants(cells, metric=METRIC, leaders=leaders(aggregate(cells), metric=METRIC))
    assert result.empty
    assert "verdict" in result
