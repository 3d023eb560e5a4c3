"""Any CSV with a folder of images, described by a ``TableConfig``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fqsweep.config import TableConfig
from fqsweep.data.assembly import Rows, assemble
from fqsweep.data.folder import ImageFolder, require_folder
from fqsweep.data.records import ImageSource, Samples
from fqsweep.data.tabular import plain_text, read_table
from fqsweep.errors import InputError

GroupMap = Mapping[str, tuple[str | int | float, ...]]


def describe(config: TableConfig, data_dir: Path) -> Samples:
    """The images of the CSV with label, groups and patient.

    Raises:
        InputError: see ``fqsweep.data.describe_samples``.
    """
    path = data_dir / config.csv
    columns = [config.image_column, config.label_column, *config.group_columns.values()]
    table = read_table(path, columns=columns + ([config.patient_column] if config.patient_column else []))
    images = ImageFolder(require_folder(data_dir, config.images, what=f"images of {config.name}"))
    texts = {
        column: np.array([plain_text(cell) for cell in table[column]], dtype=str) for column in set(columns)
    }
    id_n = table[config.image_column].to_numpy(str)
    if (id_n == "").any():
        line = int(np.flatnonzero(id_n == "")[0]) + 2
        raise InputError(f"{path}, line {line}: column {config.image_column!r} is empty; name the image")

    def find_source(kept: np.ndarray) -> tuple[ImageSource, str]:
        return images.open(id_n[kept].tolist())

    group_n, group_names = {}, {}
    for attribute in config.group_attributes:
        value_n = texts[config.group_columns[attribute]]
        group_n[attribute], group_names[attribute] = _named_groups(
            value_n, config.group_maps.get(attribute), where=f"group_maps: {attribute}"
        )
    label_n = texts[config.label_column]
    patient = config.patient_column
    rows = Rows(
        origin=str(path),
        id_n=id_n,
        label_n=label_n,
        cluster_n=np.array([plain_text(cell) for cell in table[patient]])
        if patient
        else np.full(len(id_n), ""),
        class_names=_in_order(label_n),
        group_n=group_n,
        group_names=group_names,
        find_source=find_source,
    )
    return assemble(rows, label_map=config.label_map, unknown_groups=config.unknown_groups)


def _named_groups(
    value_n: np.ndarray, group_map: GroupMap | None, *, where: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Each row's group, str (n,), and all groups in order; without a map the values are the groups."""
    if group_map is None:
        return value_n, _in_order(value_n)
    group_of: dict[str, str] = {}
    for name, values in group_map.items():
        for value in map(plain_text, values):
            if value in group_of:
                raise InputError(f"{where}: value {value!r} stands under both {group_of[value]!r} and {name!r}")
            group_of[value] = name
    if not set(group_of) & set(value_n.tolist()):
        raise InputError(
            f"{where}: none of its values ({', '.join(group_of)}) occurs in the column, "
            f"which has: {', '.join(_in_order(value_n)[:12])}"
        )
    return np.array([group_of.get(value, "") for value in value_n.tolist()], dtype=str), tuple(group_map)


def _in_order(value_n: np.ndarray) -> tuple[str, ...]:
    """The values that occur, numbers by size and before words."""

    def rank(text: str) -> tuple[int, float, str]:
        try:
            return 0, float(text), text
        except ValueError:
            return 1, 0.0, text

    return tuple(sorted(set(value_n.tolist()) - {""}, key=rank))
