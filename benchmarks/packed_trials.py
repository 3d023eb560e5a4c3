"""Short trials on one GPU: many side by side against one at a time; trials an hour.

    python -m benchmarks.packed_trials [--trials 32] [--workers 16] [--out benchmarks/results/packed_trials.md]

A grid of ``static`` trials on synthderm, from a parent and a cost table that exist already, in one process and in
``--workers`` processes (``benchmarks.without_ray``: the sweep's schedule and work; Ray's own cost a trial is in
``benchmarks.engine``). Each process does one trial before the clock starts. Both ways must allocate the same bits.
"""

from __future__ import annotations

import platform
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.result_file import result_parser, write_result
from benchmarks.without_ray import run_space, start_pool

SPACE = """\
name: packed_trials
datasets: [{kind: synthderm, group_attributes: [skin_tone], image_size: 64, num_images: 2000}]
architectures: [NETWORK]
budgets_bits: BUDGETS
seeds: [0]
methods: [{method: static, fairness_weight: 0.1}]
recipe: {epochs: 2, batch_size: 128, finetune_epochs: 2, calibration_images: 100}
"""


def write_space(folder: Path, network: str, budgets: list[float]) -> Path:
    """A search space with one trial a budget."""
    file = folder / "space.yaml"
    file.write_text(SPACE.replace("NETWORK", network).replace("BUDGETS", str(budgets)))
    return file


def weights_of(out: Path) -> dict[str, bytes]:
    """Key of each trial -> its allocation, layer by layer."""
    return {file.parent.name: file.read_bytes() for file in (out / "trials").glob("*/bits.csv")}


def seconds_with(
    workers: int, prepared: Path, *, network: str, num_trials: int, device: str
) -> tuple[float, dict[str, bytes]]:
    """Seconds for all trials in so many processes, each of which did a trial before that is not counted."""
    warm_up = [round(float(b), 3) for b in np.linspace(0.3, 1, workers)]
    budgets = [round(float(b), 3) for b in np.linspace(1.01, 7.9, num_trials)]
    with start_pool(workers) as pool:
        parts = []
        for part, chosen in (("warm_up", warm_up), ("timed", budgets)):
            out = prepared.parent / f"{part}_{workers}"
            shutil.copytree(prepared, out)
            parts.append(out)
            times = run_space(write_space(out, network, chosen), out, pool, workers=workers, device=device)
    assert len(times) == num_trials
    return max(end for _, end in times.values()) - min(start for start, _ in times.values()), weights_of(
        parts[1]
    )


def measure(network: str, num_trials: int, workers: int, device: str) -> list[str]:
    """Trials an hour both ways, and their ratio."""
    with tempfile.TemporaryDirectory() as name:
        prepared = Path(name) / "prepared"
        prepared.mkdir()
        with start_pool(1) as pool:
            run_space(write_space(prepared, network, [8.0]), prepared, pool, workers=1, device=device)
        found = {
            n: seconds_with(n, prepared, network=network, num_trials=num_trials, device=device)
            for n in (1, workers)
        }
    assert found[1][1] == found[workers][1], "packed trials must allocate the same bits"
    rows = ["| trials at a time | seconds | trials an hour |", "|---|---|---|"]
    for number, (seconds, _) in found.items():
        rows.append(f"| {number} | {seconds:.1f} | {3600 * num_trials / seconds:.0f} |")
    return [*rows, "", f"Ratio: {found[1][0] / found[workers][0]:.2f} (wanted: at least 2)."]


def main() -> None:
    """Measure and write the dated result."""
    parser = result_parser(__doc__)
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    rows = measure(options.network, options.trials, options.workers, options.device)
    print("\n".join(rows))
    machine = torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.machine()
    notes = [
        f"torch {torch.__version__}, {machine}.",
        f"{options.network} at 64 px on 2,000 synthderm images, batch 128, 2 epochs of fine-tuning.",
    ]
    write_result(options.out, title="Packed trials", notes=notes, lines=rows)


if __name__ == "__main__":
    main()
