"""What stopping early saves on the demo: its cells with free weights searched whole, then every rule replayed.

    python -m benchmarks.early_stopping [--network resnet18] [--trials 8] [--epochs 6] [--out FILE]

The search runs once with no rule: real engine, two trials at a time. Its curves are then replayed by the sweep's own
state machine, which sets the bars and ends the trials, one epoch a tick, so that every rule and pacing meets the same
trials. What a replay leaves out: trials after a stopped one would have been drawn from less knowledge.
"""

from __future__ import annotations

import heapq
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import moocore
import numpy as np
import yaml

from benchmarks.result_file import result_parser, write_result
from fqsweep.cells import expand_cells, trial_key
from fqsweep.config import SearchSpace
from fqsweep.engine.search import plan_sweep
from fqsweep.engine.stopping import Curve, is_unpromising
from fqsweep.engine.studies import OptunaStudies
from fqsweep.engine.tasks import Task
from fqsweep.files import SweepPaths
from fqsweep.results import TrialResult, read_result
from fqsweep.space import load_space

PROJECT = Path(__file__).resolve().parents[1]
SLOTS = 2
RULES = ("none", "median", "halving")
PACINGS = ("take turns with other cells", "side by side")
OBJECTIVES = ("val/acc_worst", "bits/mean_weight")
REFERENCE = (0.0, 8.0)  # no accuracy and the widest budget: the corner of the hypervolume


@dataclass(frozen=True)
class Replayed:
    """What a rule made of the recorded trials."""

    epochs: int
    num_stopped: int
    num_best_kept: int
    hypervolume: float
    survivors: tuple[TrialResult, ...]


class Recorded:
    """Hands out the recorded trials of each cell in their order."""

    def __init__(self, trials: Mapping[str, Sequence[tuple[int, dict[str, float]]]]) -> None:
        self.left = {key: list(asked) for key, asked in trials.items()}

    def ask(self, cell: Any) -> tuple[int, dict[str, float]]:
        return self.left[cell.key].pop(0)

    def tell(self, *_given: Any) -> None: ...

    def prune(self, *_given: Any) -> None: ...

    def give_up(self, *_given: Any) -> None: ...

    def chosen(self, *_given: Any) -> None: ...


def write_space(folder: Path, *, network: str, trials: int, epochs: int, images: int) -> Path:
    """The demo with nothing but its cells that have free weights, more trials in each, and no rule."""
    space = yaml.safe_load((PROJECT / "search_spaces" / "demo.yaml").read_text(encoding="utf-8"))
    space["methods"] = [
        one for one in space["methods"] if any(isinstance(value, dict) for value in one.values())
    ]
    space["architectures"] = [network]
    space["datasets"][0]["num_images"] = images
    space["recipe"]["finetune_epochs"] = epochs
    space["search"] = {"trials_per_cell": trials, "early_stopping": "none", "objectives": list(OBJECTIVES)}
    file = folder / "demo_search.yaml"
    file.write_text(yaml.safe_dump(space))
    return file


