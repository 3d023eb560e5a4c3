"""Tiny sweeps for the tests, and looking at what they left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

from mlflow import MlflowClient

from fqsweep.files import SweepPaths, read_lines
from fqsweep.names import TAG_KEY, TAG_PARENT
from fqsweep.tracking.new_database import empty_database

PROJECT = Path(__file__).resolve().parents[1]
TINY = """
name: tiny
datasets:
  - {kind: synthderm, group_attributes: [skin_tone], image_size: 32, num_images: 300, min_group_count: 5}
architectures: [test_resnet]
budgets_bits: [1, 3]
seeds: [0]
methods:
  - method: fp32
  - {method: uniform, bits: [4]}
  - {method: static, fairness_weight: {low: 0.0, high: 1.0}}
  - {method: baq, bitrate_weight: 0.01}
recipe: {epochs: EPOCHS, batch_size: 32, finetune_epochs: 1, calibration_images: 30}
search: {trials_per_cell: 2}
"""
NUM_CELLS = 6
NUM_TRIALS = 8


def write_tiny(folder: Path, *, epochs: int = 1, text: str = TINY) -> Path:
    file = folder / "tiny.yaml"
    file.write_text(text.replace("EPOCHS", str(epochs)))
    return file


# To make them through all their versions takes five seconds of a process.
_tables = cache(empty_database)


def give_database(out: Path) -> None:
    """A database for a sweep's output folder, unless it has one: its own start would make the same."""
    database = SweepPaths(out).tracking_db
    if not database.exists():
        database.parent.mkdir(parents=True, exist_ok=True)
        database.write_bytes(_tables())


def start(
    space: Path, out: Path, *more: str, new_database: bool = False, **environment: str
) -> subprocess.Popen[str]:
    """``fqsweep run`` in a process of its own, with a copied database unless a new one is part of the test."""
    if not new_database:
        give_database(out)
    command = [
        sys.executable,
        str(PROJECT / "fqsweep" / "main.py"),
        "run",
        str(space),
        "--out",
        str(out),
        *more,
    ]
    return subprocess.Popen(
        command,
        cwd=space.parent,
        env={**os.environ, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        # A shell that put pytest into the background made it, and all it starts, deaf to Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process: subprocess.Popen[str], *, timeout_s: float = 240) -> tuple[int, str]:
    output, _ = process.communicate(timeout=timeout_s)
    return process.returncode, output


def wait_for(condition: Callable[[], bool], *, what: str, timeout_s: float = 120) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"waited {timeout_s} s for {what}"
        time.sleep(0.05)


def done_trials(out: Path) -> Counter[str]:
    lines = read_lines(SweepPaths(out).ledger)
    return Counter(line["key"] for line in lines if line["event"] == "done" and line["kind"] == "trial")


def events(out: Path, name: str) -> list[dict[str, object]]:
    return [line for line in read_lines(SweepPaths(out).ledger) if line["event"] == name]


def child_keys(out: Path) -> Counter[str]:
    """Trial keys of the finished child runs of the sweep's parent."""
    client = MlflowClient(f"sqlite:///{out / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("fqsweep")
    parent = (out / "parent_run.txt").read_text().split()[-1]
    runs = client.search_runs([experiment.experiment_id], f"tags.`{TAG_PARENT}` = '{parent}'", max_results=1000)
    assert all(run.info.status == "FINISHED" for run in runs)
    return Counter(run.data.tags[TAG_KEY] for run in runs)


def kill_worker_of(driver: int) -> bool:
    """kill -9 one process that is doing a task for this driver; False if there is none yet."""
    for process in descendants(driver):
        name = Path(f"/proc/{process}/cmdline")
        try:
            words = name.read_bytes().split(b"\0")[0]
        except OSError:
            continue
        if words.startswith(b"ray::") and words.endswith(b".train"):
            os.kill(process, signal.SIGKILL)
            return True
    return False


def child_named(root: int, name: str) -> int:
    """The process id of what runs the program of that name below a process."""
    for process in descendants(root):
        if Path(os.fsdecode(Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")[0])).name == name:
            return process
    raise AssertionError(f"no {name} below process {root}")


def parent_of(pid: int) -> int:
    """The process id of a process's parent; 0 where it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return 0


def descendants(root: int) -> list[int]:
    """The process ids of all that a process has started, directly or not."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            parents[int(entry.name)] = int(fields[1])
    found, queue = [], [root]
    while queue:
        above = queue.pop()
        children = [child for child, parent in parents.items() if parent == above]
        found += children
        queue += children
    return found
