from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs_table import run_row, runs_of

from analysis.answers import headlines, lead_counts, recommend
from analysis.columns import BITS
from analysis.fronts import mark_front_of, objectives
from analysis.paper import caption, table_rows
from analysis.pareto import (
    aggregate,
    hypervolume,
    leaders,
    mark_front,
    more_runs_sentence,
    pareto_front,
    select_cells,
    variant_hypervolumes,
)
from analysis.rules import choose_by_rules
from analysis.stats import compare_variants
from analysis.tables import as_text
from fqsweep.errors import InputError

METRIC = "val/acc_worst"
NAN = math.nan
COORDINATES = st.integers(0, 4).map(float)  # few values, so that ties and duplicates are common
POINTS = st.lists(st.tuples(COORDINATES, COORDINATES), max_size=12)


def front_by_definition(points):
    """Fewer bits and more accuracy: marked where nobody is at least as good in both and better in one."""
    return [
        not any(b <= bits and a >= acc and (b < bits or a > acc) for b, a in points) for bits, acc in points
    ]


@given(POINTS)
@settings(max_examples=150, deadline=None)
def test_the_front_agrees_with_its_definition(points):
    assert pareto_front(points, directions=["minimize", "maximize"]).tolist() == front_by_definition(points)


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=8))
@settings(max_examples=80, deadline=None)
def test_the_hypervolume_agrees_with_counted_unit_squares(points):
    squares = sum(any(b <= x and a >= y + 1 for b, a in points) for x in range(8) for y in range(8))
    assert hypervolume(points, reference=(8, 0), directions=["minimize", "maximize"]) == pytest.approx(squares)


def test_no_points_have_no_front_and_one_point_is_its_own():
    assert pareto_front([], directions=["minimize", "maximize"]).tolist() == []
    assert pareto_front([[1, 0.5]], directions=["minimize", "maximize"]).tolist() == [True]


def test_duplicates_on_the_front_are_all_marked_and_nan_never():
    points = [[1, 0.5], [1, 0.5], [0.5, NAN], [NAN, 0.9]]
    assert pareto_front(points, directions=["minimize", "maximize"]).tolist() == [True, True, False, False]


def test_the_run_of_a_cell_is_chosen_on_validation_only():
    runs = runs_of(
        run_row("baq", 1, 0, 0.80, run_id="a", **{"test/acc_worst": 0.99}),
        run_row("baq", 1, 0, 0.82, run_id="b", **{"test/acc_worst": 0.10}),
        run_row("baq", 1, 0, NAN, run_id="c"),
    )
    cell = select_cells(runs, metric=METRIC)
    assert cell["run_id"].tolist() == ["b"]
    assert cell["num_runs"].tolist() == [2]


def test_a_metric_to_minimise_chooses_the_smallest():
    runs = runs_of(
        run_row("baq", 1, 0, 0.8, run_id="a", **{"val/acc_gap": 0.2}),
        run_row("baq", 1, 0, 0.8, run_id="b", **{"val/acc_gap": 0.1}),
    )
    assert select_cells(runs, metric="val/acc_gap")["run_id"].tolist() == ["b"]


def test_ties_do_not_depend_on_the_order_of_rows():
    rows = [run_row("baq", 1, 0, 0.8, run_id=name) for name in "cab"]
    assert select_cells(runs_of(*rows), metric=METRIC)["run_id"].item() == "a"
    assert select_cells(runs_of(*rows[::-1]), metric=METRIC)["run_id"].item() == "a"


@pytest.mark.parametrize("ids", ["ab", "ba"])
def test_ties_do_not_depend_on_the_ids_of_the_runs(ids):
    searched = [run_row("baq", 1, 0, 0.8, run_id=name, key=key) for name, key in zip(ids, "12", strict=True)]
    assert select_cells(runs_of(*searched), metric=METRIC)["run_id"].item() == ids[0]
    rows = [
        run_row("baq", 1, 0, 0.8, run_id=ids[0], key="1"),
        run_row("static", 1, 0, 0.8, run_id=ids[1], key="2"),
    ]
    cells = select_cells(runs_of(*rows), metric=METRIC)
    assert [one.run_id for one in recommend(cells, metric=METRIC)] == [ids[0]]
    minimax = next(one for one in choose_by_rules(cells, metric=METRIC) if one.rule == "minimax")
    assert minimax.run_id == ids[0]


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("test/acc_worst", "use val/acc_worst"),
        ("val/acc_wurst", "use val/acc_worst"),
        ("val/ece", "none of 1 has"),
    ],
)
def test_a_metric_that_cannot_choose_is_refused(metric, message):
    with pytest.raises(InputError, match=message):
        select_cells(runs_of(run_row("baq", 1, 0, 0.8)), metric=metric)


