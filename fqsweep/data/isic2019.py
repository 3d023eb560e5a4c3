"""ISIC 2019 (Combalia et al. 2019; Tschandl et al. 2018; Codella et al. 2018) in its official layout.

``<folder>/ISIC_2019_Training_GroundTruth.csv`` with one column per class,
``<folder>/ISIC_2019_Training_Metadata.csv`` and ``<folder>/ISIC_2019_Training_Input/*.jpg``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from fqsweep.config import ISIC2019_TRUTH_CSV, Isic2019Config, plain_attributes
from fqsweep.data.assembly import Rows, assemble
from fqsweep.data.folder import TableImages, first_folder, require_folder
from fqsweep.data.records import Samples
from fqsweep.data.tabular import as_numbers, bin_names, name_bins, plain_text, read_table
from fqsweep.errors import InputError

METADATA_CSV = "ISIC_2019_Training_Metadata.csv"
IMAGE_FOLDERS = (
    "ISIC_2019_Training_Input",
    "ISIC_2019_Training_Input_preprocessed",
    "images",
    "train",
    "data",
    ".",
)
CLASSES = ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK")
SEXES = ("female", "male")
_TWIN = "_downsampled"


def describe(config: Isic2019Config, data_dir: Path) -> Samples:
    """The images with label, sex or age, and lesion.

    Raises:
        InputError: see ``fqsweep.data.describe_samples``.
    """
    root = require_folder(data_dir, config.folder, what="ISIC 2019")
    truth, metadata = _read_tables(root)
    id_n = truth["image"].to_numpy(str)
    rows = Rows(
        origin=str(root),
        id_n=id_n,
        label_n=_labels(truth, root / ISIC2019_TRUTH_CSV),
        cluster_n=metadata["lesion_id"].to_numpy(str),
        class_names=tuple(name for name in CLASSES if name in truth.columns),
        group_n={
            name: _group_values(name, metadata, config, root / METADATA_CSV)
            for name in plain_attributes(config.group_attributes)
        },
        group_names={"sex": SEXES, "age": bin_names(config.age_edges)},
        images=TableImages(id_n, lambda: first_folder(root, IMAGE_FOLDERS), spellings),
    )
    return assemble(rows, config, unknown_groups=config.unknown_groups, missing_images=config.missing_images)


def _read_tables(root: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Ground truth, and the metadata of the same images in the same order, with the file's rows as index."""
    truth = read_table(root / ISIC2019_TRUTH_CSV, columns=("image", *CLASSES[:-1]))
    used = ["image", "age_approx", "sex", "lesion_id"]
    metadata = read_table(root / METADATA_CSV, columns=used)[used].drop_duplicates()
    missing = sorted(set(truth["image"]) - set(metadata["image"]))
    if missing:
        raise InputError(
            f"{root / METADATA_CSV} must describe every image of {ISIC2019_TRUTH_CSV}, but {len(missing)} are "
            f"missing, first: {', '.join(missing[:3])}; take both files from the same release"
        )
    twice = metadata["image"][metadata["image"].duplicated()]
    if len(twice):
        raise InputError(
            f"{root / METADATA_CSV}: {twice.nunique()} images have several rows that do not agree, first: "
            f"{twice.iloc[0]}; keep the right one"
        )
    row_of = dict(zip(metadata["image"], metadata.index, strict=True))
    return truth, metadata.loc[[row_of[name] for name in truth["image"]]]


def _labels(truth: pd.DataFrame, path: Path) -> np.ndarray:
    """The class whose column is 1, str (n,); empty where none is."""
    names = [name for name in CLASSES if name in truth.columns]
    hot_nk = np.stack([np.nan_to_num(as_numbers(truth[name], path=path)) for name in names], axis=1)
    several = np.flatnonzero((hot_nk > 0.5).sum(axis=1) > 1)
    if len(several):
        raise InputError(
            f"{path}: image {truth['image'].iloc[several[0]]} has several classes; each image has one"
        )
    return np.where(hot_nk.max(axis=1) > 0.5, np.array(names)[hot_nk.argmax(axis=1)], "")


def _group_values(attribute: str, metadata: pd.DataFrame, config: Isic2019Config, path: Path) -> np.ndarray:
    """Each row's sex, or the bin of its age, str (n,); empty where unknown."""
    if attribute == "age":
        return name_bins(as_numbers(metadata["age_approx"], path=path), config.age_edges)
    value_n = np.array([plain_text(text).lower() for text in metadata["sex"]], dtype=str)
    strange = sorted(set(value_n) - {*SEXES, ""})
    if strange:
        raise InputError(
            f"{path}: column 'sex' must hold female, male or nothing, but has {', '.join(strange)}"
        )
    return value_n


def spellings(name: str) -> tuple[str, str]:
    """An image and its twin: copies in the wild have lost, or gained, the suffix ``_downsampled``."""
    return name, name.removesuffix(_TWIN) if name.endswith(_TWIN) else name + _TWIN
