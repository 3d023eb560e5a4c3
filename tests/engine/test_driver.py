"""The driver's books without Ray: what is handed out, and what an earlier start did."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from optuna.trial import TrialState

from benchmarks.noop import leave_result
from fqsweep.engine import driver
from fqsweep.engine.driver import SweepDriver, adopt_finished
from fqsweep.engine.gpus import GpuShares
from fqsweep.engine.ledger import note_driver, read_ledger
from fqsweep.engine.search import plan_sweep
from fqsweep.engine.studies import OptunaStudies
from fqsweep.engine.tasks import Outcome, Task
from fqsweep.files import SweepPaths, write_json
from fqsweep.results import TrialResult, read_result
from tests.small_spaces import small_space

REPEATED = ("{trials_per_cell: 2}", "{trials_per_cell: 2, repeat_seeds: [7]}")


class Books:
    """A driver whose spool only remembers the keys and the rows that it was given."""

    def __init__(self, folder: Path, *changes: tuple[str, str]) -> None:
        self.sent: list[str] = []
        self.variants: set[str] = set()

        def put(key: str, read: Callable[[], tuple[TrialResult, list[Path]]]) -> None:
            result, _ = read()
            assert result.key == key
            self.sent.append(key)
            self.variants.add(result.params["variant"])

        spool: Any = SimpleNamespace(put=put, waiting=[], trouble=None)
        space = small_space(folder, *changes)
        self.paths = SweepPaths(folder / "out")
        self.paths.out.mkdir(exist_ok=True)
        self.studies = OptunaStudies(space.search, self.paths.studies)
        state = plan_sweep(space, self.studies, lambda _task: 1.0)
        shares = GpuShares(0.0, total=0)
        costs: Any = SimpleNamespace(seconds=lambda _task: 1.0)
        self.driver = SweepDriver(paths=self.paths, state=state, spool=spool, costs=costs, shares=shares)
        adopt_finished(self.driver, self.studies)

    def do(self, task: Task) -> None:
        """Leave what the task's worker would, the first trial of a study the best, and book it."""
        leave_result(task, self.paths)
        if task.kind == "trial":
            result = read_result(self.paths.result(task.key))
            result.metrics["val/acc_worst"] = 1 / (2 + task.number)
            write_json(self.paths.result(task.key), asdict(result))
        self.driver._book(task, 1.0)

    def next(self) -> Task | None:
        task = self.driver.next_task()
        assert self.driver.trouble is None, self.driver.trouble
        return task

    def do_all(self) -> list[Task]:
        done = []
        while (task := self.next()) is not None:
            self.do(task)
            done.append(task)
        return done


def test_a_repeat_that_a_longer_search_chooses_again_is_booked_and_not_started(tmp_path: Path) -> None:
    first = Books(tmp_path, REPEATED)
    done = first.do_all()
    repeats = {task.key: task for task in done if task.kind == "trial" and task.cell.seed == 7 and task.weights}
    assert repeats
    before = read_ledger(first.paths).done
    longer = Books(tmp_path, ("{trials_per_cell: 2}", "{trials_per_cell: 3, repeat_seeds: [7]}"))
    again = longer.do_all()
    assert again and all(task.cell.seed != 7 for task in again), "the third trials alone"
    assert set(repeats) <= set(longer.sent) and longer.driver.state.finished
    now = read_ledger(first.paths).done
    assert all(now[key] == before[key] for key in repeats), "with the time that they took"


def test_a_row_that_was_renamed_runs_nothing_and_is_recorded_under_its_new_name(tmp_path: Path) -> None:
    first = Books(tmp_path)
    first.do_all()
    assert first.variants == {"fp32", "uniform-4", "static", "baq"}
    renamed = Books(tmp_path, ("method: baq", "method: baq\n    label: learned"))
    assert renamed.do_all() == [] and sorted(renamed.sent) == sorted(first.sent)
    assert renamed.variants == {"fp32", "uniform-4", "static", "learned"}


def test_a_searched_trial_whose_failure_was_cleared_comes_again_with_its_weights(tmp_path: Path) -> None:
    first = Books(tmp_path)
    failed = None
    while (task := first.next()) is not None:
        if failed is None and task.weights:
            failed = task
            first.paths.checkpoint(task.key).parent.mkdir(parents=True, exist_ok=True)
            first.paths.checkpoint(task.key).touch()
            first.driver._fail(task, "a passing fault")
        else:
            first.do(task)
    assert failed is not None
    assert Books(tmp_path).do_all() == [], "a failure is not tried again until it is cleared"
    note_driver(first.paths, "retry", key=failed.key)
    (again,) = Books(tmp_path).do_all()
    assert again.weights == failed.weights and again.cell.key == failed.cell.key and again.key != failed.key
    assert not first.paths.checkpoint(failed.key).exists()
    after = Books(tmp_path)
    assert after.do_all() == [] and after.driver.state.counts()["failed"] == 0
    assert len(after.studies.asked_before(failed.cell)) == 3, "nothing is left waiting in its study"