def test_points_average_the_chosen_runs_over_seeds():
    runs = runs_of(run_row("baq", 1, 0, 0.80), run_row("baq", 1, 1, 0.84), run_row("fp32", NAN, 0, 0.9))
    points = aggregate(select_cells(runs, metric=METRIC))
    assert points["variant"].tolist() == ["fp32", "baq"]
    baq = points.iloc[1]
    assert baq[METRIC] == pytest.approx(0.82)
    assert baq[f"{METRIC}:std"] == pytest.approx(np.std([0.80, 0.84], ddof=1))
    assert (baq["num_seeds"], baq["seeds"], baq["run_ids"]) == (2, "0 1", "baq-1-0 baq-1-1")
    assert math.isnan(points.iloc[0][f"{METRIC}:low"])


def test_the_front_is_of_validation_and_of_each_panel_alone():
    runs = runs_of(
        run_row("baq", 1, 0, 0.80),
        run_row("static", 1, 0, 0.79, **{"test/acc_worst": 0.99}),
        run_row("static", 2, 0, 0.80),
        run_row("static", 1, 0, 0.10, architecture="vit"),
    )
    points = mark_front(aggregate(select_cells(runs, metric=METRIC)), metric=METRIC)
    marked = points.loc[points["on_front"], ["architecture", "variant", "budget_bits"]]
    assert marked.to_numpy().tolist() == [["resnet18", "baq", 1.0], ["vit", "static", 1.0]]


def test_the_hypervolume_of_a_variant_is_a_share_and_leaves_full_precision_out():
    runs = runs_of(run_row("baq", 4, 0, 0.5), run_row("fp32", NAN, 0, 0.9))
    volumes = variant_hypervolumes(aggregate(select_cells(runs, metric=METRIC)), metric=METRIC)
    assert volumes["variant"].tolist() == ["baq"]
    assert volumes["hypervolume_frac"].item() == pytest.approx(0.25)


def test_leaders_are_the_best_validation_means():
    runs = runs_of(run_row("a", 1, 0, 0.7), run_row("b", 1, 0, 0.8), run_row("a", 2, 0, 0.9))
    lead = leaders(aggregate(select_cells(runs, metric=METRIC)), metric=METRIC)
    assert list(zip(lead["budget"], lead["variant"], strict=True)) == [("1", "b"), ("2", "a")]


def searched(*, num_baq: int) -> pd.DataFrame:
    """``baq`` with several runs a cell beside variants with one; three budgets."""
    rows = [run_row(v, b, 0, 0.7 + up) for b in (1, 2, 4) for v, up in (("hawq", 0.02), ("static", 0.03))]
    rows += [
        run_row("baq", b, 0, 0.7 + 0.1 * i, run_id=f"baq-{b}-{i}") for b in (1, 2, 4) for i in range(num_baq)
    ]
    return runs_of(*rows)


def level_runs() -> pd.DataFrame:
    """Means that differ in their last digit only: the same three figures in another order."""
    figures = {"static": (0.1, 0.2, 0.3), "baq": (0.3, 0.2, 0.1)}
    assert np.mean(figures["static"]) != np.mean(figures["baq"])
    rows = [run_row(v, 2, seed, val) for v, values in figures.items() for seed, val in enumerate(values)]
    rows += [run_row(v, 4, seed, 0.5 + (v == "baq")) for v in figures for seed in range(3)]
    rows += [run_row("uniform-2", 2, seed, 0.05) for seed in range(3)]
    return runs_of(*rows)


def test_a_tie_is_nobodys_win_and_both_are_on_the_front():
    cells = select_cells(level_runs(), metric=METRIC)
    points = mark_front(aggregate(cells), metric=METRIC)
    assert points[points["budget"] == "2"].set_index("variant")["on_front"].to_dict() == {
        "static": True,
        "baq": True,
        "uniform-2": False,
    }
    lead = leaders(points, metric=METRIC)
    assert lead["variant"].tolist() == ["baq", "baq"] and lead["level_with"].tolist() == [("static",), ()]
    assert lead_counts(points, metric=METRIC) == (
        "Of 2 comparisons at equal budget, the best validation mean belongs to baq in 1, and several are level in 1."
    )


def test_all_level_is_said_without_a_winner():
    runs = level_runs()
    runs = pd.concat([runs[runs["budget_bits"] == 2].assign(budget_bits=b) for b in (2, 3)], ignore_index=True)
    points = aggregate(select_cells(runs.assign(run_id=range(len(runs))), metric=METRIC))
    assert lead_counts(points, metric=METRIC) == "Of 2 comparisons at equal budget, several are level in 2."


