"""Trials that are stopped early, as the state machine sees them: bars, curves, ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from fqsweep.engine.search import plan_sweep
from fqsweep.engine.stopping import Curve
from fqsweep.engine.tasks import Task
from tests.engine.simulation import FakeStudy, one_each, simulate
from tests.small_spaces import METRICS, small_space


def test_bars_are_set_from_the_ended_trials_of_the_same_cell(tmp_path: Path) -> None:
    space = small_space(tmp_path, ("{trials_per_cell: 2}", "{trials_per_cell: 4}"))
    state = plan_sweep(space, FakeStudy(), one_each)
    seen: dict[str, list[Task]] = {}
    while (task := state.next_task()) is not None:
        epochs = [{"val/acc_worst": 0.1 * (1 + task.number)}]
        if task.weights:
            seen.setdefault(task.cell.key, []).append(task)
        state.complete(task, METRICS, Curve(epochs=epochs, whole=task.number != 3))
    assert len(seen) == 4
    for tasks in seen.values():
        bars = [task.bars.get(0, {}).get("val/acc_worst") for task in tasks]
        assert bars == [None, None, pytest.approx(0.15), pytest.approx(0.2)]


def test_of_a_curve_no_more_is_kept_than_bars_need_and_for_as_long(tmp_path: Path) -> None:
    space = small_space(tmp_path, ("{trials_per_cell: 2}", "{trials_per_cell: 3}"))
    state = plan_sweep(space, FakeStudy(), one_each)
    curve = Curve(epochs=[{"val/acc_worst": 0.5, "val/loss": 1.0}])
    most, tasks = 0, []
    while (task := state.next_task()) is not None:
        tasks.append(task)
        state.complete(task, METRICS, curve)
        kept = [curve for cell in state.cells for curve in cell.curves]
        most = max(most, len(kept))
        assert all(curve.epochs == [{"val/acc_worst": 0.5}] and curve.whole for curve in kept)
    assert most >= 4
    assert not any(cell.curves for cell in state.cells)
    later = plan_sweep(space, FakeStudy(), one_each)
    for task in tasks:
        if task.kind == "trial":
            later.adopt(task, METRICS, curve)
        else:
            later.complete(task)
    assert later.finished and not any(cell.curves for cell in later.cells)


def test_a_last_trial_that_fails_takes_the_curves_of_its_cell_along(tmp_path: Path) -> None:
    space = small_space(tmp_path, ("{trials_per_cell: 2}", "{trials_per_cell: 3}"))
    state = plan_sweep(space, FakeStudy(), one_each)
    while (task := state.next_task()) is not None:
        if task.weights and task.number == 2:
            assert state._by_key[task.cell.key].curves
            state.fail(task, "loss is nan")
        else:
            state.complete(task, METRICS, Curve(epochs=[{"val/acc_worst": 0.5}]))
    assert state.failures and not any(cell.curves for cell in state.cells)


def test_without_a_rule_no_curve_is_kept(tmp_path: Path) -> None:
    space = small_space(tmp_path, ("{trials_per_cell: 2}", "{trials_per_cell: 3, early_stopping: none}"))
    state = plan_sweep(space, FakeStudy(), one_each)
    while (task := state.next_task()) is not None:
        state.complete(task, METRICS, Curve(epochs=[{"val/acc_worst": 0.5}]))
        assert not any(cell.curves for cell in state.cells)


def test_a_trial_that_is_stopped_early_ends_its_cell_and_is_no_failure(tmp_path: Path) -> None:
    study = FakeStudy()
    state = plan_sweep(small_space(tmp_path), study, one_each)
    while (task := state.next_task()) is not None:
        state.complete(task, METRICS, Curve(epochs=[], whole=not (task.weights and task.number == 1)))
    assert state.counts()["done"] == 12 and state.failures == []
    assert len(study.pruned) == len(study.told) == 4


def test_failures_of_an_earlier_start_are_kept_and_block_what_they_blocked(tmp_path: Path) -> None:
    space = small_space(tmp_path)
    state = plan_sweep(space, FakeStudy(), one_each)
    parent = next(t for t in state.shared.values() if t.kind == "baseline" and t.cell.seed == 1)
    state.adopt_failure(parent, "no")
    trial = next(c for c in state.cells if c.cell.seed == 0 and c.cell.point.method == "fp32")
    state.adopt_failure(Task(key="k", kind="trial", cell=trial.cell), "no")
    simulate(state, slots=2, duration=one_each)
    assert state.counts() == {"done": 5, "failed": 7, "running": 0, "waiting": 0}
    assert [len(failure.blocked) for failure in state.failures] == [6, 0]
