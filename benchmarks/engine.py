"""The engine's own cost: no-op trials next to plain Ray Tune, memory, growth, resuming, and the schedule simulated.

    python -m benchmarks.engine [--trials 500] [--many 5000] [--out benchmarks/results/engine.md]

Work is ``benchmarks.noop``; ledger, Optuna, MLflow (sqlite) and Ray are real. Each part runs in a process of its own.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import random
import resource
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.result_file import measure_apart, result_parser, write_result

PROJECT = Path(__file__).resolve().parents[1]
SLOTS = 2
TRIALS_A_SEED = 8
SPACE = """\
name: noop
datasets: [{kind: synthderm, group_attributes: [skin_tone], image_size: 32, num_images: 500}]
architectures: [test_resnet]
budgets_bits: [1, 3]
seeds: SEEDS
methods:
  - method: fp32
  - {method: uniform, bits: [4]}
  - {method: static, fairness_weight: {low: 0.0, high: 1.0}}
  - {method: baq, bitrate_weight: 0.01}
search: {trials_per_cell: 2}
"""


def write_space(folder: Path, num_trials: int) -> Path:
    """A search space with about that many trials."""
    file = folder / "noop.yaml"
    file.write_text(SPACE.replace("SEEDS", str(list(range(max(1, num_trials // TRIALS_A_SEED))))))
    return file


# --- parts that run in processes of their own ----------------------------------------------------


class ProcessorClock:
    """Samples this process's own seconds of processor time, once a second."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, float]] = []
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            self.samples.append((time.time(), time.process_time()))
            time.sleep(1.0)


