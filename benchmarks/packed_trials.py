"""Short trials on one GPU: as many side by side as it holds, against one at a time; trials an hour.

    python -m benchmarks.packed_trials [--trials 32] [--share 0.125] [--out benchmarks/results/packed_trials.md]

Both grids are one search space on synthderm with other shares of the GPU, run by ``fqsweep run`` from a parent and a
cost table that exist already, so that only trials are timed: from the first start to the last end in the ledger.
Both must give the same models: packed and alone, the bits of every trial agree.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from benchmarks.result_file import result_parser, write_result
from fqsweep.files import SweepPaths, read_lines
from fqsweep.results import read_result

PROJECT = Path(__file__).resolve().parents[1]
SPACE = """\
name: packed_trials
datasets: [{kind: synthderm, group_attributes: [skin_tone], image_size: 64, num_images: 4000}]
architectures: [NETWORK]
budgets_bits: BUDGETS
seeds: [0]
methods: [METHODS]
recipe: {epochs: 2, batch_size: 128, finetune_epochs: 3, calibration_images: 200, quantiser_kernels: eager}
resources: {cpus_per_trial: 1, gpus_per_trial: SHARE}
"""


def run_sweep(folder: Path, *, network: str, budgets: list[float], methods: str, share: float) -> SweepPaths:
    """One sweep in processes of its own."""
    text = SPACE.replace("NETWORK", network).replace("BUDGETS", str(budgets))
    space = folder / "space.yaml"
    space.write_text(text.replace("METHODS", methods).replace("SHARE", f"{share:g}"))
    command = [
        sys.executable,
        str(PROJECT / "fqsweep" / "main.py"),
        "run",
        str(space),
        "--out",
        str(folder / "out"),
    ]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")])}
    ended = subprocess.run(command, env=env, text=True, capture_output=True, check=False)
    if ended.returncode:
        raise RuntimeError(
            f"the sweep ended with {ended.returncode}:\n{ended.stdout[-3000:]}{ended.stderr[-3000:]}"
        )
    return SweepPaths(folder / "out")


def seconds_of_trials(paths: SweepPaths, *, skip: int) -> float:
    """From the start of the first trial to the end of the last, leaving out ``skip`` earlier ones."""
    lines = [line for line in read_lines(paths.ledger) if line.get("kind") == "trial"]
    starts = sorted(line["time"] for line in lines if line["event"] == "start")
    ends = sorted(line["time"] for line in lines if line["event"] == "done")
    return float(ends[-1] - starts[skip])


def bits_of(paths: SweepPaths) -> dict[str, float]:
    """Budget -> mean bits, of the allocated trials."""
    results = [read_result(file) for file in (paths.out / "trials").glob("*/result.json")]
    return {
        r.params["budget_bits"]: r.metrics["bits/mean_weight"]
        for r in results
        if r.params["method"] == "static"
    }


def measure(network: str, num_trials: int, share: float) -> list[str]:
    """Trials an hour both ways, and their ratio."""
    budgets = [round(float(b), 3) for b in np.linspace(0.25, 8, num_trials)]
    seconds, bits = {}, {}
    with tempfile.TemporaryDirectory() as name:
        prepared = Path(name) / "prepared"
        prepared.mkdir()
        first = "{method: static, allocator: mean, reducer: max}"
        run_sweep(prepared, network=network, budgets=[8.0], methods=first, share=1)
        for label, part in (("one at a time", 1.0), ("packed", share)):
            folder = Path(name) / label.replace(" ", "_")
            shutil.copytree(prepared, folder)
            paths = run_sweep(folder, network=network, budgets=budgets, methods=first, share=part)
            seconds[label], bits[label] = seconds_of_trials(paths, skip=1), bits_of(paths)
    assert bits["packed"] == bits["one at a time"], "packed trials must give the same models"
    counted = num_trials - 1
    rows = ["| trials | GPU's share of a trial | seconds | trials an hour |", "|---|---|---|---|"]
    for label, part in (("one at a time", 1.0), ("packed", share)):
        taken = seconds[label]
        rows.append(f"| {label} | {part:g} | {taken:.1f} | {3600 * counted / taken:.0f} |")
    rows += ["", f"Ratio: {seconds['one at a time'] / seconds['packed']:.2f} (wanted: at least 2)."]
    return rows


def main() -> None:
    """Measure and write the dated result."""
    parser = result_parser(__doc__)
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--share", type=float, default=0.125)
    parser.add_argument("--network", default="resnet18")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA GPU, and torch sees none")
    rows = measure(options.network, options.trials, options.share)
    print("\n".join(rows))
    notes = [
        f"`python -m benchmarks.packed_trials --trials {options.trials} --share {options.share:g}`, Python "
        f"{platform.python_version()}, torch {torch.__version__}, Ray {version('ray')}, "
        f"{torch.cuda.get_device_name()}, {os.cpu_count()} CPU cores.",
        f"{options.network} at 64 px on 4,000 synthderm images, batch 128, 3 epochs of fine-tuning; the first trial "
        "(which starts the workers) is not counted in either.",
    ]
    write_result(options.out, title="Packed trials", notes=notes, lines=rows)


if __name__ == "__main__":
    main()
