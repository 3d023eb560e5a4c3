"""Doing one task in whatever process it lands in: no Ray, no MLflow."""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from pathlib import Path

import torch

from fqsweep.baseline import ensure_baseline, ensure_importance
from fqsweep.errors import InputError, TrialError
from fqsweep.files import SweepPaths
from fqsweep.setting import open_setting
from fqsweep.tasks import Outcome, Task
from fqsweep.trial import run_trial


class LogFile:
    """A recorder that writes a task's progress to its log, line by line."""

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


def perform(task: Task, *, paths: SweepPaths, data_dir: Path | None, device: str, num_threads: int) -> Outcome:
    """Do one task; its files are the result. Failures of the task come back as an outcome, not as an exception."""
    start = time.perf_counter()
    log = LogFile(paths.log(task.key))
    try:
        log.note(f"start: {task.title}")
        torch.set_num_threads(num_threads)
        _do(task, paths=paths, data_dir=data_dir, device=device, log=log)
    except Exception as error:
        with contextlib.suppress(OSError):  # a full disk must not hide its own message
            log.note(traceback.format_exc())
        return Outcome(
            done=False, reason=_reason(error, paths.log(task.key)), seconds=time.perf_counter() - start
        )
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    log.note("done")
    return Outcome(done=True, seconds=time.perf_counter() - start)


def _do(task: Task, *, paths: SweepPaths, data_dir: Path | None, device: str, log: LogFile) -> None:
    if task.kind == "trial":
        run_trial(
            task.cell,
            key=task.key,
            weights=dict(task.weights),
            paths=paths,
            data_dir=data_dir,
            device=device,
            recorder=log,
        )
        return
    setting = open_setting(task.cell, paths=paths, data_dir=data_dir, device=device)
    parent = ensure_baseline(setting, paths, log)
    if task.kind == "importance":
        ensure_importance(setting, parent, paths, log)


def _reason(error: Exception, log: Path) -> str:
    """One sentence for the list of failures, ending with where to read more."""
    if isinstance(error, InputError | TrialError):
        text = str(error)
    elif isinstance(error, torch.cuda.OutOfMemoryError):
        text = "out of GPU memory; raise resources.gpus_per_trial or lower recipe.batch_size"
    elif isinstance(error, OSError) and error.errno == 28:
        text = f"no space left on the device ({error.filename or 'while writing'}); free some and run again"
    else:
        text = f"{type(error).__name__}: {error}"
    return f"{text} (log: {log})"
