"""Loading side by side: a decode-once pack against torchvision's folder of JPEGs, with the same augmentation.

    python -m benchmarks.data_loading --images FOLDER [--out benchmarks/results/data_loading.md]

FOLDER holds photographs as JPEGs, 224 px or larger. They are stored anew at 224 x 224 and at 600 x 450 px, and
loaded from there. A rate counts only where the sides agree: before augmentation the pack's pixels must be those
that Pillow and torchvision decode from the 224-px files, and from the 600 x 450 ones within a level of 255. Sides are
measured in turns, so that other work on the machine slows both; ratios are medians over the turns. Processor time of
one thread, which other work on the machine changes little, stands beside them.

A trial of the demo (`search_spaces/demo.yaml`, the static method at 1 bit) is run twice in one process, after its
parent and its importance are there: how much of it is training and evaluation?
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision import transforms as tv

import fqsweep.finetuning
from benchmarks.result_file import result_parser, write_result
from fqsweep.baseline import ensure_baseline, ensure_importance
from fqsweep.cells import expand_cells
from fqsweep.config import ArchitectureConfig
from fqsweep.data.folder import FolderSource
from fqsweep.data.loading import BatchLoader
from fqsweep.data.packs import open_pack, usable_cores
from fqsweep.data.records import Groups, Samples
from fqsweep.engine.work import LogFile
from fqsweep.files import SweepPaths
from fqsweep.models import build_model
from fqsweep.setting import Setting, open_setting
from fqsweep.space import load_space
from fqsweep.trial import run_trial

SIDE, NUM_IMAGES, BATCH, TURNS = 224, 512, 32, 3
STEPS = 4
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
MANY_IMAGES = 25_000
DEMO = Path(__file__).parents[1] / "search_spaces" / "demo.yaml"
TARGETS = {"224 x 224": 4.0, "600 x 450": 8.0}


def store_images(source: Path, folder: Path, size: tuple[int, int]) -> list[Path]:
    """The first images of ``source``, stored anew as JPEGs of this size in one class folder."""
    (folder / "class").mkdir(parents=True)
    paths = []
    for number, path in enumerate(sorted(source.rglob("*.jpg"))[:NUM_IMAGES]):
        with Image.open(path) as image:
            paths.append(folder / "class" / f"{number:05d}.jpg")
            image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(paths[-1], quality=90)
    return paths


def as_samples(paths: list[Path], content: str) -> Samples:
    count = len(paths)
    return Samples(
        id_n=np.array([f"{number:06d}" for number in range(count)]),
        label_n=np.zeros(count, np.int64),
        class_names=("class",),
        groups={"g": Groups(code_n=np.zeros(count, np.int64), names=("g",))},
        cluster_n=np.arange(count),
        source=FolderSource(tuple(paths)),
        content=content,
    )


def pack_batches(image_nhwc: np.ndarray) -> BatchLoader:
    zeros = np.zeros(len(image_nhwc), np.int64)
    return BatchLoader(
        images=image_nhwc,
        labels=zeros,
        groups=zeros,
        indices=np.arange(len(image_nhwc)),
        batch_size=BATCH,
        device="cpu",
        mean=MEAN,
        std=STD,
        augment="standard",
    )


def folder_batches(folder: Path, *, workers: int) -> torch.utils.data.DataLoader[object]:
    """torchvision's way to the same images and changes, in one worker process a core."""
    resize = [tv.Resize(SIDE), tv.CenterCrop(SIDE)]
    change = [
        tv.RandomHorizontalFlip(),
        tv.RandomVerticalFlip(),
        tv.RandomAffine(
            15, translate=(0.05, 0.05), scale=(1, 1 / 0.85), interpolation=tv.InterpolationMode.BILINEAR
        ),
        tv.ColorJitter(brightness=0.1, contrast=0.1),
    ]
    steps = tv.Compose([*resize, *change, tv.ToTensor(), tv.Normalize(MEAN, STD)])
    images = torchvision.datasets.ImageFolder(folder, transform=steps)
    return torch.utils.data.DataLoader(
        images, batch_size=BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )


def consume(start_epoch: Callable[[], Iterator[object]]) -> None:
    for _ in start_epoch():
        pass


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def cpu_ms_per_image(work: Callable[[], object], num_images: int) -> float:
    """Processor time of this process alone, least of the turns, after one turn that does not count."""
    work()
    spent = []
    for _ in range(TURNS):
        start = time.process_time()
        work()
        spent.append(time.process_time() - start)
    return 1e3 * min(spent) / num_images


def check_pixels(paths: list[Path], image_nhwc: np.ndarray, *, most_off: float) -> None:
    """Both sides see the same images before they change them.

    Args:
        most_off: mean difference of an image's pixels, in levels of 255, that is let pass: a pack's decoder begins to
            scale while it decodes.
    """
    for path, pixels in list(zip(paths, image_nhwc, strict=True))[:50]:
        with Image.open(path) as image:
            plain = tv.CenterCrop(SIDE)(tv.Resize(SIDE)(image.convert("RGB")))
        off = float(np.abs(np.asarray(plain, dtype=np.float32) - pixels).mean())
        if off > most_off:
            raise RuntimeError(f"{path}: the sides see different images, {off:.2f} levels apart")


