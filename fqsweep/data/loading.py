"""Batches for training and evaluation, straight from a memory-mapped pack.

The order, the draws and the augmentation of an epoch depend on the seed and the epoch's number alone, never
on what ran before in the process.

Axes: b images of a batch, c channels, h and w pixels, n images of the pack.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import torch

from fqsweep.data.augment import Augment, augment_floats, auto_augment

Balance = Literal["none", "sampler"]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Images float32 (b, c, h, w), normalised; labels and groups int64 (b,); all on the loader's device."""

    image_bchw: torch.Tensor
    label_b: torch.Tensor
    group_b: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class BatchLoader:
    """Batches of some images of a pack.

    Attributes:
        images: uint8 (n, h, w, 3), as ``Dataset.image_nhwc``.
        labels, groups: int64 (n,).
        indices: which images of the pack; evaluation keeps their order.
        batch_size: the last batch may be smaller. In training (``shuffle``) a last batch of one image is left
            out, because batch normalisation cannot work on it; in evaluation every image is given.
        device: where batches are made.
        mean, std: of each channel, for pixel values from 0 to 1.
        shuffle: False gives the images in the order of ``indices``.
        class_balance, group_balance: ``sampler`` draws every class, every group or (both) every class of every
            group equally often (needs ``shuffle``); an epoch still has as many images as there are indices.
        augment: see ``fqsweep.config.TrainingRecipe``.
        seed: of order and augmentation.

    Raises:
        ValueError: an option is unknown, sizes disagree, there are no images, or balance without shuffling.
    """

    images: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    indices: np.ndarray
    batch_size: int
    device: torch.device | str
    mean: Sequence[float]
    std: Sequence[float]
    shuffle: bool = True
    class_balance: Balance | str = "none"
    group_balance: Balance | str = "none"
    augment: Augment | str = "none"
    seed: int = 0
    _normalisation: tuple[torch.Tensor, torch.Tensor] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for option in ("class_balance", "group_balance"):
            value = getattr(self, option)
            if value not in get_args(Balance):
                raise ValueError(f"{option} must be one of {get_args(Balance)}, but is {value!r}")
            if value == "sampler" and not self.shuffle:
                raise ValueError(f"{option} 'sampler' draws at random: set shuffle=True or {option}='none'")
        if self.augment not in get_args(Augment):
            raise ValueError(f"augment must be one of {get_args(Augment)}, but is {self.augment!r}")
        if not len(self.images) == len(self.labels) == len(self.groups):
            sizes = f"{len(self.images)}, {len(self.labels)}, {len(self.groups)}"
            raise ValueError(f"images, labels and groups must have one length, but have {sizes}")
        if len(self.indices) == 0:
            raise ValueError("there is no image to load: indices is empty")
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=self.device) for values in (self.mean, self.std)
        )
        # (x / 255 - mean) / std as one multiplication and one addition.
        scale, shift = 1 / (255 * std), -mean / std
        object.__setattr__(self, "_normalisation", (scale.view(1, 3, 1, 1), shift.view(1, 3, 1, 1)))

    @property
    def num_batches(self) -> int:
        """Batches in every epoch."""
        whole, rest = divmod(len(self.indices), self.batch_size)
        return whole + (rest > (1 if self.shuffle and whole > 0 else 0))

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of epoch number ``epoch``, the same at every call."""
        rng = np.random.default_rng([self.seed % 2**32, epoch])
        order = self._order(rng)
        for number in range(self.num_batches):
            index_b = order[number * self.batch_size : (number + 1) * self.batch_size]
            yield self._batch(index_b, generator=self._generator(rng))

    def _order(self, rng: np.random.Generator) -> np.ndarray:
        if not self.shuffle:
            return self.indices
        if self.class_balance == self.group_balance == "none":
            return rng.permutation(self.indices)
        return _balanced_draw(self._members_by_kind, num_draws=len(self.indices), rng=rng)

    @cached_property
    def _members_by_kind(self) -> list[np.ndarray]:
        """The images of each class, group, or class in a group: of what is drawn equally often."""
        kind_i = np.zeros(len(self.indices), np.int64)
        if self.class_balance == "sampler":
            kind_i += self.labels[self.indices]
        if self.group_balance == "sampler":
            kind_i += self.groups[self.indices] * (int(self.labels.max()) + 1)
        return [self.indices[kind_i == kind] for kind in np.unique(kind_i)]

    def _generator(self, rng: np.random.Generator) -> torch.Generator:
        """Random draws are made on the CPU on every device, so that a GPU sees the same augmentation."""
        return torch.Generator().manual_seed(int(rng.integers(2**63)))

    def _batch(self, index_b: np.ndarray, *, generator: torch.Generator) -> Batch:
        pixels_bhwc = torch.from_numpy(_gather(self.images, index_b)).to(self.device, non_blocking=True)
        pixels_bchw = pixels_bhwc.permute(0, 3, 1, 2)
        if self.augment == "autoaugment":
            pixels_bchw = auto_augment(pixels_bchw, generator=generator)
        scale, shift = self._normalisation
        image_bchw = pixels_bchw.to(torch.float32, memory_format=torch.contiguous_format)
        if self.augment != "none":
            image_bchw = augment_floats(image_bchw, kind=self.augment, generator=generator)
        return Batch(
            image_bchw=image_bchw.mul_(scale).add_(shift),
            label_b=torch.from_numpy(self.labels[index_b].astype(np.int64)).to(self.device),
            group_b=torch.from_numpy(self.groups[index_b].astype(np.int64)).to(self.device),
        )


def _gather(images: np.ndarray, index_b: np.ndarray) -> np.ndarray:
    """Rows of the memory map, read in the file's order and given in the asked one."""
    ascending = np.argsort(index_b, kind="stable")
    pixels = np.empty((len(index_b), *images.shape[1:]), dtype=np.uint8)
    pixels[ascending] = images[index_b[ascending]]
    return pixels


def _balanced_draw(members_k: list[np.ndarray], *, num_draws: int, rng: np.random.Generator) -> np.ndarray:
    """``num_draws`` indices, each kind equally often (to within one), in random order.

    A kind goes through all its images before any comes again.
    """
    count_k = np.full(len(members_k), num_draws // len(members_k))
    count_k[rng.permutation(len(members_k))[: num_draws % len(members_k)]] += 1
    drawn = [
        np.concatenate([rng.permutation(members) for _ in range(-(-count // len(members)))])[:count]
        for members, count in zip(members_k, count_k.tolist(), strict=True)
        if count > 0
    ]
    return rng.permutation(np.concatenate(drawn))
