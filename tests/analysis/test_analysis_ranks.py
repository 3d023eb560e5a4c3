from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from runs_table import run_row, runs_of
from scipy import stats

from analysis.pareto import select_cells
from analysis.ranks import friedman_p, nemenyi_p, rank_variants, ranking_sentence
from analysis.rules import choose_by_rules, distance_to_ideal, rules_text

METRIC = "val/acc_worst"
BUDGETS = (0.25, 0.5, 1, 2, 3, 4, 6, 8)


SETS = tuple("klmnopqr")


def cells_of(scores: dict[str, float], *, num_budgets: int = 2, num_sets: int = 8) -> pd.DataFrame:
    rows = [
        run_row(
            variant, budget, seed, score + 0.01 * budget, dataset=name, run_id=f"{variant}{budget}{seed}{name}"
        )
        for variant, score in scores.items()
        for budget in BUDGETS[:num_budgets]
        for seed in (0, 1)
        for name in SETS[:num_sets]
    ]
    return select_cells(runs_of(*rows), metric=METRIC)


def test_friedman_is_scipys():
    value_bv = np.random.default_rng(1).random((9, 4))
    assert friedman_p(value_bv) == stats.friedmanchisquare(*value_bv.T).pvalue


def test_nemenyi_agrees_with_the_published_example():
    """Demsar 2006, section 3.2.2: four classifiers, 14 data sets, CD 1.25; ranks 3.143, 2.000, 2.893, 1.964."""
    assert nemenyi_p(1.25, 4, 14) == pytest.approx(0.05, abs=0.003)
    assert nemenyi_p(3.143 - 1.964, 4, 14) > 0.05


def test_variants_that_always_come_in_the_same_order_are_told_apart_at_the_ends():
    ranking = rank_variants(cells_of({"a": 0.6, "b": 0.5, "c": 0.4}), metric="test/acc_worst")
    assert ranking.num_blocks == 8
    assert ranking.mean_rank.to_dict() == {"a": 1.0, "b": 2.0, "c": 3.0}
    ends = ranking.pairs.set_index(["variant", "other"])["verdict"]
    assert ends["a", "c"] == "better"
    assert ends["a", "b"] == "no evidence"
    assert "a is better than c" in ranking_sentence(ranking)


def test_a_metric_to_minimise_ranks_the_least_first():
    cells = cells_of({"a": 0.6, "b": 0.5, "c": 0.4})
    cells["test/eodd"] = cells["test/acc_worst"]
    assert rank_variants(cells, metric="test/eodd").mean_rank.index[0] == "c"


def test_equal_variants_share_their_rank_and_nothing_is_claimed():
    ranking = rank_variants(cells_of({"a": 0.5, "b": 0.5, "c": 0.5}), metric="test/acc_worst")
    assert ranking.p_value == 1.0
    assert set(ranking.mean_rank) == {2.0}
    assert "No evidence" in ranking_sentence(ranking)


def test_the_budgets_of_a_data_set_are_one_block_and_few_data_sets_are_only_described():
    cells = cells_of({"a": 0.6, "b": 0.5, "c": 0.4}, num_budgets=8, num_sets=4)
    ranking = rank_variants(cells, metric="test/acc_worst")
    assert (ranking.num_comparisons, ranking.num_blocks) == (32, 4)
    assert ranking.mean_rank.to_dict() == {"a": 1.0, "b": 2.0, "c": 3.0}
    assert math.isnan(ranking.p_value)
    assert math.isnan(ranking.critical_difference)
    assert ranking.pairs.empty
    said = ranking_sentence(ranking)
    assert said.startswith("Mean ranks over 32 settings and budgets of 4 data sets (1 is best): a 1.00,")
    assert "no p-value" in said
    assert "needs 5" in said


def test_ranks_are_averaged_within_a_data_set_before_data_sets_are_compared():
    cells = cells_of({"a": 0.6, "b": 0.5, "c": 0.4}, num_budgets=3, num_sets=5)
    at_first = cells["budget"].eq("0.25") & cells["variant"].eq("c")
    cells.loc[at_first, "test/acc_worst"] = 0.9  # ranks of c: 1, 3, 3; of a: 2, 1, 1; of b: 3, 2, 2
    assert rank_variants(cells, metric="test/acc_worst").mean_rank.to_dict() == {"a": 1.0, "b": 2.5, "c": 2.5}
    few = rank_variants(cells[cells["dataset"] == "k"], metric="test/acc_worst")
    assert few.mean_rank.empty
    four = rank_variants(cells[cells["dataset"] != "k"], metric="test/acc_worst")
    assert four.mean_rank.to_dict() == pytest.approx({"a": 4 / 3, "b": 7 / 3, "c": 7 / 3})


def test_without_any_difference_a_sweep_seldom_finds_one():
    """What a variant does on a data set by chance is much the same at all budgets and in all networks of it."""
    rng = np.random.default_rng(0)
    place = pd.MultiIndex.from_product(
        [SETS, ["sex", "age"], ["net", "other"], ["1", "2", "4"], list("abcd")],
        names=["dataset", "group_attribute", "architecture", "budget", "variant"],
    ).to_frame(index=False)
    place = place.assign(seed=0, method="static")
    num_found = 0
    for _ in range(40):
        chance = {key: rng.normal() for key in place[["dataset", "variant"]].itertuples(index=False, name=None)}
        own = [chance[key] for key in zip(place["dataset"], place["variant"], strict=True)]
        cells = place.assign(**{"test/acc_worst": np.array(own) + 0.1 * rng.normal(size=len(place))})
        num_found += "better" in set(rank_variants(cells, metric="test/acc_worst").pairs["verdict"])
    assert num_found <= 4


