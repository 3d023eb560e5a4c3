"""Doing one task in whatever process it lands in: no Ray, no MLflow.

Another module can stand in for this one (``SweepOptions.work``): it needs a ``perform`` like the one below.
"""

from __future__ import annotations

import contextlib
import gc
import os
import time
import traceback
import uuid
from dataclasses import asdict
from pathlib import Path

import torch

from fqsweep.baseline import ensure_baseline, ensure_importance
from fqsweep.cells import finetune_epochs, run_params
from fqsweep.checkpoints import TrainingStopped
from fqsweep.engine.faults import limit_time, outcome_of
from fqsweep.engine.gpus import usable_frac
from fqsweep.engine.stopping import is_unpromising
from fqsweep.engine.tasks import Ending, Outcome, Task
from fqsweep.files import MODEL_FILE, AttemptPaths, SweepPaths, append_line, publish, read_lines, write_json
from fqsweep.results import TrialResult
from fqsweep.setting import open_setting
from fqsweep.trial import run_trial


class TrialPruned(Exception):
    """The trial is below the bar that it was given; ``epoch``, from 0, was its last one."""

    def __init__(self, text: str, *, epoch: int) -> None:
        super().__init__(text)
        self.epoch = epoch


class LogFile:
    """A recorder that writes a task's progress to its log, line by line, and an epoch's metrics beside it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def note(self, text: str) -> None:
        """One line with the time."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} [{os.getpid()}] {text}\n")

    def log_metrics(self, metrics: dict[str, float], *, epoch: int) -> None:
        """An epoch's metrics on one line."""
        shown = " ".join(f"{name}={value:.4f}" for name, value in metrics.items())
        self.note(f"epoch {epoch + 1}: {shown}")


class TrialLog(LogFile):
    """Also keeps the epochs of a trial's own fine-tuning, and ends the trial where it falls below its bars."""

    def __init__(self, paths: SweepPaths, task: Task) -> None:
        super().__init__(paths.log(task.key))
        self.task = task
        self.curve = paths.epochs(task.key)
        self.last_epoch = finetune_epochs(task.cell) - 1

    def log_metrics(self, metrics: dict[str, float], *, epoch: int) -> None:
        """Note the epoch.

        Raises:
            TrialPruned: it is not the last epoch, and the trial is below its bar.
        """
        super().log_metrics(metrics, epoch=epoch)
        append_line(self.curve, {"epoch": epoch, **metrics}, sync=False)
        if epoch < self.last_epoch and is_unpromising(self.epochs(until=epoch), self.task.bars):
            raise TrialPruned(f"stopped early after epoch {epoch + 1} of {self.last_epoch + 1}", epoch=epoch)

    def epochs(self, *, until: int) -> list[dict[str, float]]:
        """The trial's epochs so far, also those of an attempt that was cut off before."""
        by_epoch = {int(line.pop("epoch")): line for line in read_lines(self.curve)}
        return [by_epoch[epoch] for epoch in sorted(by_epoch) if epoch <= until]


def perform(
    task: Task,
    *,
    paths: SweepPaths,
    data_dir: Path | None,
    gpus: float,
    num_threads: int,
    time_limit_s: float | None = None,
) -> Outcome:
    """Do one task; its files are the result. Failures of the task come back as an outcome, not as an exception.

    Args:
        gpus: of GPUs, what the task may take: a share below 1 is of the memory of one; 0 is the CPU.
        time_limit_s: the process is killed when the task takes longer; its log then ends with where it was.
    """
    start = time.perf_counter()
    device = "cuda" if gpus else "cpu"
    ending: Ending = "broken"
    try:
        if paths.cancel_request.exists():  # handed out just before
            return Outcome(ending="stopped")
        log = LogFile(paths.log(task.key))
        log.note(f"start: {task.title}")
        torch.set_num_threads(num_threads)
        if gpus and torch.cuda.is_available():  # without one the task itself says so
            torch.cuda.reset_peak_memory_stats()
            # Who outgrows a share runs out of memory, and none of those beside it.
            torch.cuda.set_per_process_memory_fraction(usable_frac(gpus))
        with limit_time(paths.log(task.key), time_limit_s):
            ending = _do(task, paths=paths, data_dir=data_dir, device=device, log=log)
    except TrainingStopped:
        ending = "stopped"
    except Exception as error:
        with contextlib.suppress(OSError):  # a full disk must not hide its own message
            LogFile(paths.log(task.key)).note(traceback.format_exc())
        return outcome_of(error, seconds=time.perf_counter() - start, log=paths.log(task.key))
    finally:
        _let_go(gpus, is_whole=ending == "done")
    with contextlib.suppress(OSError):  # the result is there
        log.note(ending)
    seconds = time.perf_counter() - start
    return Outcome(ending=ending, seconds=seconds, peak_gpu_frac=_peak_gpu_frac(gpus))


