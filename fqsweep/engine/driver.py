"""The driver's books: state, ledger, studies, MLflow. No Ray, no torch.

Order on the end of a trial: its own folder (by the worker), the study, the ledger; MLflow meanwhile, by the spool's
thread. Each step can be found done or not done at the next start.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from fqsweep.cells import finetune_epochs, run_params, trial_key
from fqsweep.disk import is_full, no_space
from fqsweep.engine.estimate import CostModel
from fqsweep.engine.gpus import GpuShares
from fqsweep.engine.ledger import note, read_ledger
from fqsweep.engine.search import CellState, SweepState
from fqsweep.engine.stopping import Curve
from fqsweep.engine.studies import OptunaStudies
from fqsweep.engine.tasks import Outcome, Task
from fqsweep.files import RECORDED_FILES, SweepPaths
from fqsweep.names import budget_order, budget_with_unit
from fqsweep.progress import Snapshot
from fqsweep.results import TrialResult, read_result
from fqsweep.tracking.spool import Spool

# Written by Python's faulthandler when it ends a process that hangs.
TIMEOUT_MARK = "Timeout ("
# A shared disk may take that long to show one machine what another one wrote: NFS keeps for up to a minute that a
# file was not there.
SEEN_WITHIN_S = 90.0


@dataclass
class SweepDriver:
    """Books what happens: state, ledger, studies, MLflow."""

    paths: SweepPaths
    state: SweepState
    spool: Spool
    costs: CostModel
    shares: GpuShares
    num_slots: int = 1
    best: dict[str, tuple[float, str]] = field(default_factory=dict)
    trouble: Exception | KeyboardInterrupt | None = None
    spent_s: float = 0.0
    spent_cost: float = 0.0

    @property
    def stopped(self) -> bool:
        return self.trouble is not None

    def stop_for(self, reason: Exception | KeyboardInterrupt) -> None:
        """Hand out no more tasks; the first reason stays."""
        self.trouble = self.trouble or reason

    def next_task(self) -> Task | None:
        """The next task, noted as started; None if nothing can start now."""
        task = None
        with self._kept():
            task = self.state.next_task(self.shares.fits)
            while task is not None and self._was_done_before(task):
                task = self.state.next_task(self.shares.fits)
            if task is not None:
                self.shares.start(task)
                note(self.paths, task, "start")
        return None if self.stopped else task

    def _was_done_before(self, task: Task) -> bool:
        """Book a trial that an earlier start finished: a repeat whose search is longer now and chose the same."""
        if task.kind != "trial" or not self.paths.result(task.key).exists():
            return False
        self._book_trial(task, 0.0, is_noted=task.key in read_ledger(self.paths).done)
        return True

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        """Errors of the books are kept and raised by ``run_sweep``: never in Tune's callbacks."""
        try:
            yield
        except Exception as error:
            self.stop_for(error)

    def ended(self, task: Task, outcome: Outcome) -> None:
        """An attempt ended, and its worker said how."""
        self.shares.end(task, peak_frac=outcome.peak_gpu_frac)
        with self._kept():
            if outcome.ending == "stopped":
                # Nobody's fault, and the next start hands it out again. The worker may have seen the wish first.
                self.stop_for(KeyboardInterrupt())
                return
            if outcome.done and task.kind == "trial" and not self._sees_result(task, within_s=SEEN_WITHIN_S):
                # Not known to be lost: the next attempt, or the next start, may find it.
                file = self.paths.result(task.key)
                self._lose(task, f"its worker is done, but {file} cannot be seen from here")
            elif outcome.done:
                self._book(task, outcome.seconds)
            elif outcome.ending == "no_space":
                # Every other trial would meet the same: nothing is a failure of a cell.
                self.stop_for(no_space(outcome.reason))
            elif outcome.ending == "broken":
                self._lose(task, outcome.reason)
            elif outcome.ending == "out_of_memory" and self.shares.enlarge(task):
                reason = f"out of GPU memory; it comes again with {self.shares.of(task):.2g} of a GPU"
                self._lose(task, reason, counts=False)
            elif outcome.ending == "out_of_memory":
                self._fail(task, f"{outcome.reason}: {self.shares.advice(task)}")
            else:
                self._fail(task, outcome.reason)

    def lost(self, task: Task) -> None:
        """The worker died. If it had finished, its result counts; else the task comes again."""
        self.shares.end(task)
        with self._kept():
            words = self._last_words(task)
            if task.kind == "trial" and self._sees_result(task):
                self._book(task, 0.0)
            elif words is not None:
                self.ended(task, words)
            elif is_full(self.paths.out):
                self.stop_for(no_space(self.paths.out))
            else:
                self._lose(task, f"its worker process died (log: {self.paths.log(task.key)})")

    def _sees_result(self, task: Task, *, within_s: float = 0.0) -> bool:
        """Whether a trial's result is there, or is seen within some seconds."""
        file, end = self.paths.result(task.key), time.monotonic() + within_s
        seen = file.exists()
        while not seen:
            with contextlib.suppress(OSError):
                os.listdir(self.paths.trials)  # an NFS client that opens a folder forgets what it knew of it
            seen = file.exists()
            if seen or time.monotonic() >= end:
                break
            time.sleep(0.2)
        return seen

    def _last_words(self, task: Task) -> Outcome | None:
        """What a worker that had to end with its task left, or why it was killed."""
        left = self.paths.last_words(task.key)
        if left.exists():
            words = Outcome.model_validate_json(left.read_text(encoding="utf-8"))
            left.unlink()
            return words
        log = self.paths.log(task.key)
        since_start = (
            log.read_text(encoding="utf-8", errors="replace").rpartition("] start: ")[2] if log.exists() else ""
        )
        if TIMEOUT_MARK in since_start:
            reason = f"it took longer than resources.time_limit_s and was killed (where it was: end of {log})"
            return Outcome(ending="broken", reason=reason)
        return None

    def _lose(self, task: Task, reason: str, *, counts: bool = True) -> None:
        attempts = self.state.attempts[task.key]
        if self.state.lose(task, counts=counts):
            note(self.paths, task, "lost", reason=reason)
        else:
            self._fail(task, f"{reason} ({attempts} attempts)")

    def _fail(self, task: Task, reason: str) -> None:
        note(self.paths, task, "failed", reason=reason)
        self.state.fail(task, reason)

    def _book(self, task: Task, seconds: float) -> None:
        if seconds:
            self.spent_s += seconds
            self.spent_cost += self.costs.seconds(task)
        if task.kind != "trial":
            note(self.paths, task, "done", seconds=round(seconds, 3))
            self.state.complete(task)
            return
        self._book_trial(task, seconds, is_noted=False)

    def _book_trial(self, task: Task, seconds: float, *, is_noted: bool) -> None:
        """Take over a trial's result; ``is_noted``: the ledger has it."""
        result = self.result_of(task)
        self.record(task, result)
        self.state.complete(task, result.metrics, _curve(result))
        if not is_noted:
            self.note_end(task, result, seconds)

    def note_end(self, task: Task, result: TrialResult, seconds: float) -> None:
        """The ledger's line of a trial that is done or was stopped early."""
        saved = {"saved_epochs": finetune_epochs(task.cell) - len(result.history)} if result.pruned else {}
        note(self.paths, task, "pruned" if result.pruned else "done", seconds=round(seconds, 3), **saved)

    def result_of(self, task: Task) -> TrialResult:
        """What a trial left, under the names that the search space has now: they are no part of its key."""
        result = read_result(self.paths.result(task.key))
        params = run_params(task.cell, weights=dict(task.weights))
        return replace(result, title=task.cell.title, params=params)

    def _to_send(self, task: Task) -> tuple[TrialResult, list[Path]]:
        """What MLflow gets of a trial: its result and its files."""
        folder = self.paths.trial(task.key)
        return self.result_of(task), [folder / name for name in RECORDED_FILES if (folder / name).exists()]

    def record(self, task: Task, result: TrialResult) -> None:
        """A finished trial goes to MLflow and to the list of the best."""
        self.spool.put(task.key, partial(self._to_send, task))
        if result.pruned or "val/acc_worst" not in result.metrics:
            return
        budget, value = task.cell.budget, result.metrics["val/acc_worst"]
        if budget not in self.best or value > self.best[budget][0]:
            self.best[budget] = (value, result.params["variant"])

    def snapshot(self) -> Snapshot:
        """What the display shows."""
        left = None
        if self.spent_cost:
            left = self.state.cost_left() * (self.spent_s / self.spent_cost) / self.num_slots
        order = sorted(self.best, key=budget_order)
        return Snapshot(
            counts=self.state.counts(num_slots=self.num_slots),
            prepared=(sum(key in self.state.done for key in self.state.shared), len(self.state.shared)),
            running=tuple(task.title for task in list(self.state.running.values())[: self.num_slots]),
            best={budget_with_unit(budget): self.best[budget] for budget in order},
            seconds_left=left,
            unsent=len(self.spool.waiting) if self.spool.trouble else 0,
        )