def test_who_stopped_because_it_was_told_to_has_neither_failed_nor_lost_an_attempt(tmp_path: Path) -> None:
    books = Books(tmp_path)
    task = books.next()
    assert task is not None
    books.driver.ended(task, Outcome(ending="stopped"))
    assert books.driver.stopped and books.driver.next_task() is None, "nothing more is handed out"
    book = read_ledger(books.paths)
    assert task.key not in book.done and not book.failed and book.num_lost == 0
    again = Books(tmp_path).next()
    assert again is not None and (again.key, again.attempt) == (task.key, 1)


def test_a_result_that_is_seen_late_counts_and_one_that_is_never_seen_comes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a shared disk one machine may see for a while that a file of another one is not there."""
    books = Books(tmp_path)
    while (task := books.next()) is not None and task.kind != "trial":
        books.do(task)
    assert task is not None
    late = threading.Timer(0.5, leave_result, (task, books.paths))
    late.start()
    books.driver.ended(task, Outcome(ending="done", seconds=1.0))
    assert not books.driver.stopped and task.key in read_ledger(books.paths).done
    monkeypatch.setattr(driver, "SEEN_WITHIN_S", 0.1)
    unseen = books.next()
    while unseen is not None and unseen.kind != "trial":
        books.do(unseen)
        unseen = books.next()
    assert unseen is not None
    books.driver.ended(unseen, Outcome(ending="done", seconds=1.0))
    assert not books.driver.stopped and read_ledger(books.paths).num_lost == 1
    assert unseen.key in {again.key for again in books.do_all()}


def test_a_parent_made_in_two_attempts_counts_with_the_time_of_both(tmp_path: Path) -> None:
    books = Books(tmp_path)
    books.do_all()
    shared = books.driver.state.shared
    assert driver.shared_seconds(books.paths, shared) == len(shared), "a second each"
    parent = next(task for task in shared.values() if task.kind == "baseline")
    write_json(books.paths.baseline_meta(parent.key), {"total_s": 5.0})
    assert driver.shared_seconds(books.paths, shared) == len(shared) + 4
    only = {parent.key: parent}
    assert driver.shared_seconds(books.paths, only) == 5, "what the sweep no longer needs does not count"


def test_what_failed_before_and_was_replaced_since_is_left_alone(tmp_path: Path) -> None:
    first = Books(tmp_path)
    done = first.do_all()
    searched = next(task for task in done if task.weights)
    study = first.studies._study(searched.cell)
    study.tell(study.ask(), state=TrialState.FAIL)
    assert Books(tmp_path).do_all() == []
    assert len(Books(tmp_path).studies._study(searched.cell).get_trials()) == 3


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_out_of_memory_for_good_says_what_can_be_changed(tmp_path: Path, share: float) -> None:
    """A larger share is no attempt of ``max_attempts``, and a whole GPU cannot be raised."""
    books = Books(tmp_path, ("search:", "resources: {max_attempts: 1}\nsearch:"))
    books.driver.shares = GpuShares(share, total=1)
    out_of_memory = Outcome(ending="out_of_memory", reason="out of GPU memory (log: x)")
    reasons = []
    for _ in range(2 if share < 1 else 1):
        task = books.next()
        assert task is not None and task.kind == "baseline"
        books.driver.ended(task, out_of_memory)
        reasons = [failure.reason for failure in books.driver.state.failures]
    advice = "it had a whole GPU; lower recipe.batch_size"
    assert reasons == [f"out of GPU memory (log: x): {advice}"]


def test_out_of_memory_on_a_share_that_stays_below_a_gpu_advises_a_larger_one(tmp_path: Path) -> None:
    books = Books(tmp_path)
    books.driver.shares = GpuShares(0.2, total=1)
    for _ in range(2):
        task = books.next()
        assert task is not None
        books.driver.ended(task, Outcome(ending="out_of_memory", reason="out of GPU memory"))
    (failure,) = books.driver.state.failures
    assert failure.reason == "out of GPU memory: raise resources.gpus_per_trial or lower recipe.batch_size"


def test_the_data_that_was_used_is_what_the_parents_noted(tmp_path: Path) -> None:
    books = Books(tmp_path)
    first, second = (task for task in books.driver.state.shared.values() if task.kind == "baseline")
    assert driver.used_data(books.paths, books.driver.state.shared) == []
    for task in (first, second):
        write_json(books.paths.baseline_meta(task.key), {"dataset": "skin", "data_digest": "abc"})
    assert driver.used_data(books.paths, books.driver.state.shared) == [("skin", "abc")]
