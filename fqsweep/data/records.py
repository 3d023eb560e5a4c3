"""What a data set is, before and after its images are decoded.

Axes: n images, h and w pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np


class ImageSource(Protocol):
    """Where images come from: a folder of files or a generator."""

    def read(self, index: int, *, size: int) -> np.ndarray:
        """Image ``index`` as uint8 (size, size, 3), RGB.

        Raises:
            InputError: the image is missing or cannot be decoded; the message names its path.
        """
        ...

    def path_of(self, index: int) -> Path | None:
        """Where image ``index`` lies, None for generated images."""
        ...


@dataclass(frozen=True, kw_only=True)
class Groups:
    """One group attribute: ``code_n`` int64 (n,) into ``names``."""

    code_n: np.ndarray
    names: tuple[str, ...]


def images_text(count: int) -> str:
    """A number of images in words.

    >>> images_text(1), images_text(16)
    ('1 image', '16 images')
    """
    return f"{count} image{'' if count == 1 else 's'}"


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The images of a data set that take part, undecoded.

    Attributes:
        id_n: str (n,), unique and in an order that does not depend on the machine.
        label_n: int64 (n,) into ``class_names``.
        groups: group attribute -> Groups.
        cluster_n: int64 (n,); images with one value (one patient or lesion) stay on one side of a split.
        source: reads image ``index``.
        content: what the pixels depend on (file sizes, generator settings), for the pack's key.
        notes: what was left out and why, one sentence each.
        official_n: str (n,), the split that the set's own lists give each image; None where it has no lists.
    """

    id_n: np.ndarray
    label_n: np.ndarray
    class_names: tuple[str, ...]
    groups: Mapping[str, Groups]
    cluster_n: np.ndarray
    source: ImageSource
    content: str
    notes: tuple[str, ...] = ()
    official_n: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.id_n)


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Disjoint index arrays (int64, ascending) into ``Samples``."""

    train: np.ndarray
    calibration: np.ndarray
    validation: np.ndarray
    test: np.ndarray

    def items(self) -> tuple[tuple[str, np.ndarray], ...]:
        """Name and indices of each split."""
        return (
            ("train", self.train),
            ("calibration", self.calibration),
            ("validation", self.validation),
            ("test", self.test),
        )


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A data set ready for training.

    Attributes:
        image_nhwc: uint8 (n, h, w, 3), memory-mapped from the pack.
        digest: hash of ids, labels, groups, splits and pixels' content; equal for equal data sets.
    """

    samples: Samples
    splits: Splits
    image_nhwc: np.ndarray
    digest: str
