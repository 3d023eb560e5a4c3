"""Fitzpatrick17k (Groh et al. 2021): clinical photographs with a Fitzpatrick skin type.

``<folder>/fitzpatrick17k.csv`` as published, and one ``<md5hash>.jpg`` for each row, beside it or in
``images/``. The types are ``fitzpatrick_scale`` (``fitzpatrick`` in some copies), -1 where unknown.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from fqsweep.config import Fitzpatrick17kConfig
from fqsweep.data.assembly import Rows, assemble
from fqsweep.data.folder import ImageFolder, first_folder, require_folder
from fqsweep.data.records import ImageSource, Samples
from fqsweep.data.tabular import as_numbers, read_table, require_column
from fqsweep.errors import InputError

CSV = "fitzpatrick17k.csv"
IMAGE_FOLDERS = ("images", "data", "finalfitz17k", "fitzpatrick17k", "data/finalfitz17k", ".")
SKIN_TYPES = ("1", "2", "3", "4", "5", "6")
SKIN_TONES = ("1-3", "4-6")


def describe(config: Fitzpatrick17kConfig, data_dir: Path) -> Samples:
    """The images with label and skin type or tone.

    Raises:
        InputError: see ``fqsweep.data.describe_samples``.
    """
    root = require_folder(data_dir, config.folder, what="Fitzpatrick17k")
    path = root / CSV
    table = read_table(path, columns=("md5hash", config.label_level))
    type_n = _skin_types(table, path)
    named = {"skin_type": np.array(["", *SKIN_TYPES]), "skin_tone": np.array(["", *np.repeat(SKIN_TONES, 3)])}
    id_n = table["md5hash"].to_numpy(str)

    def find_source(kept: np.ndarray) -> tuple[ImageSource, str]:
        return ImageFolder(first_folder(root, IMAGE_FOLDERS)).open(id_n[kept].tolist())

    label_n = table[config.label_level].to_numpy(str)
    rows = Rows(
        origin=str(path),
        id_n=id_n,
        label_n=label_n,
        cluster_n=np.full(len(id_n), ""),
        class_names=tuple(sorted(set(label_n.tolist()) - {""})),
        group_n={attribute: named[attribute][type_n] for attribute in config.group_attributes},
        group_names={"skin_type": SKIN_TYPES, "skin_tone": SKIN_TONES},
        find_source=find_source,
    )
    return assemble(rows, label_map=config.label_map, unknown_groups=config.unknown_groups)


def _skin_types(table: pd.DataFrame, path: Path) -> np.ndarray:
    """Types 1 to 6, int64 (n,), 0 where unknown."""
    column = "fitzpatrick_scale" if "fitzpatrick_scale" in table.columns else "fitzpatrick"
    if column not in table.columns:
        require_column(table, "fitzpatrick_scale", path=path)
    type_n = np.nan_to_num(as_numbers(table[column], path=path))
    type_n = np.where(type_n == -1, 0, type_n)
    wrong = np.flatnonzero(~np.isin(type_n, range(7)))
    if len(wrong):
        line, text = wrong[0] + 2, table[column].iloc[wrong[0]]
        raise InputError(f"{path}, line {line}: {column} must be 1 to 6, or -1 for unknown, but is {text}")
    return type_n.astype(np.int64)