def measure_cpu_time(folders: dict[str, Path], packs: dict[str, np.ndarray]) -> list[str]:
    """One row a size of the files: processor time an image on both sides, one thread, no worker processes."""
    rows = ["| files | pack, CPU ms/image | torchvision, CPU ms/image | ratio |", "|---|---|---|---|"]
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, folder in folders.items():
        ours, theirs = pack_batches(packs[name]), folder_batches(folder, workers=0)
        own_ms = cpu_ms_per_image(partial(consume, partial(ours.epoch, 0)), NUM_IMAGES)
        their_ms = cpu_ms_per_image(partial(consume, partial(iter, theirs)), NUM_IMAGES)
        rows.append(f"| {name} | {own_ms:.2f} | {their_ms:.2f} | {their_ms / own_ms:.1f} |")
        print(rows[-1], flush=True)
    torch.set_num_threads(usual)
    return rows


def measure_rates(folders: dict[str, Path], packs: dict[str, np.ndarray], workers: int) -> list[str]:
    """One row a size of the files: images a second on both sides, and the ratio."""
    rows = ["| files | pack, images/s | torchvision, images/s | ratio | wanted |", "|---|---|---|---|---|"]
    for name, folder in folders.items():
        ours, theirs = pack_batches(packs[name]), folder_batches(folder, workers=workers)
        epochs = {
            "ours": partial(consume, partial(ours.epoch, 0)),
            "theirs": partial(consume, partial(iter, theirs)),
        }
        for epoch in epochs.values():
            epoch()
        turns = [{side: timed(epoch) for side, epoch in epochs.items()} for _ in range(TURNS)]
        rate = {side: len(packs[name]) / np.median([turn[side] for turn in turns]) for side in epochs}
        ratio = np.median([turn["theirs"] / turn["ours"] for turn in turns])
        rows.append(f"| {name} | {rate['ours']:.0f} | {rate['theirs']:.0f} | {ratio:.1f} | {TARGETS[name]:g} |")
        print(rows[-1], flush=True)
    return rows


