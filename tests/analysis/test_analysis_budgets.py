"""Budgets of both kinds, in bits per weight and in bytes on disk, side by side and in old records."""

from __future__ import annotations

import math

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs_table import run_row, runs_of

from analysis.answers import recommend
from analysis.columns import budgets, is_full_precision, with_budget
from analysis.pareto import aggregate, leaders, select_cells, under_budget
from analysis.report import find, summary_text, write_report
from analysis.tables import as_text
from fqsweep.names import budget_label, budget_order

METRIC = "val/acc_worst"
NAN = math.nan


def bytes_row(variant: str, budget_bytes: float, seed: int, val: float, **values: object) -> dict[str, object]:
    size = {"budget_bytes": budget_bytes, "size/packed_bytes": budget_bytes - 10, "bits/mean_weight": 1.9}
    values.setdefault("run_id", f"{variant}-{budget_bytes:g}B-{seed}")
    return run_row(variant, NAN, seed, val, **(size | values))


def both_kinds() -> pd.DataFrame:
    return runs_of(
        run_row("fp32", NAN, 0, 0.90, method="fp32", **{"size/packed_bytes": 44e6}),
        run_row("static", 2, 0, 0.80, method="static", **{"size/packed_bytes": 2.9e6}),
        run_row("baq", 2, 0, 0.82, method="baq", **{"size/packed_bytes": 2.9e6}),
        bytes_row("static", 1_500_000, 0, 0.70, method="static"),
        bytes_row("baq", 1_500_000, 0, 0.60, method="baq"),
        bytes_row("baq", 900_000, 0, 0.50, method="baq"),
    )


def test_budgets_in_bytes_are_no_full_precision_and_come_after_those_in_bits():
    points = aggregate(select_cells(both_kinds(), metric=METRIC))
    assert budgets(points) == ["2", "900 kB", "1.5 MB"]
    assert points.loc[is_full_precision(points), "variant"].tolist() == ["fp32"]
    assert points["budget"].tolist() == ["none", "2", "2", "900 kB", "1.5 MB", "1.5 MB"]


def test_each_kind_of_budget_has_its_leader():
    lead = leaders(aggregate(select_cells(both_kinds(), metric=METRIC)), metric=METRIC)
    assert dict(zip(lead["budget"], lead["variant"], strict=True)) == {
        "2": "baq",
        "900 kB": "baq",
        "1.5 MB": "static",
    }


def test_what_fits_a_budget_in_bytes_is_told_by_the_file():
    cells = select_cells(both_kinds(), metric=METRIC)
    assert set(under_budget(cells, "1.5 MB")["run_id"]) == {
        "static-1.5e+06B-0",
        "baq-1.5e+06B-0",
        "baq-900000B-0",
    }
    assert set(under_budget(cells, "2")["budget"]) == {"2", "900 kB", "1.5 MB"}


def test_tables_answers_and_the_page_name_both_kinds(tmp_path):
    findings = find(both_kinds(), sweep="s", metric=METRIC)
    text = summary_text(findings)
    assert "1.5 MB" in as_text(findings.points)
    assert "At 2 bits per weight, baq serves the worst group best" in text
    assert "below full precision" in text
    page = write_report(findings, tmp_path)[0].read_text()
    assert "1.5 MB" in page
    assert "Where budgets are in bytes, the smallest is the one with the smallest file" in page


WIDE = run_row("uniform-8", 8, 0, 0.90, method="uniform", **{"size/packed_bytes": 10.8e6})
PAIR = (run_row("static", 2, 0, 0.89, **{"size/packed_bytes": 2.9e6}), run_row("baq", 2, 0, 0.88))
PAIR_BYTES = (bytes_row("static", 1_500_000, 0, 0.89), bytes_row("baq", 1_500_000, 0, 0.88))
ALONE_BYTES = bytes_row("baq", 900_000, 0, 0.89)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ((WIDE, *PAIR_BYTES), "At 1.5 MB on disk, static serves the worst group best"),
        ((WIDE, *PAIR, *PAIR_BYTES), "At 1.5 MB on disk, static serves the worst group best"),
        ((WIDE, *PAIR, ALONE_BYTES), "At 2 bits per weight, static serves the worst group best"),
        ((WIDE, ALONE_BYTES), "At 900 kB on disk, only baq was run"),
        ((WIDE, *PAIR), "At 2 bits per weight, static serves the worst group best"),
        ((WIDE,), "At 8 bits per weight, only uniform-8 was run"),
    ],
)
def test_beside_budgets_in_bytes_the_headline_takes_the_smallest_file_that_has_a_choice(rows, said):
    findings = find(runs_of(run_row("fp32", NAN, 0, 0.90, method="fp32"), *rows), sweep="s", metric=METRIC)
    (answer,) = findings.answers
    assert answer.sentence.startswith(f"{said}: ")


def test_a_recommended_run_is_said_with_the_units_of_its_bits_and_its_file():
    reasons = {r.budget: r.reason for r in recommend(select_cells(both_kinds(), metric=METRIC), metric=METRIC)}
    assert (
        "with at most 2 bits per weight; it has 2.000 bits per weight and test/acc_worst 0.8100" in reasons["2"]
    )
    assert "it has 1.49999 MB on disk, 1.900 bits per weight and test/acc_worst 0.6900" in reasons["1.5 MB"]


def test_records_from_before_budgets_in_bytes_mean_the_same():
    old = both_kinds().iloc[:3].drop(columns=["budget_bytes", "method"])
    assert with_budget(old)["budget"].tolist() == ["none", "2", "2"]
    assert is_full_precision(with_budget(old)).tolist() == [True, False, False]


@given(st.integers(1, 10**12))
def test_the_label_of_a_budget_in_bytes_loses_nothing(num_bytes):
    assert budget_order(budget_label(NAN, num_bytes)) == (2, pytest.approx(num_bytes, rel=1e-12))


def test_a_pruned_trial_is_counted_and_left_out(small):
    assert "pruned" not in set(small["variant"])
    assert "Stopped early and left out: 1 of" in " ".join(small.attrs["notes"])