def _let_go(gpus: float, *, is_whole: bool) -> None:
    """Free what a task held.

    A network whose training did not end has its quantisers on, and they and the network hold each other.
    """
    if not is_whole:
        gc.collect()
    if gpus:
        with contextlib.suppress(RuntimeError):  # after a sticky error this fails too
            torch.cuda.empty_cache()


def _peak_gpu_frac(gpus: float) -> float:
    if not gpus:
        return 0.0
    return torch.cuda.max_memory_reserved() / torch.cuda.get_device_properties(0).total_memory


def _do(task: Task, *, paths: SweepPaths, data_dir: Path | None, device: str, log: LogFile) -> Ending:
    if task.kind == "trial" and paths.baseline_meta(task.cell.baseline_key).exists():
        return _do_trial(task, paths=paths, data_dir=data_dir, device=device)
    setting = open_setting(task.cell, paths=paths, data_dir=data_dir, device=device)
    if task.kind == "trial":
        ensure_baseline(setting, paths, log)
        return _do_trial(task, paths=paths, data_dir=data_dir, device=device)
    parent = ensure_baseline(setting, paths, log)
    if task.kind == "importance":
        ensure_importance(setting, parent, paths, log)
    return "done"


def _do_trial(task: Task, *, paths: SweepPaths, data_dir: Path | None, device: str) -> Ending:
    """Run the trial in a folder of this attempt's own, which becomes the trial's folder when it is whole.

    A worker that was given up as lost and lives on (its node was cut off) so never writes into the folder of the
    attempt that replaced it: the first whole result stands.
    """
    start = time.perf_counter()
    own = AttemptPaths(paths.out, attempt=f"{task.attempt}-{uuid.uuid4().hex}")
    recorder = TrialLog(paths, task)
    ending: Ending = "done"
    try:
        run_trial(
            task.cell,
            key=task.key,
            weights=dict(task.weights),
            paths=own,
            data_dir=data_dir,
            device=device,
            recorder=recorder,
        )
    except TrialPruned as stop:
        recorder.note(str(stop))
        history = recorder.epochs(until=stop.epoch)
        result = _pruned_result(task, history, seconds=time.perf_counter() - start)
        write_json(own.result(task.key), asdict(result))
        ending = "pruned"
    if ending == "done" and not (own.trial(task.key) / MODEL_FILE).exists():
        raise FileNotFoundError(
            f"{own.trial(task.key)} was emptied while it ran, by a driver that started anew"
        )
    paths.trials.mkdir(exist_ok=True)
    if not publish(own.trial(task.key), paths.trial(task.key), last=paths.result(task.key).name):
        recorder.note("another attempt was first: its result stands")
    paths.checkpoint(task.key).unlink(missing_ok=True)
    return ending


def _pruned_result(task: Task, history: list[dict[str, float]], *, seconds: float) -> TrialResult:
    """What is known of a trial that was stopped early: its epochs on validation data, never test data."""
    return TrialResult(
        key=task.key,
        title=task.cell.title,
        params=run_params(task.cell, weights=dict(task.weights)),
        weights=dict(task.weights),
        metrics={"time/total_s": seconds},
        history=history,
        pruned=True,
    )
