"""Fitzpatrick17k (Groh et al. 2021): clinical photographs with a Fitzpatrick skin type.

``<folder>/fitzpatrick17k.csv`` as published, and for each row one image called by its ``md5hash`` (or, as
in copies fetched by address, its ``url_alphanum``), beside the CSV or in ``images/``. The types are
``fitzpatrick_scale`` (``fitzpatrick`` in the prepared archive), -1 or empty where unknown. The prepared archive
has lists of its splits beside the CSV: ``train.csv``, ``validation.csv`` (or ``val.csv``), ``test.csv``;
``train_score.csv`` and the like are read, too.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from fqsweep.config import FITZPATRICK17K_CSV, Fitzpatrick17kConfig, plain_attributes
from fqsweep.data.assembly import Rows, assemble
from fqsweep.data.folder import TableImages, first_folder, require_folder
from fqsweep.data.records import Samples, images_text
from fqsweep.data.splits import SPLIT_NAMES, SPLIT_SPELLINGS
from fqsweep.data.tabular import as_numbers, read_table, require_column
from fqsweep.errors import InputError

IMAGE_FOLDERS = (
    "images",
    "data",
    "finalfitz17k",
    "fitzpatrick17k",
    "fitzpatrick17k_images",
    "fitz17k",
    "data/finalfitz17k",
    "data/fitzpatrick17k",
    ".",
)
LIST_NAMES = (
    *("{}.csv", "split_{}.csv", "{}_split.csv", "fitzpatrick17k_{}.csv", "{}_list.csv"),
    *("{}_score.csv", "all_{}.csv"),  # read by the published code of FairQuant
)
SKIN_TYPES = ("1", "2", "3", "4", "5", "6")
SKIN_TONES = ("1-3", "4-6")
_WRONGLY_LABELLED = "3"


def describe(config: Fitzpatrick17kConfig, data_dir: Path) -> Samples:
    """The images with label and skin type or tone.

    Raises:
        InputError: see ``fqsweep.data.describe_samples``.
    """
    root = require_folder(data_dir, config.folder, what="Fitzpatrick17k")
    path = root / FITZPATRICK17K_CSV
    table = read_table(path, columns=("md5hash", config.label_level))
    notes: tuple[str, ...] = ()
    if config.drop_wrong_labels:
        require_column(table, "qc", path=path)
        wrong = table["qc"].str.startswith(_WRONGLY_LABELLED)
        table = table[~wrong]
        notes = (
            (f"{images_text(int(wrong.sum()))} marked as wrongly labelled left out.",) if wrong.any() else ()
        )
    type_n = _skin_types(table, path)
    named = {"skin_type": np.array(["", *SKIN_TYPES]), "skin_tone": np.array(["", *np.repeat(SKIN_TONES, 3)])}
    id_n, label_n = table["md5hash"].to_numpy(str), table[config.label_level].to_numpy(str)
    rows = Rows(
        origin=str(path),
        id_n=id_n,
        label_n=label_n,
        cluster_n=np.full(len(id_n), ""),
        class_names=tuple(sorted(set(label_n.tolist()) - {""})),
        group_n={name: named[name][type_n] for name in plain_attributes(config.group_attributes)},
        group_names={"skin_type": SKIN_TYPES, "skin_tone": SKIN_TONES},
        images=images_of(table, root),
        official_n=_official_splits(root, id_n) if config.official_splits else None,
        notes=notes,
    )
    return assemble(rows, config, unknown_groups=config.unknown_groups, missing_images=config.missing_images)


def images_of(table: pd.DataFrame, root: Path) -> TableImages:
    """The images of the table's rows, wherever below ``root`` they lie."""
    return TableImages(
        table["md5hash"].to_numpy(str), lambda: first_folder(root, IMAGE_FOLDERS), _spellings(table)
    )


def _spellings(table: pd.DataFrame) -> Callable[[str], tuple[str, ...]]:
    """An image's names: its hash, or its address without signs."""
    if "url_alphanum" not in table.columns:
        return lambda name: (name,)
    address = dict(zip(table["md5hash"], table["url_alphanum"], strict=True))
    return lambda name: (name, address[name]) if address.get(name) else (name,)


def _official_splits(root: Path, id_n: np.ndarray) -> np.ndarray:
    """The split that the archive's lists give each image, str (n,); empty where none names it."""
    split_of: dict[str, str] = {}
    for split in SPLIT_NAMES:
        spelled = [name for name, meaning in SPLIT_SPELLINGS.items() if meaning == split]
        files = [root / form.format(name) for name in spelled for form in LIST_NAMES]
        path = next((file for file in files if file.is_file()), None)
        for name in [] if path is None else read_table(path, columns=("md5hash",))["md5hash"]:
            if split_of.setdefault(name, split) != split:
                raise InputError(f"{path}: image {name} stands in the lists of {split_of[name]} and {split}")
    if "train" not in split_of.values():
        others = sorted(file.name for file in root.glob("*.csv") if file.name != FITZPATRICK17K_CSV)
        found = ", ".join(others) or "none"
        raise InputError(
            f"official_splits needs the list of the training images in {root}, as train.csv with a column md5hash "
            f"(other CSVs there: {found}); put it there or set official_splits: false"
        )
    return np.array([split_of.get(name, "") for name in id_n.tolist()], dtype=str)


def _skin_types(table: pd.DataFrame, path: Path) -> np.ndarray:
    """Types 1 to 6, int64 (n,), 0 where unknown."""
    column = "fitzpatrick_scale" if "fitzpatrick_scale" in table.columns else "fitzpatrick"
    if column not in table.columns:
        require_column(table, "fitzpatrick_scale", path=path)
    type_n = np.nan_to_num(as_numbers(table[column], path=path))
    type_n = np.where(type_n == -1, 0, type_n)
    wrong = np.flatnonzero(~np.isin(type_n, range(7)))
    if len(wrong):
        line, text = table.index[wrong[0]] + 2, table[column].iloc[wrong[0]]
        raise InputError(f"{path}, line {line}: {column} must be 1 to 6, or -1 for unknown, but is {text}")
    return type_n.astype(np.int64)
