"""What every step of a cell works with: its data, device and seeds, opened once."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fqsweep.cells import Cell
from fqsweep.config import DatasetConfig
from fqsweep.data import open_dataset
from fqsweep.data.loading import BatchLoader
from fqsweep.data.records import Dataset, Groups
from fqsweep.errors import TrialError
from fqsweep.fairness import FairnessReport, score_probabilities
from fqsweep.files import SweepPaths
from fqsweep.models import Normalisation, build_untrained, file_notes, normalisation_of
from fqsweep.training import predict

EVALUATION_BATCH = 128
CALIBRATION_BATCH = 32
# Data sets that a process keeps: labels, groups, and a map of the packed images.
MOST_OPENED = 4
_opened: dict[tuple[str, Path | None, Path], Dataset] = {}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The data of a cell on the device where its trial runs."""

    cell: Cell
    dataset: Dataset
    group: Groups
    normalisation: Normalisation
    device: torch.device

    @property
    def num_classes(self) -> int:
        return len(self.dataset.samples.class_names)

    @property
    def autocast(self) -> bool:
        return self.cell.recipe.precision == "bf16" and self.device.type == "cuda"

    @property
    def channels_last(self) -> bool:
        wanted = self.cell.recipe.channels_last
        return wanted == "always" or (wanted == "auto" and self.device.type == "cuda")

    @property
    def file_notes(self) -> dict[str, str]:
        """What a packed file of the cell says of itself."""
        return file_notes(
            self.cell.architecture,
            image_size=self.cell.dataset.image_size,
            class_names=self.dataset.samples.class_names,
        )

    def model_with(self, state: Mapping[str, torch.Tensor]) -> nn.Module:
        """The cell's network with these weights, on the setting's device in eval mode."""
        model = build_untrained(
            self.cell.architecture.name,
            num_classes=self.num_classes,
            image_size=self.cell.dataset.image_size,
        )
        model.load_state_dict(dict(state))
        return model.to(self.device).eval()

    def training_batches(self, *, seed: int) -> BatchLoader:
        """The training split, shuffled or class-balanced, and augmented, as the recipe says."""
        recipe = self.cell.recipe
        return self._loader(
            self.dataset.splits.train,
            batch_size=recipe.batch_size,
            shuffle=True,
            class_balance=recipe.class_balance,
            group_balance=recipe.group_balance,
            augment=recipe.augment,
            seed=seed,
        )

    def plain_batches(self, split: str) -> BatchLoader:
        """A whole split as it is, in a fixed order."""
        return self._loader(getattr(self.dataset.splits, split), batch_size=EVALUATION_BATCH, shuffle=False)

    def calibration_batches(
        self, most: int | None = None
    ) -> Callable[[], Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
        """The calibration images that importance uses, or at most so many of them: the same ones at each call."""
        indices = self.dataset.splits.calibration
        wanted = self.cell.recipe.calibration_images
        if most is not None:
            wanted = most if wanted is None else min(most, wanted)
        if wanted is not None and wanted < len(indices):
            indices = _spread_over_groups(indices, self.group.code_n, wanted, seed=self.cell.seed)
        loader = self._loader(indices, batch_size=CALIBRATION_BATCH, shuffle=False)
        return lambda: ((b.image_bchw, b.label_b, b.group_b) for b in loader.epoch(0))

    def _loader(
        self,
        indices: np.ndarray,
        *,
        batch_size: int,
        shuffle: bool,
        class_balance: str = "none",
        group_balance: str = "none",
        augment: str = "none",
        seed: int = 0,
    ) -> BatchLoader:
        return BatchLoader(
            images=self.dataset.image_nhwc,
            labels=self.dataset.samples.label_n,
            groups=self.group.code_n,
            indices=indices,
            batch_size=batch_size,
            device=self.device,
            mean=self.normalisation.mean,
            std=self.normalisation.std,
            shuffle=shuffle,
            class_balance=class_balance,
            group_balance=group_balance,
            augment=augment,
            seed=seed,
        )

    def score(
        self, model: nn.Module, split: str, *, autocast: bool = False
    ) -> tuple[dict[str, float], FairnessReport]:
        """The split's metrics with its prefix (``val/`` or ``test/``), the loss among them.

        Args:
            autocast: compute as training does, in bf16 where the recipe asks for it. In float32 as who uses the file
                does, otherwise: bf16 rounds weights of 8 bits once more and makes classes tie.
        """
        full_name = {"val": "validation", "test": "test"}[split]
        probability_nc, label_n, group_n, loss = predict(
            model, self.plain_batches(full_name).epoch(0), autocast=autocast and self.autocast
        )
        metrics, report = score_probabilities(
            probability_nc,
            label_n,
            group_n,
            num_groups=len(self.group.names),
            min_count=self.cell.dataset.min_group_count,
        )
        return {f"{split}/loss": loss, **{f"{split}/{name}": value for name, value in metrics.items()}}, report


def open_setting(cell: Cell, *, paths: SweepPaths, data_dir: Path | None, device: str) -> Setting:
    """Open a cell's data and check its device.

    Raises:
        InputError: the data cannot be used.
        TrialError: a GPU was asked for and there is none.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise TrialError("a GPU was asked for (resources.gpus_per_trial) but torch sees none on this machine")
    if device.startswith("cuda"):
        make_gpu_exact()
    dataset = _open_once(cell.dataset, data_dir, paths.packs)
    return Setting(
        cell=cell,
        dataset=dataset,
        group=dataset.samples.groups[cell.group_attribute],
        normalisation=normalisation_of(cell.architecture),
        device=torch.device(device),
    )


def _open_once(config: DatasetConfig, data_dir: Path | None, pack_dir: Path) -> Dataset:
    """A process does many tasks of few data sets: their tables are read, and their files looked for, once."""
    key = (config.model_dump_json(), data_dir, pack_dir)
    if key not in _opened:
        dataset = open_dataset(config, data_dir=data_dir, pack_dir=pack_dir)
        if len(_opened) == MOST_OPENED:
            del _opened[next(iter(_opened))]
        _opened[key] = dataset
    return _opened[key]


def make_gpu_exact() -> None:
    """Let this process's GPU compute in float32 where float32 is said, and the same for the same seed, as a CPU does.

    Else cuDNN rounds what goes into float32 convolutions to TF32's 10 bits (products of matrices stay exact). An
    operation that has no repeatable form is done in the one that it has. Before the first product of matrices: cuBLAS
    reads its setting once.
    """
    torch.backends.cudnn.allow_tf32 = False
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Memory that is about to be written need not be filled first.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch, so that a trial does not depend on what ran before it in its process."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _spread_over_groups(indices: np.ndarray, code_n: np.ndarray, wanted: int, *, seed: int) -> np.ndarray:
    """A seeded subset with as equal a number from each group as there are images."""
    generator = np.random.default_rng([seed, 0xCA11])
    shuffled = generator.permutation(indices)
    rank = np.empty(len(shuffled), dtype=np.int64)
    for code in np.unique(code_n[shuffled]):
        members = np.flatnonzero(code_n[shuffled] == code)
        rank[members] = np.arange(len(members))
    return np.sort(shuffled[np.argsort(rank, kind="stable")[:wanted]])
