"""Any CSV or Parquet file with a folder of images, described by a ``TableConfig``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from fqsweep.config import TableConfig, in_data_dir, plain_attributes
from fqsweep.data.assembly import Rows, assemble, listed
from fqsweep.data.folder import TableImages, require_folder
from fqsweep.data.records import Samples, images_text
from fqsweep.data.splits import SPLIT_SPELLINGS
from fqsweep.data.tabular import (
    as_numbers,
    as_written,
    bin_names,
    label_text,
    name_bins,
    plain_text,
    read_table,
)
from fqsweep.errors import InputError

GroupMap = Mapping[str, tuple[str | bool | int | float, ...]]
# YAML reads all of these words as truth values, and a table may hold any of them.
TRUTH_WORDS = {True: ("true", "yes", "on", "1"), False: ("false", "no", "off", "0")}


def describe(config: TableConfig, data_dir: Path) -> Samples:
    """The images of the table with label, groups and patient.

    Raises:
        InputError: see ``fqsweep.data.describe_samples``.
    """
    path = in_data_dir(data_dir, config.csv)
    wanted = [config.image_column, config.label_column, *config.group_columns.values()]
    extra = [column for column in (config.patient_column, config.split_column) if column]
    table = read_table(path, columns=wanted + extra)
    root = require_folder(data_dir, config.images, what=f"images of {config.name}")
    id_n = np.char.replace(table[config.image_column].to_numpy(str), "\\", "/")  # paths that Windows wrote
    if (id_n == "").any():
        line = int(np.flatnonzero(id_n == "")[0]) + 2
        raise InputError(f"{path}, line {line}: column {config.image_column!r} is empty; name the image")
    grouped = {name: _groups(name, config, table, path) for name in plain_attributes(config.group_attributes)}
    label_n = np.array([label_text(cell) for cell in table[config.label_column]], dtype=str)
    cluster_n = _texts(table[config.patient_column]) if config.patient_column else np.full(len(id_n), "")
    notes = [note for _, _, notes in grouped.values() for note in notes]
    if config.patient_column and (alone := int((cluster_n == "").sum())):
        notes.append(f"{config.patient_column}: {images_text(alone)} without one: nothing keeps them together.")
    rows = Rows(
        origin=str(path),
        id_n=id_n,
        label_n=label_n,
        cluster_n=cluster_n,
        class_names=_in_order(label_n),
        group_n={name: value_n for name, (value_n, _, _) in grouped.items()},
        group_names={name: names for name, (_, names, _) in grouped.items()},
        images=TableImages(id_n, lambda: root),
        official_n=_splits(table[config.split_column], path) if config.split_column else None,
        notes=tuple(notes),
    )
    return assemble(rows, config, unknown_groups=config.unknown_groups, missing_images=config.missing_images)


def _texts(cells: pd.Series) -> np.ndarray:
    return np.array([plain_text(cell) for cell in cells], dtype=str)


def _splits(cells: pd.Series, path: Path) -> np.ndarray:
    """The split that the table gives each image, str (n,)."""
    text_n = [plain_text(cell).lower() for cell in cells]
    strange = sorted({text for text in text_n if text and text not in SPLIT_SPELLINGS})
    if strange:
        raise InputError(
            f"{path}: column {cells.name!r} must name splits ({', '.join(SPLIT_SPELLINGS)}), "
            f"but has {', '.join(strange[:5])}; write these words into the column, or name another one"
        )
    return np.array([SPLIT_SPELLINGS.get(text, "") for text in text_n], dtype=str)


def _groups(
    attribute: str, config: TableConfig, table: pd.DataFrame, path: Path
) -> tuple[np.ndarray, tuple[str, ...], list[str]]:
    """Each row's group, str (n,), empty where unknown; all groups in order; and notes."""
    cells = table[config.group_columns[attribute]]
    if attribute in config.group_edges:
        edges = config.group_edges[attribute]
        return name_bins(as_numbers(cells, path=path), edges), bin_names(edges), []
    written_n = np.array([as_written(cell) for cell in cells], dtype=str)
    if attribute in config.group_maps:
        return _mapped_groups(attribute, written_n, config.group_maps[attribute])
    value_n = _texts(cells)
    unknown = _counted(written_n[(value_n == "") & (written_n != "")])
    return value_n, _in_order(value_n), [f"{attribute}: read as unknown: {unknown}."] if unknown else []


def _mapped_groups(
    attribute: str, written_n: np.ndarray, group_map: GroupMap
) -> tuple[np.ndarray, tuple[str, ...], list[str]]:
    """As ``_groups``: a map means the very words that it lists, ``none`` and ``NA`` among them."""
    where = f"group_maps: {attribute}"
    occurring = set(written_n.tolist())
    group_of: dict[str, str] = {}
    never = []
    for name, values in group_map.items():
        spelled = {value: _spellings(value, occurring) for value in values}
        meant = [text for texts in spelled.values() for text in texts]
        for value in meant:
            if value in group_of:
                raise InputError(f"{where}: value {value!r} stands under both {group_of[value]!r} and {name!r}")
            group_of[value] = name
        if not occurring & set(meant):
            raise InputError(
                f"{where}: none of the values of {name!r} ({', '.join(map(str, values))}) occurs in the "
                f"column, which has: {', '.join(_in_order(written_n)[:12])}"
            )
        never += [str(value) for value, texts in spelled.items() if not occurring & set(texts)]
    value_n = np.array([group_of.get(text, "") for text in written_n.tolist()], dtype=str)
    outside = _counted(written_n[(value_n == "") & (written_n != "")])
    notes = [f"{where} does not list, so that they are unknown: {outside}."] if outside else []
    notes += [f"{where} lists what never occurs: {', '.join(never)}."] if never else []
    return value_n, tuple(group_map), notes


def _counted(text_n: np.ndarray) -> str:
    """The words that occur and how often, the most frequent first."""
    words, counts = np.unique(text_n, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return listed([f"{words[index]} ({counts[index]})" for index in order])


def _spellings(value: str | bool | int | float, occurring: set[str]) -> list[str]:
    """The cells that a value of a map means: those in its one spelling, or all words for a truth value."""
    if isinstance(value, bool):
        return sorted(text for text in occurring if text.lower() in TRUTH_WORDS[value])
    return [as_written(value)]


def _in_order(value_n: np.ndarray) -> tuple[str, ...]:
    """The values that occur, numbers by size and before words."""

    def rank(text: str) -> tuple[int, float, str]:
        try:
            return 0, float(text), text
        except ValueError:
            return 1, 0.0, text

    return tuple(sorted(set(value_n.tolist()) - {""}, key=rank))
