"""Batches for training and evaluation, straight from a memory-mapped pack.

The order, the draws and the augmentation of an epoch depend on the seed and the epoch's number alone, never
on what ran before in the process. On a GPU the next batch is made while the model works on this one: a thread
reads its images into pinned memory, and a stream of its own copies and changes them.

Axes: b images of a batch, c channels, h and w pixels, n images of the pack.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import torch

from fqsweep.data.augment import Augment, Values, draw_moves, flip, move, normalise
from fqsweep.data.autoaugment import auto_augment

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
    _values: Values = field(init=False, repr=False, compare=False)

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
        values = Values(scale_c=scale.view(1, 3, 1, 1), shift_c=shift.view(1, 3, 1, 1))
        object.__setattr__(self, "_values", values)

    @property
    def num_batches(self) -> int:
        """Batches in every epoch."""
        whole, rest = divmod(len(self.indices), self.batch_size)
        return whole + (rest > (1 if self.shuffle and whole > 0 else 0))

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of epoch number ``epoch``, the same at every call."""
        rng = np.random.default_rng([self.seed % 2**32, epoch])
        order = self._order(rng)
        index_bs = [
            order[start : start + self.batch_size]
            for start in range(0, self.num_batches * self.batch_size, self.batch_size)
        ]
        generators = (self._generator(rng) for _ in index_bs)
        if torch.device(self.device).type == "cuda":
            return self._batches_ahead(zip(index_bs, generators, strict=True))
        return itertools.starmap(self._batch, zip(index_bs, generators, strict=True))

    def _batches_ahead(self, draws: Iterator[tuple[np.ndarray, torch.Generator]]) -> Iterator[Batch]:
        """Each batch made in a thread and on a stream of its own, while the one before is used."""
        making = torch.cuda.Stream(self.device)
        # What this loader and the model have put on their stream comes first: the normalisation's values, for one.
        making.wait_stream(torch.cuda.current_stream(self.device))

        def make() -> tuple[Batch, torch.cuda.Event] | None:
            draw = next(draws, None)
            if draw is None:
                return None
            with torch.cuda.stream(making):
                return self._batch(*draw), making.record_event()

        with ThreadPoolExecutor(1) as thread:
            coming = thread.submit(make)
            while (made := coming.result()) is not None:
                coming = thread.submit(make)
                batch, is_ready = made
                using = torch.cuda.current_stream(self.device)
                using.wait_event(is_ready)
                for tensor in (batch.image_bchw, batch.label_b, batch.group_b):
                    tensor.record_stream(using)
                yield batch

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

    def _batch(self, index_b: np.ndarray, generator: torch.Generator) -> Batch:
        pixels_bhwc, label_b, group_b = (
            tensor.to(self.device, non_blocking=True)
            for tensor in (
                _gather(self.images, index_b, pinned=torch.device(self.device).type == "cuda"),
                torch.from_numpy(self.labels[index_b].astype(np.int64)),
                torch.from_numpy(self.groups[index_b].astype(np.int64)),
            )
        )
        image_bchw = self._augmented(pixels_bhwc.permute(0, 3, 1, 2), generator)
        return Batch(image_bchw=image_bchw, label_b=label_b, group_b=group_b)

    def _augmented(self, pixels_bchw: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if self.augment in ("none", "flips"):
            image_bchw = normalise(pixels_bchw, self._values)
            return image_bchw if self.augment == "none" else flip(image_bchw, generator=generator)
        if self.augment == "autoaugment":
            pixels_bchw = auto_augment(pixels_bchw, generator=generator)
        is_standard = self.augment == "standard"
        moves = draw_moves(len(pixels_bchw), with_crop_and_light=is_standard, generator=generator)
        return move(pixels_bchw, moves, self._values)


def _gather(images: np.ndarray, index_b: np.ndarray, *, pinned: bool) -> torch.Tensor:
    """Rows of the memory map, uint8 (b, h, w, c).

    In one call that lets go of Python's lock: a thread that makes batches row by row would stand in the model's way.
    """
    pixels = torch.empty((len(index_b), *images.shape[1:]), dtype=torch.uint8, pin_memory=pinned)
    np.take(np.asarray(images), index_b, axis=0, out=pixels.numpy(), mode="clip")
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
