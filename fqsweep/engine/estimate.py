"""What a sweep is expected to cost, before it starts: work in multiply-accumulates, and time from it."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from fqsweep.cells import Cell, expand_cells, finetune_epochs
from fqsweep.config import (
    FITZPATRICK17K_CSV,
    ISIC2019_TRUTH_CSV,
    Allocating,
    ArchitectureConfig,
    BaqMethod,
    DatasetConfig,
    Resources,
    SearchSpace,
    in_data_dir,
)
from fqsweep.cost_table import count_passes
from fqsweep.engine.search import shared_tasks, trials_wanted
from fqsweep.engine.tasks import Task
from fqsweep.names import budget_label, budget_with_unit
from fqsweep.progress import format_duration

# Multiply-accumulates a second that training reaches: measured on one core of a 2-core cloud CPU (ResNet18 and
# DeiT-Tiny at 32 to 64 px: 3.6e10 to 4.0e10), assumed for one data-centre GPU.
CPU_CORE_MACS_PER_S = 3.5e10
GPU_MACS_PER_S = 1.5e13
FIXED_TASK_S = 3.0
# Images where the set is not at hand: of the official releases.
OFFICIAL_IMAGES = {"isic2019": 25_331, "fitzpatrick17k": 16_012}
ASSUMED_IMAGES = 10_000  # of a table that is not at hand
FORWARD_AND_BACKWARD = 3.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What ``fqsweep plan`` shows: counts, and seconds of one worker and of the whole sweep."""

    num_cells: int
    num_trials: int
    num_baselines: int
    num_importance: int
    num_slots: int
    worker_s: float
    total_s: float
    macs: float


class CostModel:
    """Expected seconds of a task on one worker of a search space."""

    def __init__(
        self, resources: Resources, *, data_dir: Path | None, macs: Mapping[str, float] | None = None
    ) -> None:
        """Prepare.

        Args:
            macs: ``<architecture>@<pixels>`` -> multiply-accumulates an image, where they are known already:
                counting them needs torch.
        """
        self.resources = resources
        self.data_dir = data_dir
        self.known_macs = dict(macs or {})

    def macs(self, task: Task) -> float:
        """Multiply-accumulates of a task."""
        cell = task.cell
        images = num_images(cell.dataset, self.data_dir)
        splits = cell.dataset.splits
        name, size = cell.architecture.name, cell.dataset.image_size
        per_image = self.known_macs.get(f"{name}@{size}") or macs_per_image(name, size)
        training = images * splits.train * FORWARD_AND_BACKWARD + images * splits.validation
        if task.kind == "baseline":
            passes = cell.recipe.epochs * training
        elif task.kind == "importance":
            settings = cell.point.settings
            assert isinstance(settings, Allocating)
            calibration = min(images * splits.calibration, cell.recipe.calibration_images or float("inf"))
            passes = calibration * count_passes(
                settings.importance, num_choices=len(settings.measured_choices), scale=settings.scale
            )
        else:
            passes = finetune_epochs(cell) * training + images * (splits.validation + splits.test)
        return passes * per_image

    def seconds(self, task: Task) -> float:
        """Expected seconds of a task."""
        gpus = self.resources.most_gpus
        rate = GPU_MACS_PER_S * min(gpus, 1.0) if gpus else CPU_CORE_MACS_PER_S * self.resources.cpus_per_trial
        grids = 1.3 if isinstance(task.cell.point.settings, BaqMethod) and task.kind == "trial" else 1.0
        return FIXED_TASK_S + grids * self.macs(task) / rate


@lru_cache(maxsize=64)
def macs_per_image(architecture: str, image_size: int) -> float:
    """Multiply-accumulates of a network for one image."""
    from fqsweep.models import build_model, count_macs  # loads torch

    model = build_model(
        ArchitectureConfig(name=architecture), num_classes=10, image_size=image_size, device="meta"
    )
    layers, between = count_macs(model, image_size=image_size)
    return float(sum(layers.values()) + between)


@lru_cache(maxsize=64)
def _rows(path: Path) -> int | None:
    from fqsweep.data.tabular import PARQUET_SUFFIXES, num_parquet_rows  # loads pandas

    try:
        if path.suffix.lower() in PARQUET_SUFFIXES:
            return num_parquet_rows(path)
        with path.open(newline="", encoding="utf-8") as stream:
            return sum(1 for row in csv.reader(stream) if any(row)) - 1
    except (OSError, ValueError, csv.Error):
        return None


def num_images(dataset: DatasetConfig, data_dir: Path | None) -> int:
    """Images of a data set: its own count, the rows of its table where that is at hand, else the official number."""
    if dataset.kind == "synthderm":
        return min(dataset.num_images, dataset.max_images or dataset.num_images)
    found = _counted(dataset, data_dir)
    count = found if found is not None else OFFICIAL_IMAGES.get(dataset.kind, ASSUMED_IMAGES)
    return min(count, dataset.max_images or count)


