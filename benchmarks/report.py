"""The analysis at the size of a large sweep: 5,000 runs to a report, and 100,000 points to a front.

    python -m benchmarks.report [--runs 5000] [--points 100000] [--out benchmarks/results/report.md]

The runs are made up and written to a real sqlite store first, which is not counted.
"""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from mlflow import MlflowClient

from analysis.pareto import pareto_front
from benchmarks.result_file import result_parser, write_result
from tests.analysis.synthetic_store import Spec, grid, write_sweep

PROJECT = Path(__file__).resolve().parents[1]
LIMITS = "Wanted: the report within 30 s, no page over 8 MB, the front within 1 s."
PLACES = {"architectures": ("resnet18", "deit_tiny_patch16_224"), "attributes": ("sex", "age")}
BUDGETS = ("0.25", "0.5", "1", "1.5", "2", "3", "4", "6")


def specs(num_runs: int) -> Iterator[Spec]:
    """The first so many runs of a grid with as many seeds as that takes."""
    left = num_runs
    for seed in range(num_runs):
        for spec in grid(seeds=(seed,), budgets=BUDGETS, **PLACES):
            if left == 0:
                return
            left -= 1
            yield spec


def write_store(folder: Path, num_runs: int) -> str:
    """A sqlite store with that many finished runs; nothing is forced onto the disk, which a benchmark can lose."""
    file = folder / "mlflow.db"
    client = MlflowClient(f"sqlite:///{file}")
    client.search_experiments()
    with sqlite3.connect(file) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
    write_sweep(client, "large", specs(num_runs))
    return f"sqlite:///{file}"


def time_report(uri: str, out: Path) -> tuple[float, dict[str, int]]:
    """Seconds of the whole command, in a process of its own, and the size of each page."""
    command = [
        sys.executable,
        "-m",
        "analysis.report",
        "--tracking-uri",
        uri,
        "--sweep",
        "large",
        "--out",
        str(out),
    ]
    start = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    subprocess.run(command, cwd=PROJECT, env=environment, check=True, capture_output=True)
    taken_s = time.perf_counter() - start
    return taken_s, {page.name: page.stat().st_size for page in sorted(out.glob("*.html"))}


def time_front(num_points: int) -> tuple[float, int]:
    """Seconds to mark the front of random points in three objectives, and how many are on it."""
    points = np.random.default_rng(0).random((num_points, 3))
    start = time.perf_counter()
    marked = pareto_front(points, directions=["minimize", "maximize", "minimize"])
    return time.perf_counter() - start, int(marked.sum())


def main() -> None:
    """Measure and write the dated result."""
    parser = result_parser(__doc__)
    parser.add_argument("--runs", type=int, default=5000)
    parser.add_argument("--points", type=int, default=100_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        report_s, sizes = time_report(write_store(Path(name), options.runs), Path(name) / "report")
    front_s, on_front = time_front(options.points)
    lines = [
        "| what | measured |",
        "|---|---|",
        f"| {options.runs:,} runs, store to report | {report_s:.1f} s |",
    ]
    lines += [f"| {page} | {size / 1e6:.2f} MB |" for page, size in sizes.items()]
    lines.append(f"| {options.points:,} points to a front of {on_front} in 3 objectives | {front_s:.3f} s |")
    print("\n".join(lines))
    notes = [
        f"other work beside it (load {os.getloadavg()[1]:.1f}). {LIMITS}",
    ]
    write_result(options.out, title="The report at size", notes=notes, lines=lines)


if __name__ == "__main__":
    main()