def measure_wait(image_nhwc: np.ndarray) -> str:
    """How long a ResNet18 waits for its images, as a share of its step; one thread for both."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    model = build_model(ArchitectureConfig(name="resnet18"), num_classes=8, image_size=SIDE).train()
    optimiser = torch.optim.AdamW(model.parameters(), fused=True)
    waits, steps = [], []
    batches: Iterator[object] = pack_batches(image_nhwc).epoch(0)
    for _ in range(STEPS):
        start = time.perf_counter()
        batch = next(batches)
        waits.append(time.perf_counter() - start)
        loss = nn.functional.cross_entropy(model(batch.image_bchw), batch.label_b)  # type: ignore[attr-defined]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        steps.append(time.perf_counter() - start)
    torch.set_num_threads(usual)
    share = np.median(np.array(waits[1:]) / np.array(steps[1:]))
    return (
        f"A ResNet18 step at {SIDE} px, batch {BATCH}, one thread, takes {np.median(steps[1:]):.2f} s, of which "
        f"it waits {100 * share:.1f} % for its images (wanted: less than 5 %)."
    )


def measure_packing(paths: list[Path], folder: Path) -> str:
    """Packing against a plain loop that decodes, scales and crops on all cores and keeps nothing."""

    def decode(path: Path) -> np.ndarray:
        with Image.open(path) as image:
            return np.asarray(tv.CenterCrop(SIDE)(tv.Resize(SIDE)(image.convert("RGB"))))

    def plain() -> None:
        with ThreadPoolExecutor(usable_cores()) as pool:
            for _ in pool.map(decode, paths):
                pass

    ratios, rates = [], []
    for turn in range(TURNS):
        plain_s = timed(plain)
        pack_s = timed(lambda turn=turn: open_pack(as_samples(paths, f"{turn}"), size=SIDE, pack_dir=folder))
        ratios.append(plain_s / pack_s)
        rates.append(len(paths) / pack_s)
    return (
        f"Packing 600 x 450 px files at {SIDE} px: {np.median(rates):.0f} images/s on {usable_cores()} cores, "
        f"{np.median(ratios):.2f} times as fast as a plain Pillow loop (wanted: 1)."
    )


def measure_memory(paths: list[Path], folder: Path) -> str:
    """Peak memory of a process that packs very many images (the same ones again and again)."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from benchmarks.data_loading import as_samples, open_pack\n"
        # Not ru_maxrss: that begins with the peak of the process that started this one.
        "status = Path('/proc/self/status').read_text\n"
        "peak = lambda: int(status().split('VmHWM:')[1].split()[0])\n"
        "base = peak()\n"
        "paths = (sorted(Path(sys.argv[1]).rglob('*.jpg')) * int(sys.argv[3]))[:int(sys.argv[3])]\n"
        f"open_pack(as_samples(paths, 'many'), size={SIDE}, pack_dir=Path(sys.argv[2]))\n"
        "print(base, peak())\n"
    )
    small = folder / "small" / "class"
    small.mkdir(parents=True)
    for path in paths[:100]:
        with Image.open(path) as image:
            image.resize((64, 64)).save(small / path.name)
    command = [sys.executable, "-c", code, str(small), str(folder), str(MANY_IMAGES)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    base, peak = (int(text) / 1024 for text in ended.stdout.split())
    return (
        f"Packing {MANY_IMAGES:,} images of 64 px at {SIDE} px ({MANY_IMAGES * SIDE**2 * 3 / 1e9:.1f} GB): peak "
        f"memory {peak:.0f} MiB, of which {base:.0f} MiB are imported libraries (wanted: less than 1,536)."
    )


def measure_trial(folder: Path) -> str:
    """The share of a demo-size trial that is training, calibration and evaluation.

    Parent and importance are there before. Calibration is what the calibration images go through: moments of outputs,
    weights re-fitted, outputs matched.
    """
    space = load_space(DEMO)
    short = space.model_copy(update={"recipe": space.recipe.model_copy(update={"epochs": 1})})
    (cell,) = (c for c in expand_cells(short) if c.point.variant == "static" and c.budget_bits == 1)
    paths = SweepPaths(folder)
    log = LogFile(paths.log("benchmark"))
    setting = open_setting(cell, paths=paths, data_dir=None, device="cpu")
    ensure_importance(setting, ensure_baseline(setting, paths, log), paths, log)
    scored: list[float] = []
    calibrated: list[float] = []

    def timed(function: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            start = time.perf_counter()
            value = function(*given, **named)
            spent.append(time.perf_counter() - start)
            return value

        return call

    texts = []
    with ExitStack() as patches:
        patches.enter_context(patch.object(Setting, "score", timed(Setting.score, scored)))
        for name in ("_calibrate", "match_moments"):
            patches.enter_context(
                patch.object(fqsweep.finetuning, name, timed(getattr(fqsweep.finetuning, name), calibrated))
            )
        for turn in ("first", "second"):
            scored.clear()
            calibrated.clear()
            start = time.perf_counter()
            result = run_trial(
                cell, key=turn, weights={}, paths=paths, data_dir=None, device="cpu", recorder=log
            )
            total_s = time.perf_counter() - start
            busy_s = result.metrics["time/train_s"] + sum(scored)
            passes_s = sum(calibrated)
            texts.append(
                f"{busy_s:.1f} of {total_s:.1f} s ({100 * busy_s / total_s:.0f} %) "
                f"and calibrates in {passes_s:.1f} s ({100 * passes_s / total_s:.0f} %)"
            )
    return (
        f"A demo-size trial trains and evaluates in {texts[1]} (wanted: at least 90 %); the first of a process, "
        f"which also traces the network and loads compiled kernels, in {texts[0]}."
    )


def measure(images: Path, scratch: Path) -> list[str]:
    """All figures, as the lines of a Markdown page."""
    sizes = {"224 x 224": (SIDE, SIDE), "600 x 450": (600, 450)}
    folders = {name: scratch / name.replace(" ", "") for name in sizes}
    paths = {name: store_images(images, folders[name], size) for name, size in sizes.items()}
    packs = {
        name: open_pack(as_samples(paths[name], name), size=SIDE, pack_dir=scratch / "packs") for name in sizes
    }
    check_pixels(paths["224 x 224"], packs["224 x 224"], most_off=0.0)
    check_pixels(paths["600 x 450"], packs["600 x 450"], most_off=1.0)
    lines = [*measure_rates(folders, packs, workers=usable_cores()), "", *measure_cpu_time(folders, packs)]
    for text in (
        measure_wait(packs["224 x 224"]),
        measure_packing(paths["600 x 450"], scratch / "packing"),
        measure_memory(paths["224 x 224"], scratch / "many"),
        measure_trial(scratch / "trial"),
    ):
        print(text, flush=True)
        lines += ["", text]
    return lines


def main() -> None:
    """Measure and write the dated result."""
    parser = result_parser(__doc__)
    parser.add_argument("--images", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(usable_cores())
    with tempfile.TemporaryDirectory() as scratch:
        lines = measure(options.images, Path(scratch))
    notes = [
        f"Other work beside it (load {os.getloadavg()[0]:.1f} at the end).",
        f"{NUM_IMAGES} photographs, {SIDE} px, batch {BATCH}, augmentation: flips, rotation, shift, crop, brightness "
        f"and contrast; median of {TURNS} turns. Before augmentation both sides give the same pixels "
        "(600 x 450: within a level of 255).",
    ]
    write_result(options.out, title="Data loading", notes=notes, lines=lines)


if __name__ == "__main__":
    main()