def search_whole(space_file: Path, out: Path) -> None:
    """Run the search, or go on with it."""
    command = [sys.executable, "-m", "fqsweep.main", "run", str(space_file), "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    subprocess.run([*command, "--max-concurrent", str(SLOTS)], cwd=PROJECT, env=environment, check=True)


def replay(
    space: SearchSpace,
    asked: Mapping[str, Sequence[tuple[int, dict[str, float]]]],
    results: Mapping[str, TrialResult],
    *,
    slots: int,
    only: str | None = None,
) -> Replayed:
    """Run the sweep's state machine over recorded trials.

    Args:
        asked: numbers and weights of each cell's trials, in order.
        results: by key of the trial.
        only: key of the one cell that is searched; its trials then run side by side.
    """
    state = plan_sweep(space, Recorded(asked), lambda _task: 1.0)
    for task in state.shared.values():
        state.complete(task)
    for cell in state.cells:
        cell.asked = cell.wanted if only not in (None, cell.key) else 0
    now, order, spent, stopped = 0, 0, 0, 0
    busy: list[tuple[int, int, Task]] = []
    kept: dict[str, list[TrialResult]] = {cell.key: [] for cell in state.cells}
    curves: dict[str, Curve] = {}
    while True:
        while len(busy) < slots and (task := state.next_task()) is not None:
            curves[task.key] = cut(results[task.key].history, task)
            order += 1
            heapq.heappush(busy, (now + len(curves[task.key].epochs), order, task))
        if not busy:
            break
        now, _, task = heapq.heappop(busy)
        curve, result = curves[task.key], results[task.key]
        spent += len(curve.epochs)
        stopped += not curve.whole
        if curve.whole:
            kept[task.cell.key].append(result)
        state.complete(task, result.metrics, curve)
    searched = [cell for cell in state.cells if only in (None, cell.key)]
    whole = {
        c.key: [results[trial_key(c.cell, number=n, weights=w)] for n, w in asked[c.key]] for c in searched
    }
    survivors = [result for key in whole for result in kept[key]]
    return Replayed(
        epochs=spent,
        num_stopped=stopped,
        num_best_kept=sum(max(map(acc, whole[key])) == max(map(acc, kept[key]), default=-1.0) for key in whole),
        hypervolume=hypervolume(survivors),
        survivors=tuple(survivors),
    )


def acc(result: TrialResult) -> float:
    return result.metrics[OBJECTIVES[0]]


def cut(history: Sequence[Mapping[str, float]], task: Task) -> Curve:
    """The curve as far as the trial gets with its bars; its last epoch never stops it."""
    for end in range(1, len(history)):
        if is_unpromising(history[:end], task.bars):
            return Curve(epochs=history[:end], whole=False)
    return Curve(epochs=history)


def hypervolume(results: Sequence[TrialResult]) -> float:
    """Of worst-group validation accuracy (up) and bits (down), to ``REFERENCE``; 0 without results."""
    if not results:
        return 0.0
    points = np.array([[-acc(result), result.metrics[OBJECTIVES[1]]] for result in results])
    return float(moocore.hypervolume(points, ref=[-REFERENCE[0], REFERENCE[1]]))


def report(out: Path, space_file: Path) -> list[str]:
    """Replay every rule, with cells that take turns and with one cell at a time; Markdown lines."""
    space = load_space(space_file)
    studies = OptunaStudies(space.search, SweepPaths(out).studies)
    asked = {cell.key: studies.asked_before(cell) for cell in expand_cells(space)}
    results = {path.parent.name: read_result(path) for path in (out / "trials").glob("*/result.json")}
    lines = [
        "| trials of a cell | slots | rule | epochs | saved | stopped | best of its cell kept | hypervolume |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for pacing in PACINGS:
        for slots in (1, SLOTS, 2 * SLOTS):
            rows = {
                rule: replay_all(space, asked, results, rule, slots=slots, together=pacing == PACINGS[0])
                for rule in RULES
            }
            full = rows["none"]
            assert full.num_stopped == 0 and full.num_best_kept == len(asked)
            lines += [
                f"| {pacing} | {slots} | {rule} | {row.epochs} | {1 - row.epochs / full.epochs:.0%} | "
                f"{row.num_stopped} of {len(results)} | {row.num_best_kept} of {len(asked)} | "
                f"{row.hypervolume / full.hypervolume:.4f} |"
                for rule, row in rows.items()
            ]
    return [*lines, "", "Hypervolume: of the front over all cells, as a share of that without a rule."]


def replay_all(
    space: SearchSpace, asked: Any, results: Any, rule: Any, *, slots: int, together: bool
) -> Replayed:
    """One replay of all cells together, or of each alone, where its trials cannot but run side by side."""
    ruled = space.model_copy(update={"search": space.search.model_copy(update={"early_stopping": rule})})
    if together:
        return replay(ruled, asked, results, slots=slots)
    alone = [replay(ruled, asked, results, slots=slots, only=key) for key in asked]
    return Replayed(
        epochs=sum(one.epochs for one in alone),
        num_stopped=sum(one.num_stopped for one in alone),
        num_best_kept=sum(one.num_best_kept for one in alone),
        hypervolume=hypervolume([result for one in alone for result in one.survivors]),
        survivors=tuple(result for one in alone for result in one.survivors),
    )


def main() -> None:
    """Search, replay, and write the dated result."""
    parser = result_parser(__doc__)
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--trials", type=int, default=8, help="of each cell")
    parser.add_argument("--epochs", type=int, default=6, help="of fine-tuning")
    parser.add_argument("--images", type=int, default=2400)
    parser.add_argument("--folder", type=Path, help="where the search is kept, or was left by an earlier call")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        space_file = write_space(
            folder, network=options.network, trials=options.trials, epochs=options.epochs, images=options.images
        )
        search_whole(space_file, folder / "out")
        lines = report(folder / "out", space_file)
    print("\n".join(lines))
    notes = [
        "`search_spaces/demo.yaml` with its "
        f"searched method alone (baq at 0.5, 1, 2 and 4 bits) and {options.network}, {options.trials} trials a cell "
        f"of {options.epochs} epochs each, {options.images} images, one seed.",
        "",
        "The trials were run whole once; each row replays their validation curves through the state machine and the "
        "bars of `fqsweep/engine/stopping.py`.",
    ]
    write_result(options.out, title="Stopping early", notes=notes, lines=lines)


if __name__ == "__main__":
    main()
