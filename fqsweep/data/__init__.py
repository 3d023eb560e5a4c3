"""Data sets, from a configuration to decoded images with labels, groups and splits.

``loading`` (which needs torch) is not imported here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fqsweep.config import (
    DatasetConfig,
    Fitzpatrick17kConfig,
    Isic2019Config,
    SynthdermConfig,
    TableConfig,
    content_hash,
)
from fqsweep.data import fitzpatrick17k, isic2019, synthderm, table
from fqsweep.data.duplicates import join_near_duplicates, joins_near_duplicates
from fqsweep.data.packs import OnProgress, open_pack, pack_path
from fqsweep.data.records import Dataset, Samples, Splits
from fqsweep.data.report import describe_warnings
from fqsweep.data.splits import check_groups, split_samples, splits_as_csv
from fqsweep.data.store import PACK_STORE_VARIABLE
from fqsweep.data.subset import stratified_subset
from fqsweep.errors import InputError
from fqsweep.files import SPLITS_ENDING, WARNINGS_ENDING, write_bytes

__all__ = ["Dataset", "Samples", "Splits", "dataset_digest", "describe_samples", "open_dataset", "plan_dataset"]

LOCAL_PACKS_VARIABLE = "FQSWEEP_LOCAL_PACKS"


def describe_samples(config: DatasetConfig, *, data_dir: Path | None) -> Samples:
    """The images that take part, with labels, groups and clusters; no image is decoded.

    Args:
        config: which set, and how its labels and groups are read.
        data_dir: the folder of data sets; generated sets need none.

    Raises:
        InputError: a folder, CSV, column, class or image is missing, or no image is left. The message names
            the path, what was looked for, and what to do.
    """
    if isinstance(config, SynthdermConfig):
        return synthderm.describe(config)
    if data_dir is None:
        raise InputError(f"data set {config.name!r} ({config.kind}) is read from files: pass --data-dir")
    if isinstance(config, Isic2019Config):
        return isic2019.describe(config, data_dir)
    if isinstance(config, Fitzpatrick17kConfig):
        return fitzpatrick17k.describe(config, data_dir)
    assert isinstance(config, TableConfig)
    return table.describe(config, data_dir)


def plan_dataset(config: DatasetConfig, *, data_dir: Path | None) -> tuple[Samples, Splits]:
    """Which images take part and on which side, as far as it can be said without decoding any.

    Raises:
        InputError: as ``describe_samples`` and ``check_groups``.
    """
    samples = stratified_subset(
        describe_samples(config, data_dir=data_dir),
        max_images=config.max_images,
        attributes=config.group_attributes,
        seed=config.splits.seed,
    )
    return samples, _checked_splits(samples, config)


def open_dataset(
    config: DatasetConfig, *, data_dir: Path | None, pack_dir: Path, on_progress: OnProgress | None = None
) -> Dataset:
    """A data set ready for training: described, cut to ``max_images``, split, checked and decoded.

    The split is stored beside the pack as ``<digest>_splits.csv``: id, split, class and groups of each image; and as
    ``<digest>_warnings.txt`` what to know of the set (``fqsweep.data.report.describe_warnings``), near-duplicates
    among it.

    The groups are checked before anything is decoded, and again where near-duplicates found in the decoded
    images (of sets read from files) were joined to one cluster. Where the environment variable
    ``FQSWEEP_LOCAL_PACKS`` names a folder on the machine's own disk, packs are copied there once a machine; where
    ``FQSWEEP_PACK_STORE`` names a folder on object storage (``s3://bucket/packs``), they are fetched from there in
    place of decoding, and put there by whoever decodes first.

    Args:
        config: which set.
        data_dir: the folder of data sets, None for generated ones.
        pack_dir: where decoded images are kept.
        on_progress: called with (images done, images in all) while decoding.

    Raises:
        InputError: as ``describe_samples``, ``check_groups`` and ``fqsweep.data.packs.open_pack``.
    """
    samples, splits = plan_dataset(config, data_dir=data_dir)
    local = os.environ.get(LOCAL_PACKS_VARIABLE)
    image_nhwc = open_pack(
        samples,
        size=config.image_size,
        pack_dir=pack_dir,
        local_dir=Path(local) if local else None,
        store=os.environ.get(PACK_STORE_VARIABLE) or None,
        on_progress=on_progress,
    )
    if joins_near_duplicates(config):
        joined = join_near_duplicates(samples, image_nhwc, cache=_pairs_path(samples, config, pack_dir))
        if joined is not samples:
            found = joined.notes[len(samples.notes) :]
            samples, splits = joined, _checked_splits(joined, config, because=found)
    digest = dataset_digest(samples, splits, config.image_size)
    split_file = pack_dir / f"{digest}{SPLITS_ENDING}"
    if not split_file.exists():
        warnings = describe_warnings(config, samples, splits)
        write_bytes(pack_dir / f"{digest}{WARNINGS_ENDING}", "".join(f"{line}\n" for line in warnings).encode())
        write_bytes(split_file, splits_as_csv(samples, splits))
    return Dataset(samples=samples, splits=splits, image_nhwc=image_nhwc, digest=digest)


def _pairs_path(samples: Samples, config: DatasetConfig, pack_dir: Path) -> Path:
    return pack_path(samples, size=config.image_size, pack_dir=pack_dir).with_suffix(".duplicates.npy")


def _checked_splits(samples: Samples, config: DatasetConfig, *, because: Sequence[str] = ()) -> Splits:
    splits = split_samples(samples, config.splits, attributes=config.group_attributes)
    try:
        check_groups(samples, splits, attributes=config.group_attributes, min_count=config.min_group_count)
    except InputError as error:
        raise InputError(f"data set {config.name!r}: {' '.join([str(error), *because])}") from error
    return splits


def dataset_digest(samples: Samples, splits: Splits, image_size: int) -> str:
    """Hash of everything that training and evaluation can see."""
    return content_hash(
        {
            "ids": samples.id_n.tolist(),
            "labels": samples.label_n.tolist(),
            "classes": samples.class_names,
            "groups": {name: [g.names, g.code_n.tolist()] for name, g in samples.groups.items()},
            "splits": {name: index.tolist() for name, index in splits.items()},
            "content": samples.content,
            "image_size": image_size,
        }
    )