def _counted(dataset: DatasetConfig, data_dir: Path | None) -> int | None:
    """Rows of the data set's table; None where that is not at hand or cannot be read."""
    if data_dir is None or dataset.kind == "synthderm":
        return None
    if dataset.kind == "isic2019":
        return _rows(in_data_dir(data_dir, dataset.folder) / ISIC2019_TRUTH_CSV)
    if dataset.kind == "fitzpatrick17k":
        return _rows(in_data_dir(data_dir, dataset.folder) / FITZPATRICK17K_CSV)
    return _rows(in_data_dir(data_dir, dataset.csv)) if dataset.kind == "table" else None


def _images_text(dataset: DatasetConfig, data_dir: Path | None) -> str:
    text = f"{num_images(dataset, data_dir):,} images"
    if dataset.kind == "synthderm":
        return text
    if _counted(dataset, data_dir) is not None:
        return f"{text} (rows of its table)"
    source = "of the official release" if dataset.kind in OFFICIAL_IMAGES else "assumed"
    most = f"at most {dataset.max_images:,} " if dataset.max_images else ""
    hint = (
        "--data-dir counts yours"
        if data_dir is None
        else "its table is not in the data folder, or cannot be read"
    )
    return f"{text} ({most}{source}; {hint})"


def estimate(space: SearchSpace, *, data_dir: Path | None, num_cores: int) -> Plan:
    """Count a sweep's work and estimate its time on one machine.

    Args:
        num_cores: CPU cores of the machine; where trials use GPUs, it is taken to have one.

    Raises:
        InputError: an architecture that timm does not know, or that does not take the image size.
    """
    cells = expand_cells(space)
    shared = shared_tasks(cells)
    model = CostModel(space.resources, data_dir=data_dir)
    tasks: list[tuple[Task, int]] = [(task, 1) for task in shared.values()]
    tasks += [(_as_task(cell), trials_wanted(cell, space.search)) for cell in cells]
    worker_s = sum(model.seconds(task) * times for task, times in tasks)
    gpus, cpus = space.resources.most_gpus, space.resources.cpus_per_trial
    num_slots = max(1, int(1 / gpus + 1e-9)) if gpus else max(1, int(num_cores / cpus))
    return Plan(
        num_cells=len(cells),
        num_trials=sum(trials_wanted(cell, space.search) for cell in cells),
        num_baselines=sum(task.kind == "baseline" for task in shared.values()),
        num_importance=sum(task.kind == "importance" for task in shared.values()),
        num_slots=num_slots,
        worker_s=worker_s,
        total_s=worker_s / num_slots,
        macs=sum(model.macs(task) * times for task, times in tasks),
    )


def describe_plan(space: SearchSpace, plan: Plan, *, data_dir: Path | None) -> str:
    """The plan for people: the grid's axes, a row for each method, what is shared, the expected time."""
    lines = [f"{space.name}: {plan.num_cells} cells, {plan.num_trials} trials"]
    for dataset in space.datasets:
        groups = ", ".join(dataset.group_attributes)
        images = _images_text(dataset, data_dir)
        lines.append(
            f"  data set      {dataset.name}, {images}, at {dataset.image_size} px, groups by {groups}"
        )
    lines.append(f"  architectures {', '.join(a.name for a in space.architectures)}")
    budgets = [budget_label(bits, math.nan) for bits in space.budgets_bits]
    budgets += [budget_label(math.nan, num_bytes) for num_bytes in space.budgets_bytes]
    text = "; ".join(map(budget_with_unit, budgets)) or "none"
    lines.append(f"  budgets       {text} (bits: mean per weight; kB, MB: of the file)")
    repeated = ", ".join(map(str, space.search.repeat_seeds))
    lines.append(
        f"  seeds         {', '.join(map(str, space.seeds))}"
        + (f"; with the weights chosen in {space.seeds[0]}: {repeated}" if repeated else "")
    )
    lines += ["", *_method_rows(space), ""]
    lines.append(
        f"shared: {plan.num_baselines} full-precision parents and {plan.num_importance} cost tables, each made once"
    )
    place = "1 GPU" if space.resources.most_gpus else "this machine's CPU"
    lines.append(
        f"expected: about {format_duration(plan.total_s)} with {plan.num_slots} trials at a time on {place} "
        f"({plan.macs:.2g} multiply-accumulates; an order of magnitude, not a promise)"
    )
    return "\n".join(lines)


def _method_rows(space: SearchSpace) -> list[str]:
    """One row a method: its budgets, its cells, its trials, and what Optuna searches in it."""
    cells_by_variant: dict[str, list[Cell]] = {}
    for cell in expand_cells(space):
        cells_by_variant.setdefault(cell.point.variant, []).append(cell)
    width = max(14, *map(len, cells_by_variant))
    rows = [f"  {'method':<{width}}  {'budgets':<18}  {'cells':>5}  {'trials':>6}  searched by Optuna"]
    for variant, cells in cells_by_variant.items():
        budgets = "; ".join(dict.fromkeys(cell.budget for cell in cells))
        trials = sum(trials_wanted(cell, space.search) for cell in cells)
        searched = ", ".join(cells[0].point.free_weights) or "-"
        rows.append(f"  {variant:<{width}}  {budgets:<18}  {len(cells):>5}  {trials:>6}  {searched}")
    return rows


def _as_task(cell: Cell) -> Task:
    return Task(key=cell.key, kind="trial", cell=cell)