def _curve(result: TrialResult) -> Curve:
    return Curve(epochs=result.history, whole=not result.pruned)


def adopt_finished(driver: SweepDriver, studies: OptunaStudies) -> None:
    """Take over what earlier starts finished: results on disk count, whether or not they were booked.

    Failures count too, until ``fqsweep retry`` clears them.
    """
    book = read_ledger(driver.paths)
    for leftover in driver.paths.trials.glob(".*"):
        shutil.rmtree(leftover, ignore_errors=True)  # of attempts that were cut off
    for key, task in driver.state.shared.items():
        if _whole(driver.paths, task).exists():
            driver.state.complete(task)
            if key not in book.done:
                note(driver.paths, task, "done", seconds=0.0)
        elif key in book.failed:
            driver.state.adopt_failure(task, str(book.failed[key].get("reason", "")))
    for cell in list(driver.state.cells):
        open_tasks = []
        for task in _tasks_asked_before(cell, driver.state, studies):
            if driver.paths.result(task.key).exists():
                result = driver.result_of(task)
                driver.record(task, result)
                driver.state.adopt(task, result.metrics, _curve(result))
                if task.key not in book.done:
                    driver.note_end(task, result, 0.0)
            elif task.key in book.failed:
                driver.state.adopt_failure(task, str(book.failed[task.key].get("reason", "")))
            else:
                open_tasks.append(task)
        for task in open_tasks if cell.open and cell.repeats is None else ():
            if task.weights and studies.try_again(cell.cell, task.number):
                driver.paths.checkpoint(task.key).unlink(missing_ok=True)  # the next try has another key
    driver.state.skip_unneeded()