def test_the_headline_and_the_run_to_take_name_the_same_of_two_that_are_level():
    rows = [run_row(v, 2, 0, 0.5, key=key) for v, key in (("static", "a"), ("baq", "b"))]
    cells = select_cells(runs_of(*rows), metric=METRIC)
    points = aggregate(cells)
    (answer,) = headlines(
        points, compare_variants(cells, metric=METRIC, leaders=leaders(points, metric=METRIC)), metric=METRIC
    )
    assert answer.variant == "baq"
    assert "baq and static serve the worst group best, level on validation data; with baq: " in answer.sentence
    assert [found.variant for found in recommend(cells, metric=METRIC)] == ["baq"]
    assert {choice.variant for choice in choose_by_rules(cells, metric=METRIC)} == {"baq", ""}
    bold = [texts[0] for leads, texts in table_rows(points, metric=METRIC) if leads]
    assert sorted(bold) == ["baq", "static"]


def test_of_level_variants_the_one_chosen_from_fewer_runs_leads():
    rows = [run_row("static", 2, 0, 0.5, key="a")]
    rows += [run_row("baq", 2, 0, value, key=key) for value, key in ((0.5, "b"), (0.4, "c"))]
    cells = select_cells(runs_of(*rows), metric=METRIC)
    assert leaders(aggregate(cells), metric=METRIC)["variant"].tolist() == ["static"]
    assert [found.variant for found in recommend(cells, metric=METRIC)] == ["static"]
    assert {choice.variant for choice in choose_by_rules(cells, metric=METRIC)} == {"static", ""}


def test_crumbs_of_a_budget_decide_no_front():
    rows = [
        run_row(variant, 1.5, 0, value, **{BITS: bits})
        for variant, bits, value in (
            ("a", 1.499964, 0.40),
            ("b", 1.499978, 0.42),
            ("c", 1.5, 0.42),
            ("d", 1.48, 0.41),
        )
    ]
    points = mark_front(aggregate(select_cells(runs_of(*rows), metric=METRIC)), metric=METRIC)
    assert points.loc[points["on_front"], "variant"].tolist() == ["b", "c", "d"]
    assert points["on_front"].equals(mark_front_of(points, objectives([METRIC, BITS])))


def test_a_leader_chosen_from_more_runs_than_others_is_named():
    points = aggregate(select_cells(searched(num_baq=3), metric=METRIC))
    assert dict(zip(points["variant"], points["num_runs"], strict=True)) == {"hawq": 1, "static": 1, "baq": 3}
    said = (
        "baq was chosen from up to 3 runs a cell where others have 1: its validation mean is too high by that."
    )
    assert more_runs_sentence(points, metric=METRIC) == said
    assert lead_counts(points, metric=METRIC) == (
        f"Of 3 comparisons at equal budget, the best validation mean belongs to baq in 3. {said}"
    )
    assert said in caption(points, metric=METRIC)
    assert "  runs  " in as_text(mark_front(points, metric=METRIC))


def test_equal_numbers_of_runs_and_leaders_of_one_run_are_not_spoken_of():
    equal = aggregate(select_cells(searched(num_baq=1), metric=METRIC))
    assert more_runs_sentence(equal, metric=METRIC) == ""
    assert lead_counts(equal, metric=METRIC).endswith("belongs to static in 3.")
    assert "runs" not in as_text(mark_front(equal, metric=METRIC))
    behind = searched(num_baq=3)
    behind.loc[behind["variant"] == "baq", METRIC] = 0.1
    assert more_runs_sentence(aggregate(select_cells(behind, metric=METRIC)), metric=METRIC) == ""


def test_several_leaders_are_named_with_their_numbers():
    runs = searched(num_baq=2)
    more = runs_of(*[run_row("static", 4, 0, 0.9 - 0.01 * i, run_id=f"s{i}") for i in range(3)])
    points = aggregate(select_cells(pd.concat([runs, more], ignore_index=True), metric=METRIC))
    assert more_runs_sentence(points, metric=METRIC) == (
        "baq (up to 2) and static (up to 4) were chosen from several runs a cell where others have 1: "
        "their validation means are too high by that."
    )


def test_trials_that_were_stopped_early_count_among_those_that_a_run_was_chosen_from():
    runs = searched(num_baq=1)
    stopped = {**runs[runs["variant"] == "baq"].iloc[0].to_dict(), "seed": "0"}
    runs.attrs["pruned"] = [stopped, stopped]
    cells = select_cells(runs, metric=METRIC)
    assert cells.loc[cells["variant"] == "baq", "num_runs"].tolist() == [3, 1, 1]
