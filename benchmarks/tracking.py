"""The driver's time for tracking: trials with curves, tables, pictures and packed models, on each kind of store.

    python -m benchmarks.tracking [--trials 200] [--out benchmarks/results/tracking.md]

A trial sends every metric, 12 groups' own metrics, 10 epochs and 5 files (2 MB together). PostgreSQL is left out
where ``initdb`` is not installed.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.result_file import result_parser, write_result
from fqsweep.files import SweepPaths
from fqsweep.names import RUN_PARAMS, group_metric_key, metric_keys
from fqsweep.results import TrialResult
from fqsweep.tracking.stores import default_uri
from fqsweep.tracking.tracker import open_tracker
from tests.tracking.tracking_stores import Missing, mlflow_server, postgres

NUM_EPOCHS = 10
FILES = {
    "model.fqs": 1_900_000,
    "bits.csv": 4_000,
    "bits.png": 40_000,
    "confusion.csv": 6_000,
    "confusion.png": 50_000,
}
EPOCH_METRICS = ("train/loss", *(key for key in metric_keys() if key.startswith("val/")))
LIMIT_S = 30.0  # for 200 trials


def made_up(number: int) -> TrialResult:
    """A result as large as a real one's."""
    rng = np.random.default_rng(number)
    metrics = {key: float(rng.random()) for key in metric_keys()}
    metrics |= {
        group_metric_key(split, "acc_group", f"g{i}"): 0.5 for split in ("val", "test") for i in range(6)
    }
    history = [{key: float(rng.random()) for key in EPOCH_METRICS} for _ in range(NUM_EPOCHS)]
    return TrialResult(
        key=f"key-{number}",
        title=f"trial {number}",
        params=dict.fromkeys(RUN_PARAMS, "none"),
        weights={},
        metrics=metrics,
        history=history,
    )


def measure(uri: str, paths: SweepPaths, num_trials: int) -> tuple[float, float, float]:
    """Seconds to open the store, to send all trials, and of those what this process computed."""
    files = []
    for name, size in FILES.items():
        (paths.out / name).write_bytes(os.urandom(size))
        files.append(paths.out / name)
    space = paths.out / "space.yaml"
    space.write_text("name: t")
    start = time.perf_counter()
    tracker = open_tracker(uri, paths=paths, sweep="t", space_file=space, facts={"version/torch": "1"})
    opened, computed = time.perf_counter(), time.process_time()
    for number in range(num_trials):
        assert tracker.log_trial(made_up(number), files) is not None
    return opened - start, time.perf_counter() - opened, time.process_time() - computed


@contextlib.contextmanager
def store(kind: str, folder: Path) -> Iterator[str]:
    """A store of that kind, empty."""
    if kind == "PostgreSQL":
        with postgres() as uri:
            yield uri
    elif kind == "server":
        with mlflow_server(folder) as uri:
            yield uri
    else:
        yield default_uri(SweepPaths(folder))


def report(num_trials: int) -> list[str]:
    """Measure every store; Markdown lines."""
    lines = [
        "| store | to open (s) | trials | seconds | of which CPU of the driver | ms a trial |",
        "|---|---|---|---|---|---|",
    ]
    for kind in ("sqlite", "PostgreSQL", "server"):
        with tempfile.TemporaryDirectory() as name:
            try:
                with store(kind, Path(name)) as uri:
                    open_s, send_s, cpu_s = measure(uri, SweepPaths(Path(name)), num_trials)
            except Missing as missing:
                print(f"{kind} left out: {missing}", flush=True)
                continue
        each_ms = 1000 * send_s / num_trials
        lines.append(f"| {kind} | {open_s:.1f} | {num_trials} | {send_s:.1f} | {cpu_s:.1f} | {each_ms:.0f} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Measure and write the dated result."""
    parser = result_parser(__doc__)
    parser.add_argument("--trials", type=int, default=200)
    options = parser.parse_args()
    lines = report(options.trials)
    notes = [
        "Other work beside it (load "
        f"{os.getloadavg()[1]:.1f}). A trial: {len(metric_keys())} metrics, {NUM_EPOCHS} epochs of "
        f"{len(EPOCH_METRICS)} metrics, {len(FILES)} files of {sum(FILES.values()) / 1e6:.1f} MB. Wanted: 200 trials "
        f"within {LIMIT_S:.0f} s of the driver's time (sent by a thread beside the sweep, which never waits for it). "
        "The server is one process on loopback and hands out artifacts itself.",
    ]
    write_result(options.out, title="Tracking", notes=notes, lines=lines)


if __name__ == "__main__":
    main()
