"""Take some of the samples, by index or as a seeded stratified subset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fqsweep.data.records import Groups, ImageSource, Samples, images_text
from fqsweep.data.splits import stable_order, strata


@dataclass(frozen=True)
class SubsetSource:
    """Some images of another source: ``index`` is the ``kept[index]``-th of it."""

    whole: ImageSource
    kept: np.ndarray

    def read(self, index: int, *, size: int) -> np.ndarray:
        """Image ``index`` as uint8 (size, size, 3), RGB."""
        return self.whole.read(int(self.kept[index]), size=size)

    def path_of(self, index: int) -> Path | None:
        """Where image ``index`` lies, None for generated images."""
        return self.whole.path_of(int(self.kept[index]))


def take(samples: Samples, kept: np.ndarray) -> Samples:
    """The samples at the ascending indices ``kept``; class and group names stay as they are."""
    groups = {name: Groups(code_n=g.code_n[kept], names=g.names) for name, g in samples.groups.items()}
    return replace(
        samples,
        id_n=samples.id_n[kept],
        label_n=samples.label_n[kept],
        groups=groups,
        cluster_n=samples.cluster_n[kept],
        source=SubsetSource(samples.source, kept),
        official_n=None if samples.official_n is None else samples.official_n[kept],
    )


def stratified_subset(
    samples: Samples, *, max_images: int | None, attributes: Sequence[str], seed: int
) -> Samples:
    """At most ``max_images`` samples with the shares of class x groups kept; chosen by seed and ids.

    Within each stratum images are ranked by a hash of id and seed; the images with the lowest relative rank
    over all strata are taken. So every stratum gives its share, to within one image, and the first image of
    each comes before the second of any: rare strata do not vanish.
    """
    if max_images is None or max_images >= len(samples):
        return samples
    rank_n = stable_order(samples.id_n, seed=seed)
    stratum_n = strata(samples, attributes)
    relative_n = np.empty(len(samples))
    for stratum in range(int(stratum_n.max()) + 1):
        members = np.flatnonzero(stratum_n == stratum)
        members = members[np.argsort(rank_n[members])]
        relative_n[members] = np.arange(len(members)) / len(members)
    kept = np.lexsort((rank_n, relative_n))[:max_images]
    note = f"{images_text(len(samples) - max_images)} left out by max_images = {max_images}."
    return replace(take(samples, np.sort(kept)), notes=(*samples.notes, note))
