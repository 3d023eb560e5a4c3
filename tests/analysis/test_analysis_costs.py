"""The sentences on cost: sharing, early stopping, energy; each also where nothing is known."""

from __future__ import annotations

import math

import pytest
from runs_table import run_row, runs_of

from analysis.columns import with_budget
from analysis.costs import cost_rows, cost_sentences, early_stopping

TIME = "time/total_s"


def runs():
    rows = [run_row("fp32", math.nan, s, 0.9, method="fp32", **{TIME: 100.0}) for s in (0, 1)]
    rows += [run_row("baq", b, s, 0.8, method="baq", **{TIME: 300.0}) for b in (1, 2) for s in (0, 1)]
    return with_budget(runs_of(*rows))


def stopped(budget_bits: float, seconds: float) -> dict[str, object]:
    return run_row("baq", budget_bits, 0, 0.5, method="baq", **{TIME: seconds})


def test_trials_of_one_network_share_it():
    text = " ".join(cost_sentences(runs()))
    assert "All finished trials took 23 min together" in text and "which they share, are not in it." in text
    assert "4 finished quantised trials start from 2 full-precision networks" in text
    assert "2 more would have been trained" in text


def test_the_time_of_shared_work_is_told_beside_that_of_the_trials():
    known = runs()
    known.attrs["shared_s"] = 600.0
    assert "cost tables, which they share, took 10 min more." in cost_sentences(known)[0]


def test_early_stopping_spares_what_finished_trials_of_its_kind_took_on_top():
    (sentence,) = early_stopping(runs(), [stopped(1, 60.0), stopped(2, 120.0)])
    assert sentence == "2 trials were stopped early, which spared about 7 min."


@pytest.mark.parametrize("pruned", [[stopped(1, math.nan)], [stopped(5, 10.0)]])
def test_what_cannot_be_compared_is_only_counted(pruned):
    assert early_stopping(runs(), pruned) == ["1 trial was stopped early."]


def test_energy_is_said_or_said_to_be_missing():
    frame = runs()
    assert "Energy was not measured" in cost_sentences(frame)[-1]
    frame.attrs["energy_kwh"] = 1.25
    assert "Energy: 1.25 kWh" in cost_sentences(frame)[-1]


def test_each_variant_has_its_time():
    assert [row[:4] for row in cost_rows(runs())] == [
        ["fp32", "2", "100 s", "3 min"],
        ["baq", "4", "5 min", "20 min"],
    ]
