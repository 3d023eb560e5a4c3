"""A whole grid as a sweep, against the same grid trial by trial: no shared parents, cost tables, packs or processes.

    python -m benchmarks.whole_grid [--images 800] [--epochs 4] [--out benchmarks/results/whole_grid.md]

One data set in JPEG files, two architectures, all methods, one seed. Trial by trial is what a script in a loop does:
each trial is a process of its own that decodes the images, trains its parent, measures its costs and goes on from
there; as many run side by side as in the sweep. Both ways must give every trial the same metrics.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from benchmarks.result_file import result_parser, write_result
from fqsweep.cells import expand_cells
from fqsweep.config import SynthdermConfig
from fqsweep.data import describe_samples
from fqsweep.files import SweepPaths, read_lines
from fqsweep.results import read_result
from fqsweep.space import load_space

PROJECT = Path(__file__).resolve().parents[1]
SLOTS = 2
SIZE = 64
SPACE = """\
name: whole_grid
datasets:
  - kind: table
    name: photos
    csv: photos.csv
    images: photos
    image_column: file
    label_column: label
    group_columns: {skin: skin}
    group_attributes: [skin]
    image_size: 32
    splits: {train: 0.5, calibration: 0.15, validation: 0.15, test: 0.2}
architectures: [resnet18, deit_tiny_patch16_224]
budgets_bits: [0.5, 2]
seeds: [0]
methods:
  - method: fp32
  - {method: uniform, bits: [4, 8]}
  - {method: uniform, bits: [4], finetune: [true]}
  - {method: static, fairness_weight: 0.1}
  - {method: baq, fairness_weight: 0.1}
  - {method: fairquant, fairness_weight: 0.1, budgets_bits: [2]}
  - {method: reference, fairness_weight: 0.1, budgets_bits: [3]}
  - {method: fairgrape, fairness_weight: 0.1, budgets_bits: [2]}
  - {method: fairquantize, fairness_weight: 0.1, budgets_bits: [3]}
  - {method: hawq, fairness_weight: 0.1, budgets_bits: [2]}
recipe: {epochs: EPOCHS, batch_size: 64, finetune_epochs: 1, calibration_images: 80}
"""


def write_photos(folder: Path, num_images: int) -> None:
    """A folder of JPEGs and its table."""
    config = SynthdermConfig(kind="synthderm", num_images=num_images, group_attributes=("skin_tone",))
    samples = describe_samples(config, data_dir=None)
    (folder / "photos").mkdir()
    group = samples.groups["skin_tone"]
    rows = []
    for n in range(num_images):
        file = f"{n:05d}.jpg"
        Image.fromarray(samples.source.read(n, size=SIZE)).save(folder / "photos" / file, quality=92)
        rows.append(
            {
                "file": file,
                "label": samples.class_names[samples.label_n[n]],
                "skin": group.names[group.code_n[n]],
            }
        )
    pd.DataFrame(rows).to_csv(folder / "photos.csv", index=False)


def as_sweep(space: Path, data_dir: Path, out: Path) -> float:
    """Seconds of ``fqsweep run``, from the command to the end of its report."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "fqsweep.main", "run", str(space), "--out", str(out)]
    options = ["--data-dir", str(data_dir), "--max-concurrent", str(SLOTS)]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    subprocess.run([*command, *options], cwd=PROJECT, env=environment, check=True, capture_output=True)
    return time.perf_counter() - start


def one_by_one(space: Path, data_dir: Path, out: Path) -> float:
    """Seconds for all trials, each in a process and an output folder of its own."""
    start = time.perf_counter()
    cells = expand_cells(load_space(space))
    module = [sys.executable, "-m", "benchmarks.whole_grid", "--space", str(space), "--data-dir", str(data_dir)]

    def run(place: int) -> None:
        command = [*module, "--trial", str(place), "--folder", str(out / str(place))]
        environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
        subprocess.run(command, cwd=PROJECT, env=environment, check=True, capture_output=True)

    with ThreadPoolExecutor(SLOTS) as pool:
        list(pool.map(run, range(len(cells))))
    return time.perf_counter() - start


