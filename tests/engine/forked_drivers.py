"""Drivers with cheap work in processes of their own: forked, so that a start costs no imports."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import mlflow.store.tracking.sqlalchemy_store  # noqa: F401  else each forked driver loads it
import optuna
from ray.air.execution._internal.tracked_actor_task import TrackedActorTask
from ray.tune.experiment import Trial

from fqsweep.engine import sweep as sweep_module
from fqsweep.engine.checks import Checked, Prepared
from fqsweep.engine.sweep import SweepOptions, run_sweep
from fqsweep.errors import ClusterError, InputError, TrackingError
from fqsweep.files import SweepPaths, read_lines
from fqsweep.space import load_space
from tests.small_spaces import SMALL, write_space
from tests.whole_sweeps import child_keys, done_trials, give_database

TESTS = Path(__file__).resolve().parent
MACS = {"test_resnet@32": 1e6, "resnet18@32": 1e8}
# The log of each driver that was forked, by its process id.
LOGS: dict[int, Path] = {}
CODES = {InputError: 2, TrackingError: 3, ClusterError: 7, KeyboardInterrupt: 130, OSError: 4}


def write_cheap(folder: Path, *changes: tuple[str, str], **behaviour: Any) -> tuple[Path, Path]:
    """A small search space and an output folder that says how its tasks behave."""
    text = SMALL
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    out = folder / "out"
    out.mkdir(exist_ok=True)
    give_database(out)
    behave(out, **behaviour)
    return write_space(folder, text), out


def behave(out: Path, **behaviour: Any) -> None:
    (out / "behaviour.json").write_text(json.dumps(behaviour))


def executed(out: Path) -> list[dict[str, Any]]:
    return read_lines(out / "executed.jsonl")


def fork_driver(space: Path, out: Path, **options: Any) -> int:
    """Start a driver; returns its process id. Its output goes to ``driver.log`` beside ``out``."""
    pid = os.fork()
    if pid:
        LOGS[pid] = out.parent / "driver.log"
        return pid
    code = 6
    try:
        code = _drive(space, out, **options)
    finally:
        os._exit(code)  # whatever happened: a driver that came back from here would go on as a second pytest


def _drive(space: Path, out: Path, *, counts_objects: bool = False, **options: Any) -> int:
    """Be the driver, in the forked process; returns its exit code."""
    os.setsid()
    stream = os.open(out.parent / "driver.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)
    os.environ["PYTHONPATH"] = str(TESTS)
    if counts_objects:
        _say_what_is_alive()
    # What the checks find is known here, and they would load torch at each start.
    options.setdefault("prepared", Prepared(checked=lambda: Checked(facts={}, macs=MACS), tables=None))
    try:
        summary = run_sweep(
            SweepOptions(**{"space_file": space, "out": out, "work": "tests.engine.cheap_work", **options})
        )
        print(json.dumps({"counts": summary.counts, "failures": summary.failures}), flush=True)
    except BaseException as error:
        with contextlib.suppress(OSError):  # the log may lie on the disk that is full
            traceback.print_exc()
        return next((code for kind, code in CODES.items() if isinstance(error, kind)), 5)
    return 1 if summary.failures else 0


def _say_what_is_alive() -> None:
    """Print, whenever a task ends, how many of the objects that Tune makes for each there are."""
    ends = sweep_module.TaskSearcher.on_trial_complete
    kinds = (Trial, TrackedActorTask)

    def end_and_count(self: Any, *given: Any, **named: Any) -> None:
        ends(self, *given, **named)
        gc.collect()
        alive = Counter(type(each) for each in gc.get_objects() if type(each) in kinds)
        print("alive:", json.dumps({kind.__name__: alive[kind] for kind in kinds}), flush=True)

    sweep_module.TaskSearcher.on_trial_complete = end_and_count  # type: ignore[method-assign]


def wait_driver(pid: int, *, timeout_s: float = 300) -> int:
    """The exit code of a driver; -9 where it was killed. One that hangs says in its log where, and is killed."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, signal.SIGUSR2)
    time.sleep(2)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    tail = LOGS[pid].read_text(errors="replace")[-8000:]
    raise AssertionError(f"the driver took longer than {timeout_s} s; its log ends:\n{tail}")


def run_driver(space: Path, out: Path, **options: Any) -> int:
    return wait_driver(fork_driver(space, out, **options))


def said(out: Path) -> str:
    return (out.parent / "driver.log").read_text(errors="replace")


def ended_as(out: Path) -> dict[str, Any]:
    """Counts and failures that the last driver gave."""
    lines = [line for line in said(out).splitlines() if line.startswith('{"counts"')]
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def assert_books_agree(space: Path, out: Path, *, trials: int) -> None:
    """Every trial once in the ledger, on disk, in MLflow and, where weights are free, in Optuna."""
    keys = done_trials(out)
    assert len(keys) == trials and set(keys.values()) == {1}
    assert child_keys(out) == keys
    assert {path.parent.name for path in (out / "trials").glob("*/result.json")} == set(keys)
    assert not list((out / "trials").glob(".*"))
    states: Counter[str] = Counter()
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(SweepPaths(out).studies))
    )
    for study in storage.get_all_studies():
        states.update(trial.state.name for trial in storage.get_all_trials(study._study_id))
    assert set(states) <= {"COMPLETE"}
    searched = load_space(space).search.trials_per_cell
    assert states["COMPLETE"] % searched == 0
