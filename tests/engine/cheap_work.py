"""Work that costs next to nothing, for tests of the engine: results are made up, files and faults are real.

``behaviour.json`` in the output folder says how long a task takes and which attempts of which tasks go wrong:
``{"sleep_s": 0.05, "faults": [{"match": "uniform-4", "attempts": [1, 2], "do": "raise"}]}``. Every execution is noted
in ``executed.jsonl``.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from benchmarks.noop import leave_result
from fqsweep.engine.faults import limit_time, outcome_of
from fqsweep.engine.tasks import Outcome, Task
from fqsweep.files import SweepPaths, append_line


def perform(
    task: Task,
    *,
    paths: SweepPaths,
    data_dir: Path | None,
    gpus: float,
    num_threads: int,
    time_limit_s: float | None = None,
) -> Outcome:
    start = time.perf_counter()
    behaviour = json.loads((paths.out / "behaviour.json").read_text())
    seen = {
        "key": task.key,
        "title": task.title,
        "kind": task.kind,
        "attempt": task.attempt,
        "pid": os.getpid(),
    }
    seen |= {"device": "cuda" if gpus else "cpu", "threads": num_threads, **_place()}
    seen["tunables"] = os.environ.get("GLIBC_TUNABLES")
    append_line(paths.out / "executed.jsonl", {**seen, "time": time.time()}, sync=False)
    for fault in behaviour.get("faults", []):
        if fault["match"] in task.title and task.attempt in fault.get("attempts", [1, 2, 3]):
            spoiled = _go_wrong(fault["do"], paths, task, time_limit_s)
            if spoiled is not None:
                return spoiled
    time.sleep(behaviour.get("sleep_s", 0.0))
    try:
        leave_result(task, paths)
    except OSError as error:
        return outcome_of(error, seconds=0.0, log=paths.log(task.key))
    peak = behaviour.get("peak_gpu_frac", 0.0)
    return Outcome(ending="done", seconds=time.perf_counter() - start, peak_gpu_frac=peak)


def _place() -> dict[str, Any]:
    import ray

    context = ray.get_runtime_context()
    return {"node": context.get_node_id(), "gpus": context.get_assigned_resources().get("GPU", 0.0)}


def _go_wrong(what: str, paths: SweepPaths, task: Task, time_limit_s: float | None) -> Outcome | None:
    if what == "exit":
        os._exit(1)
    if what == "wait":
        while not (paths.out / "go").exists():
            time.sleep(0.05)
        return None
    if what == "no_space":
        return Outcome(ending="no_space", reason="model.fqs")
    log = paths.log(task.key)
    append_line(log, {}, sync=False)
    with log.open("a") as stream:
        stream.write("[0] start: now\n")
    if what == "hang":
        with limit_time(log, time_limit_s):
            time.sleep(600)
    return outcome_of(_error(what), seconds=0.0, log=log)


class OutOfMemoryError(RuntimeError):
    """Named like torch's; loading torch in every new worker would take most of the tests' time."""


def _error(what: str) -> Exception:
    return {
        "raise": OSError(5, "Input/output error"),
        "oom": OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        "cuda": RuntimeError("CUDA error: device-side assert triggered"),
    }[what]
