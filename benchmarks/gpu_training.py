"""Images a second of the training loop on a GPU, and how long it waits for its images.

    python -m benchmarks.gpu_training [--networks resnet18 resnet50 ...] [--batch 128] [--steps 60] [--out FILE]

The loop is fqsweep's own (bf16 autocast, channels_last, fused AdamW, gradient clipping). Each network trains on one
batch that stays on the device, and on batches from a memory-mapped pack with each kind of augmentation, in turns on
the same machine. The wait is the share by which real loading makes a step longer:

    wait = 1 - (time of a step with the resident batch) / (time of a step with real loading)

The time that the host spends in the call for the next batch stands beside it: on a GPU the host runs ahead, so
that it is no wait unless the device runs dry. The pack holds random pixels, which cost as much as photographs.
"""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.result_file import result_parser, write_result
from fqsweep.config import ArchitectureConfig
from fqsweep.data.loading import Batch, BatchLoader
from fqsweep.models import build_model
from fqsweep.setting import make_gpu_exact
from fqsweep.training import TrainingPlan, train

NETWORKS = ("resnet18", "resnet50", "deit_tiny_patch16_224", "tiny_vit_5m_224")
AUGMENTS = ("standard", "autoaugment")
SIDE, NUM_CLASSES, TURNS, WARM_UP_STEPS = 224, 114, 3, 12
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
WANTED_FRAC = 0.05


@dataclass(kw_only=True)
class TimedLoader:
    """A loader that counts the host's time in the call for the next batch; with ``resident``, one batch for all."""

    loader: BatchLoader
    resident: Batch | None = None
    host_s: float = field(default=0.0, init=False)

    @property
    def device(self) -> torch.device | str:
        return self.loader.device

    @property
    def num_batches(self) -> int:
        return self.loader.num_batches

    def epoch(self, epoch: int) -> Iterator[Batch]:
        if self.resident is not None:
            yield from [self.resident] * self.num_batches
            return
        batches = self.loader.epoch(epoch)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.host_s += time.perf_counter() - start
            if batch is None:
                return
            yield batch


class Silent:
    """A recorder that keeps nothing."""

    def log_metrics(self, metrics: dict[str, float], *, epoch: int) -> None: ...

    def note(self, text: str) -> None: ...


def write_pack(path: Path, num_images: int) -> np.ndarray:
    """A pack of random pixels on disk, memory-mapped."""
    rng = np.random.default_rng(0)
    np.save(path, rng.integers(0, 256, (num_images, SIDE, SIDE, 3), dtype=np.uint8))
    mapped: np.ndarray = np.load(path, mmap_mode="r")
    return mapped


def open_loader(
    image_nhwc: np.ndarray, *, batch: int, steps: int, device: str, augment: str = "none"
) -> BatchLoader:
    """An epoch of so many steps; where the pack is smaller, its images come more than once."""
    rng = np.random.default_rng(1)
    return BatchLoader(
        images=image_nhwc,
        labels=rng.integers(0, NUM_CLASSES, len(image_nhwc)),
        groups=rng.integers(0, 2, len(image_nhwc)),
        indices=np.resize(np.arange(len(image_nhwc)), batch * steps),
        batch_size=batch,
        device=device,
        mean=MEAN,
        std=STD,
        augment=augment,
    )


def step_s(model: nn.Module, loader: TimedLoader) -> float:
    """Time of a step, over one epoch of the real training loop, its start included."""
    on_gpu = torch.device(loader.device).type == "cuda"
    plan = TrainingPlan(
        epochs=1,
        learning_rate=1e-4,
        weight_decay=0.01,
        warmup_frac=0.0,
        gradient_clip=1.0,
        autocast=on_gpu,
        channels_last=on_gpu,
    )
    loader.host_s = 0.0
    log = train(model, loader, plan, evaluate=lambda _: {}, recorder=Silent())  # type: ignore[arg-type]
    return log.train_s / loader.num_batches


def measure_network(
    name: str, image_nhwc: np.ndarray, *, batch: int, steps: int, device: str, compiled: bool
) -> list[str]:
    """One row for each kind of augmentation."""
    config = ArchitectureConfig(name=name)
    model = build_model(config, num_classes=NUM_CLASSES, image_size=SIDE).to(device).train()
    if compiled:
        model.compile()
    settings = {"batch": batch, "steps": steps, "device": device}
    plain = open_loader(image_nhwc, **settings)  # type: ignore[arg-type]
    loaders = {"resident": TimedLoader(loader=plain, resident=next(iter(plain.epoch(0))))}
    for augment in AUGMENTS:
        loaders[augment] = TimedLoader(loader=open_loader(image_nhwc, **settings, augment=augment))  # type: ignore[arg-type]
        short = open_loader(image_nhwc, **settings | {"steps": min(steps, WARM_UP_STEPS)}, augment=augment)  # type: ignore[arg-type]
        step_s(model, TimedLoader(loader=short))
    turns, host_s = [], {}
    for _ in range(TURNS):
        turns.append({kind: step_s(model, loader) for kind, loader in loaders.items()})
        host_s = {kind: loader.host_s / steps for kind, loader in loaders.items()}
    rows = []
    for augment in AUGMENTS:
        wait = 1 - float(np.median([turn["resident"] / turn[augment] for turn in turns]))
        own, real = (1e3 * float(np.median([turn[kind] for turn in turns])) for kind in ("resident", augment))
        rows.append(
            f"| {name} | {augment} | {1e3 * batch / real:,.0f} | {real:.1f} | {own:.1f} | "
            f"{100 * wait:.1f} | {1e3 * host_s[augment]:.1f} |"
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure and write the dated result."""
    parser = result_parser(__doc__)
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--pack-images", type=int, default=4096)
    parser.add_argument("--compiled", action="store_true", help="networks through torch.compile")
    options = parser.parse_args()
    if options.device.startswith("cuda"):
        make_gpu_exact()  # as every trial on a GPU
    lines = [
        f"| network | augmentation | images/s | step, ms | resident, ms | wait, % (wanted < {100 * WANTED_FRAC:.0f}) "
        "| host in next, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        image_nhwc = write_pack(Path(scratch) / "pack.npy", options.pack_images)
        for name in options.networks:
            lines += measure_network(
                name,
                image_nhwc,
                batch=options.batch,
                steps=options.steps,
                device=options.device,
                compiled=options.compiled,
            )
    hardware = torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.machine()
    form = "compiled" if options.compiled else "eager"
    notes = [
        f"{hardware}, torch {torch.__version__}; {form} networks, {SIDE} px, batch {options.batch}, "
        f"{options.steps} steps, median of {TURNS} turns."
    ]
    write_result(options.out, title="Training on a GPU", notes=notes, lines=lines)


if __name__ == "__main__":
    main()