def run_one(space: Path, data_dir: Path, out: Path, place: int) -> None:
    """One trial from nothing, with one thread as in the sweep; notes its seconds by stage."""
    import torch

    from fqsweep.baseline import ensure_baseline, ensure_importance
    from fqsweep.engine.work import LogFile
    from fqsweep.setting import open_setting
    from fqsweep.trial import run_trial

    torch.set_num_threads(1)
    cell = expand_cells(load_space(space))[place]
    paths, log = SweepPaths(out), LogFile(out / "log")
    spent = {}
    mark = time.perf_counter()

    def stage(name: str) -> None:
        nonlocal mark
        spent[name] = time.perf_counter() - mark
        mark = time.perf_counter()

    setting = open_setting(cell, paths=paths, data_dir=data_dir, device="cpu")
    stage("pack")
    parent = ensure_baseline(setting, paths, log)
    stage("baseline")
    if cell.importance_key is not None:
        ensure_importance(setting, parent, paths, log)
        stage("importance")
    run_trial(cell, key=cell.key, weights={}, paths=paths, data_dir=data_dir, device="cpu", recorder=log)
    stage("trial")
    (out / "spent.json").write_text(json.dumps(spent))


def compare(space: Path, sweep: Path, apart: Path) -> int:
    """How many trials both ways scored, all metrics but times alike.

    Raises:
        RuntimeError: one differs.
    """
    cells = {cell.key: place for place, cell in enumerate(expand_cells(load_space(space)))}
    results = [read_result(file) for file in sorted((sweep / "trials").glob("*/result.json"))]
    theirs = {place: read_result(SweepPaths(apart / str(place)).result(key)) for key, place in cells.items()}
    by_title = {result.title: result for result in theirs.values()}
    for result in results:
        other = by_title[result.title]
        differing = {
            key
            for key, value in result.metrics.items()
            if not key.startswith("time/") and value != other.metrics[key]
        }
        if differing:
            raise RuntimeError(f"{result.title}: the two ways differ in {sorted(differing)}")
    return len(results)


def report(num_images: int, epochs: int) -> list[str]:
    """Run both ways; Markdown lines."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photos(folder, num_images)
        space = folder / "space.yaml"
        space.write_text(SPACE.replace("EPOCHS", str(epochs)))
        sweep_s = as_sweep(space, folder, folder / "sweep")
        apart_s = one_by_one(space, folder, folder / "apart")
        num_trials = compare(space, folder / "sweep", folder / "apart")
        ledger = read_lines(SweepPaths(folder / "sweep").ledger)
        ours: Counter[str] = Counter()
        for line in ledger:
            if line["event"] == "done":
                ours[line["kind"]] += line["seconds"]
        theirs: Counter[str] = Counter()
        for file in (folder / "apart").glob("*/spent.json"):
            theirs.update(json.loads(file.read_text()))
    rows: list[tuple[str, Any, Any]] = [
        ("decoding", None, theirs["pack"]),
        ("full-precision parents", ours["baseline"], theirs["baseline"]),
        ("cost tables", ours["importance"], theirs["importance"]),
        ("quantising, fine-tuning, scoring", ours["trial"], theirs["trial"]),
    ]
    lines = ["| worker seconds | sweep | trial by trial |", "|---|---|---|"]
    lines += [f"| {what} | {'with the first' if a is None else f'{a:.0f}'} | {b:.0f} |" for what, a, b in rows]
    booked = (sum(ours.values()), sum(theirs.values()))
    rest = (SLOTS * sweep_s - booked[0], SLOTS * apart_s - booked[1])
    lines += [f"| starting, tracking, report, idle slots | {rest[0]:.0f} | {rest[1]:.0f} |"]
    lines += [
        "",
        f"{num_trials} trials, {SLOTS} at a time: {sweep_s:.0f} s as a sweep, {apart_s:.0f} s trial by trial, "
        f"{apart_s / sweep_s:.1f} times as long. Every metric of every trial is the same both ways.",
    ]
    return lines


def main() -> None:
    """Measure and write the dated result."""
    parser = result_parser(__doc__)
    parser.add_argument("--images", type=int, default=800)
    parser.add_argument("--epochs", type=int, default=4, help="of the full-precision parents")
    parser.add_argument("--space", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--data-dir", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--trial", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.trial is not None:
        run_one(options.space, options.data_dir, options.folder, options.trial)
        return
    lines = report(options.images, options.epochs)
    print("\n".join(lines))
    notes = [
        "ResNet18 and DeiT-Tiny at 32 px, all methods, one seed; "
        f"other work beside it (load {os.getloadavg()[1]:.1f}).",
        "",
        "Parents of few epochs keep it short: the more a parent costs, the more sharing it saves.",
    ]
    write_result(options.out, title="A whole grid", notes=notes, lines=lines)


if __name__ == "__main__":
    main()
