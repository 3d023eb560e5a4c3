"""Every point against one reference: paired by seed, and what the interval says."""

from __future__ import annotations

import numpy as np
import pytest
from runs_table import run_row, runs_of
from scipy import stats

from analysis import against
from analysis.against import against_reference, verdict
from analysis.pareto import select_cells
from analysis.stats import PairedTest, paired_test
from fqsweep.errors import InputError

METRIC = "test/acc_worst"
SEEDS = range(5)
FULL = np.array([0.80, 0.82, 0.78, 0.81, 0.79])
CHANGE = {
    ("static", 1.0): np.array([0.001, -0.002, 0.0, 0.002, -0.001]),
    ("uniform-2", 2.0): np.array([-0.31, -0.29, -0.30, -0.32, -0.28]),
    ("uniform-8", 8.0): np.array([0.0, 0.001, -0.001, 0.0, 0.001]),
}


def cells():
    rows = [run_row("fp32", np.nan, s, FULL[s], method="fp32", **{"size/packed_bytes": 1000.0}) for s in SEEDS]
    for (variant, budget), change in CHANGE.items():
        size = {"size/packed_bytes": 1000.0 * budget / 32}
        rows += [run_row(variant, budget, s, FULL[s] + change[s], method="static", **size) for s in SEEDS]
    return select_cells(runs_of(*rows), metric="val/acc_worst")


def test_differences_are_paired_by_seed_with_students_interval() -> None:
    found = against_reference(cells(), metric=METRIC, reference="fp32", margin_frac=0.01).set_index("variant")
    assert list(found.index) == ["static", "uniform-2", "uniform-8"]
    for (variant, _), change in CHANGE.items():
        row = found.loc[variant]
        assert row["difference"] == pytest.approx(change.mean())
        half = stats.t.ppf(0.975, 4) * change.std(ddof=1) / np.sqrt(5)
        assert (row["high"] - row["low"]) / 2 == pytest.approx(half)
    assert found["times_smaller"].tolist() == [32.0, 16.0, 4.0]
    assert found["verdict"].tolist() == ["as good", "worse by more than the margin", "as good"]


def test_any_variant_can_be_the_reference() -> None:
    found = against_reference(cells(), metric=METRIC, reference="uniform-8", margin_frac=0.01)
    assert set(found["variant"]) == {"fp32", "static", "uniform-2"}
    with pytest.raises(InputError, match="no run of the reference 'uniform-9': use one of fp32, static"):
        against_reference(cells(), metric=METRIC, reference="uniform-9", margin_frac=0.01)


def test_an_ablation_compares_within_each_budget() -> None:
    rows = [run_row("a", b, s, FULL[s] + b / 100, method="static") for s in SEEDS for b in (1.0, 2.0)]
    rows += [run_row("b", b, s, FULL[s] + b / 50, method="static") for s in SEEDS for b in (1.0, 2.0, 3.0)]
    options = {"metric": METRIC, "reference": "a", "margin_frac": 0.01, "same_budget": True}
    found = against_reference(select_cells(runs_of(*rows), metric="val/acc_worst"), **options)
    assert found["budget"].tolist() == found["reference_budget"].tolist() == ["1", "2"]
    assert found["difference"].tolist() == pytest.approx([0.01, 0.02])
    alone = [row for row in rows if row["variant"] == "a"]
    with pytest.raises(InputError, match="No other run has a budget of the reference 'a'"):
        against_reference(select_cells(runs_of(*alone), metric="val/acc_worst"), **options)