def test_budgets_at_which_one_variant_was_run_alone_hinder_no_ranking():
    cells = pd.concat(
        [
            cells_of({"a": 0.6, "b": 0.5}, num_budgets=1, num_sets=6),
            cells_of({f"uniform-{bits}": 0.4 for bits in (2, 3)}, num_budgets=1, num_sets=6).assign(
                budget=lambda rows: rows["variant"].str[-1]
            ),
        ]
    )
    assert rank_variants(cells, metric="test/acc_worst").mean_rank.to_dict() == {"a": 1.0, "b": 2.0}


@pytest.mark.parametrize(("scores", "num"), [({"a": 0.6, "b": 0.5}, 4), ({"a": 0.5}, 8)])
def test_too_few_comparisons_or_variants_give_no_ranking(scores, num):
    ranking = rank_variants(cells_of(scores, num_budgets=num, num_sets=1), metric="test/acc_worst")
    assert math.isnan(ranking.p_value)
    assert ranking_sentence(ranking).startswith("No ranking")


def test_a_variant_of_one_budget_does_not_shrink_the_comparison():
    alone = run_row("uniform-4", 4, 0, 0.9, dataset="k")
    cells = pd.concat([cells_of({"a": 0.6, "b": 0.5, "c": 0.4}), select_cells(runs_of(alone), metric=METRIC)])
    assert rank_variants(cells, metric="test/acc_worst").num_blocks == 8


# --- selection rules -----------------------------------------------------------------------------


def three_runs() -> pd.DataFrame:
    def row(variant: str, female: float, male: float, overall: float, size: float) -> dict[str, object]:
        groups = {"val/acc_group/female": female, "val/acc_group/male": male, "val/acc_overall": overall}
        return run_row(variant, 2, 0, min(female, male), **groups, **{"size/packed_bytes": size})

    return runs_of(
        run_row("fp32", math.nan, 0, 0.95, method="fp32", **{"size/packed_bytes": 100.0}),
        row("overall", 0.95, 0.60, 0.90, 12.0),
        row("minimax", 0.72, 0.72, 0.72, 12.0),
        row("ideal", 0.90, 0.70, 0.80, 12.0),
        row("small", 0.50, 0.50, 0.50, 9.0),
    )


def test_each_rule_takes_its_own_run():
    choices = choose_by_rules(select_cells(three_runs(), metric=METRIC), metric=METRIC)
    assert {c.rule: c.variant for c in choices} == {
        "best overall": "overall",
        "minimax": "minimax",
        "distance to ideal": "ideal",
        "under a size": "small",
    }


@pytest.mark.parametrize(
    ("metric", "taken", "key", "says"),
    [
        (
            "val/balanced_acc_worst",
            "ideal",
            "balanced_acc_worst",
            "highest balanced accuracy of the worst-served",
        ),
        ("val/auc_worst", "small", "auc_worst", "highest AUC of the worst-served"),
        ("val/acc_overall", "minimax", "acc_worst", "highest accuracy of the worst-served"),
    ],
)
def test_minimax_judges_the_worst_group_by_the_metric_that_chooses(metric, taken, key, says):
    by_variant = {
        "val/balanced_acc_worst": {"ideal": 0.9},
        "val/auc_worst": {"small": 0.9},
        "test/balanced_acc_worst": {"ideal": 0.66},
        "test/auc_worst": {"small": 0.55},
        "test/acc_worst": {"minimax": 0.44},
    }
    runs = three_runs()
    runs = runs.assign(**{column: runs["variant"].map(v).fillna(0.3) for column, v in by_variant.items()})
    choices = choose_by_rules(select_cells(runs, metric=metric), metric=metric)
    (minimax,) = [choice for choice in choices if choice.rule == "minimax"]
    assert (minimax.variant, minimax.worst_metric) == (taken, f"test/{key}")
    assert minimax.test_worst == by_variant[f"test/{key}"][taken]
    assert says in minimax.reason
    assert f"test/{key} {100 * minimax.test_worst:.1f} %" in rules_text(choices)
    assert {choice.worst_metric for choice in choices} == {f"test/{key}"}


def test_the_distance_to_the_ideal_is_euclidean():
    cells = select_cells(three_runs(), metric=METRIC).set_index("variant").drop(index="fp32")
    assert distance_to_ideal(cells)["ideal"] == pytest.approx(math.hypot(0.95 - 0.90, 0.72 - 0.70))


def test_a_rule_that_cannot_choose_says_why():
    rows = three_runs()[["val/acc_worst", *run_row("a", 1, 0, 0.5)]].loc[:, lambda f: ~f.columns.duplicated()]
    cells = select_cells(rows[rows["variant"] != "fp32"], metric=METRIC)
    text = rules_text(choose_by_rules(cells.assign(**{"val/acc_overall": math.nan}), metric=METRIC))
    assert "best overall: none, because" in text
    assert "distance to ideal: none, because" in text
    assert "under a size: none, because no limit in bytes" in text
