"""Work that does nothing but leave a result: what is then measured, or tested, is the engine."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from pathlib import Path

from fqsweep.cells import run_params
from fqsweep.engine.tasks import Outcome, Task
from fqsweep.files import AttemptPaths, SweepPaths, publish, write_bytes, write_json
from fqsweep.names import metric_keys
from fqsweep.results import TrialResult


def perform(
    task: Task,
    *,
    paths: SweepPaths,
    data_dir: Path | None,
    gpus: float,
    num_threads: int,
    time_limit_s: float | None = None,
) -> Outcome:
    """Stand in for ``fqsweep.engine.work.perform``."""
    start = time.perf_counter()
    leave_result(task, paths)
    return Outcome(ending="done", seconds=time.perf_counter() - start)


def leave_result(task: Task, paths: SweepPaths) -> None:
    """Write what a task of this kind leaves, with made-up contents."""
    if task.kind == "trial":
        own = AttemptPaths(paths.out, attempt=f"{task.attempt}-{os.getpid()}")
        write_json(own.result(task.key), asdict(made_up(task)))
        publish(own.trial(task.key), paths.trial(task.key), last="result.json")
    elif task.kind == "baseline":
        write_json(paths.baseline_meta(task.key), {"made": "up"})
    else:
        write_bytes(paths.importance(task.key), b"made up")


def made_up(task: Task) -> TrialResult:
    """A result whose numbers follow from the task."""
    value = int(task.key[:4], 16) / 0xFFFF
    metrics = dict.fromkeys(metric_keys(), value) | {"bits/mean_weight": task.cell.budget_bits or 32.0}
    return TrialResult(
        key=task.key,
        title=task.cell.title,
        params=run_params(task.cell, weights=dict(task.weights)),
        weights=dict(task.weights),
        metrics=metrics,
        history=[{"val/acc_worst": value}],
    )