def test_the_value_is_that_of_the_seeds_whose_difference_is_shown() -> None:
    rows = [run_row("fp32", np.nan, s, FULL[s], method="fp32") for s in (0, 1)]
    rows += [run_row("static", 1, s, 0.5 if s > 1 else FULL[s]) for s in SEEDS]
    rows += [run_row("baq", 1, 4, 0.5)]
    runs = select_cells(runs_of(*rows), metric="val/acc_worst")
    found = against_reference(runs, metric=METRIC, reference="fp32", margin_frac=0.01)
    row = found.set_index("variant").loc["static"]
    assert row["value"] == row["reference"] == pytest.approx(0.80)
    page = against.as_markdown({METRIC: found}, reference="fp32", margin_points=1)
    assert "| static | 1 | 1.00 | nan | 80.0 | +0.00 (no difference in 2 seeds) | 2 | cannot be told |" in page
    assert "| baq | 1 | 1.00 | nan | – | – | 0 | cannot be told |" in page


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["acc_worst", "auc_worst"], "lies above -1 point and holds 0."),
        (["eodd"], "lies below +1 point (less is better) and holds 0."),
        (
            ["acc_worst", "eodd"],
            "lies above -1 point, where less is better (eodd) below +1 point, and holds 0.",
        ),
    ],
)
def test_what_as_good_means_is_said_for_the_direction_of_the_metric(keys: list[str], said: str) -> None:
    options = {"reference": "fp32", "margin_frac": 0.01}
    compared = {key: against_reference(cells(), metric=f"test/{key}", **options) for key in keys}
    page = against.as_markdown(compared, reference="fp32", margin_points=1)
    assert page.split("As good: the interval ")[1].startswith(f"{said}\n")


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.001, 0.004, "better"),
        (-0.004, 0.02, "as good"),
        (-0.008, -0.001, "worse, within the margin"),
        (-0.02, -0.001, "worse"),
        (-0.03, -0.011, "worse by more than the margin"),
        (-0.02, 0.02, "cannot be told"),
    ],
)
def test_the_verdict_is_what_the_interval_allows(low: float, high: float, said: str) -> None:
    result = PairedTest(num_pairs=5, mean=(low + high) / 2, low=low, high=high, p_value=0.1)
    assert verdict(result, margin_frac=0.01, maximize=True) == said
    mirrored = PairedTest(num_pairs=5, mean=-result.mean, low=-high, high=-low, p_value=0.1)
    assert verdict(mirrored, margin_frac=0.01, maximize=False) == said


def test_few_seeds_say_nothing() -> None:
    assert verdict(paired_test([-0.5, -0.4, -0.45]), margin_frac=0.01, maximize=True) == "cannot be told"


@pytest.mark.parametrize(
    ("differences", "said", "shown"),
    [
        ([0.0] * 5, "as good", "+0.00 (no difference in 5 seeds)"),
        ([0.0], "cannot be told", "+0.00 (no difference in 1 seed)"),
        ([0.01] * 5, "cannot be told", "+1.00"),
    ],
)
def test_points_that_agree_in_every_seed_are_as_good(differences: list[float], said: str, shown: str) -> None:
    rows = [run_row("fp32", np.nan, s, FULL[s], method="fp32") for s in SEEDS]
    rows = [row | {METRIC: 0.5} for row in rows]
    rows += [run_row("static", 1, s, 0.5, **{METRIC: 0.5 + by}) for s, by in enumerate(differences)]
    options = {"metric": METRIC, "reference": "fp32", "margin_frac": 0.01}
    found = against_reference(select_cells(runs_of(*rows), metric="val/acc_worst"), **options)
    assert found["verdict"].tolist() == [said]
    page = against.as_markdown({METRIC: found}, reference="fp32", margin_points=1)
    assert f"| {shown} | {len(differences)} | {said} |" in page


def test_the_page_has_each_metric_beside_each_point(small_csv, capsys) -> None:
    options = ["--csv", str(small_csv), "--reference", "static", "--show", "acc_worst", "--show", "eodd"]
    assert against.main(options) == 0
    page = capsys.readouterr().out
    assert (
        "| variant | budget | bits | times smaller | acc_worst | difference (static at 2) | seeds | verdict "
        "| eodd | difference (static at 2) | seeds | verdict |" in page
    )
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert len({line.replace(r"\|", "").count("|") for line in rows}) == 1
    assert against.main(["--csv", str(small_csv), "--show", "accuracy"]) == 2
