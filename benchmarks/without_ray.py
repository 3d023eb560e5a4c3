"""All tasks of a search space in a few processes, without Ray, MLflow and Optuna: for machines that lack them.

    python -m benchmarks.without_ray SPACE.yaml OUT [--data-dir DIR] [--workers 16] [--device cuda] [--minutes M]

The schedule is the sweep's own (``fqsweep.engine.search``), and so is the work (``fqsweep.engine.work``). OUT is then
what ``fqsweep run SPACE.yaml --out OUT`` leaves, which takes it over, does what is missing, and
records everything in MLflow. Weights that Optuna would search must be fixed in the space.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

from fqsweep.cells import Cell
from fqsweep.engine import work
from fqsweep.engine.search import plan_sweep
from fqsweep.engine.tasks import Outcome, Task
from fqsweep.files import SweepPaths
from fqsweep.space import load_space

COSTS = {"baseline": 20.0, "importance": 4.0, "trial": 2.0}


class FixedWeights:
    """The study of cells without free weights: one trial each."""

    def ask(self, cell: Cell) -> tuple[int, dict[str, float]]:
        if cell.point.free_weights:
            raise ValueError(f"{cell.title}: Optuna searches its weights; fix them, or use `fqsweep run`")
        return 0, {}

    def tell(self, cell: Cell, number: int, metrics: Mapping[str, float]) -> None:
        """Nobody asks again."""

    def prune(self, cell: Cell, number: int) -> None:
        """See ``tell``."""

    def give_up(self, cell: Cell, number: int) -> None:
        """See ``tell``."""

    def chosen(self, cell: Cell) -> dict[str, float] | None:
        """Nothing is searched."""


def start_pool(workers: int) -> ProcessPoolExecutor:
    """Fresh processes: a forked one could not use CUDA."""
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


def do(task: Task, out: Path, data_dir: Path | None, gpus: float) -> Outcome:
    """One task, in a process of the pool."""
    return work.perform(task, paths=SweepPaths(out), data_dir=data_dir, gpus=gpus, num_threads=1)


def run_space(
    space_file: Path,
    out: Path,
    pool: ProcessPoolExecutor,
    *,
    workers: int,
    device: str,
    data_dir: Path | None = None,
    until: float = float("inf"),
) -> dict[str, tuple[float, float]]:
    """Do what is not done yet; nothing starts after ``until`` (monotonic seconds).

    Returns:
        key of each trial -> seconds at which it was handed out and came back.

    Raises:
        RuntimeError: a task failed.
    """
    gpus = 1 / workers if device == "cuda" else 0.0
    paths = SweepPaths(out)
    state = plan_sweep(load_space(space_file), FixedWeights(), lambda task: COSTS[task.kind])
    for task in state.shared.values():
        whole = paths.baseline_meta(task.key) if task.kind == "baseline" else paths.importance(task.key)
        if whole.exists():
            state.complete(task)
    running: dict[Future[Outcome], tuple[Task, float]] = {}
    times: dict[str, tuple[float, float]] = {}
    while not state.finished:
        while len(running) < workers and time.monotonic() < until and (task := state.next_task()) is not None:
            if task.kind == "trial" and paths.result(task.key).exists():
                state.complete(task, {})
                continue
            running[pool.submit(do, task, out, data_dir, gpus)] = (task, time.monotonic())
        if not running:
            break
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            task, start = running.pop(future)
            outcome = future.result()
            if not outcome.done:
                raise RuntimeError(f"{task.title}: {outcome.reason}")
            if task.kind == "trial":
                times[task.key] = (start, time.monotonic())
            state.complete(task, {})
    return times


def main() -> None:
    """Run, and say how far it came."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("space", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="nothing starts after this time")
    options = parser.parse_args()
    start = time.monotonic()
    with start_pool(options.workers) as pool:
        times = run_space(
            options.space, options.out, pool, workers=options.workers, device=options.device,
            data_dir=options.data_dir, until=start + 60 * options.minutes,
        )  # fmt: skip
    print(f"{len(times)} trials in {time.monotonic() - start:.0f} s, {options.workers} at a time")


if __name__ == "__main__":
    main()