def shared_seconds(paths: SweepPaths, shared: Mapping[str, Task]) -> float:
    """Seconds that the sweep's full-precision parents and cost tables took together.

    A parent that was trained in several attempts has its own note of them all.
    """
    done = read_ledger(paths).done
    booked = {key: float(done[key].get("seconds", 0.0)) for key in shared if key in done}
    return sum(max(seconds, _noted_seconds(paths, shared[key])) for key, seconds in booked.items())


def used_data(paths: SweepPaths, shared: Mapping[str, Task]) -> list[tuple[str, str]]:
    """Name and digest of the data that the sweep's parents were trained on, as each of them noted it."""
    notes = [_note_of(paths, task) for task in shared.values()]
    return sorted({(note["dataset"], note["data_digest"]) for note in notes if "data_digest" in note})


def _noted_seconds(paths: SweepPaths, task: Task) -> float:
    """What a parent's own note says; 0 of a cost table, and where the note was removed or cannot be seen yet."""
    return float(_note_of(paths, task).get("total_s", 0.0))


def _note_of(paths: SweepPaths, task: Task) -> dict[str, Any]:
    """What a parent noted of itself; nothing of a cost table, and where the note is gone or cannot be seen yet."""
    if task.kind != "baseline":
        return {}
    try:
        noted: dict[str, Any] = json.loads(_whole(paths, task).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return noted


def _whole(paths: SweepPaths, task: Task) -> Path:
    """The file of a parent or a cost table that is there only when it is whole."""
    return paths.baseline_meta(task.key) if task.kind == "baseline" else paths.importance(task.key)


def _tasks_asked_before(state: CellState, sweep: SweepState, studies: OptunaStudies) -> list[Task]:
    """Trials that an earlier start may have handed out; a cell that repeats stands behind the one it repeats."""
    cell = state.cell
    weights_to_repeat = sweep.weights_to_repeat(state)
    if weights_to_repeat is None:
        return []
    searches = cell.point.free_weights and state.repeats is None
    asked = studies.asked_before(cell) if searches else [(0, weights_to_repeat)]
    return [
        Task(
            key=trial_key(cell, number=number, weights=weights),
            kind="trial",
            cell=cell,
            number=number,
            weights=weights,
            needs=state.needs,
        )
        for number, weights in asked
    ]