def run_engine(folder: Path, num_trials: int) -> dict[str, Any]:
    """One sweep of no-op trials: seconds between ends of tasks, from the ledger; the driver's memory."""
    clock = ProcessorClock()
    from fqsweep.engine.sweep import SweepOptions, run_sweep
    from fqsweep.files import SweepPaths, read_lines

    start = time.perf_counter()
    options = SweepOptions(
        space_file=write_space(folder, num_trials),
        out=folder / "out",
        max_concurrent=SLOTS,
        work="benchmarks.noop",
    )
    run_sweep(options)
    whole_s = time.perf_counter() - start
    lines = [line for line in read_lines(SweepPaths(folder / "out").ledger) if line["event"] == "done"]
    return {
        "ends": sorted(line["time"] for line in lines),
        "whole_s": whole_s,
        "cpu": clock.samples,
        "rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def run_plain(_folder: Path, num_trials: int) -> dict[str, Any]:
    """Plain Ray Tune: as many trials that return at once, reused actors, the same slots."""
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = "600"
    import ray
    from ray import tune

    class Noop(tune.Trainable):
        def step(self) -> dict[str, Any]:
            return {"x": 1, "done": True}

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            return True

        def save_checkpoint(self, checkpoint_dir: str) -> None: ...  # asked for at the end of a trial

        def load_checkpoint(self, checkpoint: Any) -> None: ...

    ends: list[float] = []
    clock = ProcessorClock()

    class Clock(tune.Callback):
        def on_trial_complete(self, *_given: Any, **_named: Any) -> None:
            ends.append(time.time())

    ray.init(num_cpus=SLOTS, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    with tempfile.TemporaryDirectory() as storage:
        tune.Tuner(
            tune.with_resources(Noop, {"cpu": 1}),
            tune_config=tune.TuneConfig(num_samples=num_trials, max_concurrent_trials=SLOTS, reuse_actors=True),
            run_config=tune.RunConfig(storage_path=storage, verbose=0, callbacks=[Clock()]),
        ).fit()
    return {
        "ends": ends,
        "cpu": clock.samples,
        "rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


PARTS = {"engine": run_engine, "plain": run_plain}


def measure(part: str, folder: Path, num_trials: int) -> dict[str, Any]:
    """Run a part in a process of its own."""
    return measure_apart("benchmarks.engine", "--part", part, "--trials", num_trials, "--folder", folder)


# --- the schedule --------------------------------------------------------------------------------


def simulate(slots: int) -> tuple[int, float, float]:
    """1,000 cells of mixed length on a virtual clock: trials, makespan over the lower bound, seconds to decide."""
    from fqsweep.engine.search import plan_sweep
    from fqsweep.engine.tasks import Task
    from fqsweep.space import load_space

    class Numbers:
        def __init__(self) -> None:
            self.asked: dict[str, int] = {}

        def ask(self, cell: Any) -> tuple[int, dict[str, float]]:
            self.asked[cell.key] = self.asked.get(cell.key, -1) + 1
            return self.asked[cell.key], {name: float(self.asked[cell.key]) for name in cell.point.free_weights}

        def tell(self, *_given: Any) -> None: ...

        def prune(self, *_given: Any) -> None: ...

        def give_up(self, *_given: Any) -> None: ...

        def chosen(self, *_given: Any) -> None: ...

    text = SPACE.replace("SEEDS", str(list(range(25)))).replace("[test_resnet]", "[test_resnet, resnet18]")
    text = text.replace("[1, 3]", "[0.5, 1, 1.5, 2, 2.5, 3, 4, 5, 6]").replace(
        "trials_per_cell: 2", "trials_per_cell: 4"
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "s.yaml").write_text(text)
        space = load_space(Path(folder) / "s.yaml")

    def expected(task: Task) -> float:
        base = {"baseline": 20.0, "importance": 6.0, "trial": 4.0}[task.kind]
        slow = 2.5 if task.cell.architecture.name == "resnet18" else 1.0
        return base * slow * (1 + 0.1 * (task.cell.budget_bits or 0))

    state = plan_sweep(space, Numbers(), expected)
    generator, now, order = random.Random(slots), 0.0, 0
    busy: list[tuple[float, int, Task, float]] = []
    took: dict[str, float] = {}
    chains: list[float] = []
    start = time.perf_counter()
    while not state.finished:
        while len(busy) < slots and (task := state.next_task()) is not None:
            seconds = expected(task) * generator.uniform(0.8, 1.25)
            order += 1
            heapq.heappush(busy, (now + seconds, order, task, seconds))
        now, _, task, seconds = heapq.heappop(busy)
        took[task.key] = seconds
        chains.append(seconds + sum(took[key] for key in task.needs))
        state.complete(task, {})
    spent_s = time.perf_counter() - start
    return len(took), now / max(sum(took.values()) / slots, *chains), spent_s


# --- the report ----------------------------------------------------------------------------------


def per_task_ms(ends: list[float]) -> float:
    """Median milliseconds between the ends of neighbouring hundreds of tasks, per task."""
    steps = [(b - a) / 50 for a, b in zip(ends[::50], ends[50::50], strict=False)]
    return 1000 * statistics.median(steps)


def cpu_ms(found: dict[str, Any], part: slice) -> float:
    """Milliseconds of the driver's processor time per task, over a part of its tasks: other work on the machine
    does not count."""
    ends = found["ends"][part]
    times, spent = np.array(found["cpu"]).T
    return float(1000 * np.diff(np.interp([ends[0], ends[-1]], times, spent))[0] / len(ends))


def report(num_trials: int, many: int) -> list[str]:
    """Measure everything; Markdown lines."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        engine = measure("engine", folder, num_trials)
        num_tasks = len(engine["ends"])
        plain = measure("plain", folder, num_tasks)
        again = measure("engine", folder, num_trials)
    ours, theirs = per_task_ms(engine["ends"]), per_task_ms(plain["ends"])
    lines = [
        "| | tasks | ms a task | driver memory (MiB) |",
        "|---|---|---|---|",
        f"| fqsweep (ledger, Optuna, MLflow) | {num_tasks} | {ours:.0f} | {engine['rss_mib']:.0f} |",
        f"| plain Ray Tune, reused actors | {len(plain['ends'])} | {theirs:.0f} | {plain['rss_mib']:.0f} |",
        "",
        f"On top of plain Tune: {ours - theirs:.0f} ms a task.",
        f"The same command again, nothing to do: {again['whole_s']:.1f} s (the checks' own process among them).",
    ]
    print("\n".join(lines), flush=True)
    if many:
        with tempfile.TemporaryDirectory() as name:
            large = measure("engine", Path(name), many)
            again = measure("engine", Path(name), many)
            plain = measure("plain", Path(name), len(large["ends"]))
        # Like is compared with like. In the order of the schedule a fifth of the tasks are parents and cost tables, a
        # fifth trials of baq, a fifth first trials of searched cells, a fifth full precision and uniform, and a fifth
        # second trials of searched cells, which cost Optuna's work too.
        fifth = len(large["ends"]) // 5
        parts = (slice(2 * fifth, 3 * fifth), slice(4 * fifth, None))
        first, last = (cpu_ms(large, part) for part in parts)
        first_s, last_s = (per_task_ms(large["ends"][part]) for part in parts)
        lines += [
            f"{len(large['ends'])} tasks: the first trials of searched "
            f"cells (the third fifth) took {first:.0f} ms each of the driver's processor time "
            f"({first_s:.0f} ms on the clock), their second trials, at the end, {last:.0f} ms ({last_s:.0f}). "
            f"Driver {large['rss_mib']:.0f} MiB, plain Ray Tune with as many tasks {plain['rss_mib']:.0f} MiB. "
            f"The same command again: {again['whole_s']:.1f} s, {again['rss_mib']:.0f} MiB.",
        ]
        print(lines[-1], flush=True)
    lines += ["", "| slots | tasks | makespan / lower bound | seconds to decide |", "|---|---|---|---|"]
    for slots in (8, 64, 1024):
        count, ratio, spent_s = simulate(slots)
        lines.append(f"| {slots} | {count} | {ratio:.3f} | {spent_s:.2f} |")
    print("\n".join(lines[-4:]), flush=True)
    return lines


def main() -> None:
    """Measure and write the dated result."""
    parser = result_parser(__doc__)
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--many", type=int, default=5000, help="0: leave the long run out")
    parser.add_argument("--part", choices=sorted(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(PARTS[options.part](options.folder, options.trials)))
        return
    lines = report(options.trials, options.many)
    notes = [
        f"Other work beside it (load {os.getloadavg()[1]:.1f}), {SLOTS} slots.",
    ]
    write_result(options.out, title="The engine", notes=notes, lines=lines)


if __name__ == "__main__":
    main()
