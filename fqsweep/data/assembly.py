"""From the rows of a data set to its ``Samples``: labels mapped, groups crossed, unknowns dropped, files found.

All data sets go through here, so that label maps, unknown groups and notes mean the same everywhere.
Axes: n rows or images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from fqsweep.config import CROSS, DatasetBase, crossed_parts
from fqsweep.data.records import Groups, ImageSource, Samples, images_text
from fqsweep.data.tabular import nearest
from fqsweep.errors import InputError
from fqsweep.names import group_metric_key

UNKNOWN_GROUP = "unknown"


class RowImages(Protocol):
    """The images of a data set's rows."""

    def present(self) -> np.ndarray:
        """Which rows have an image, bool (n,)."""
        ...

    def open(self, kept: np.ndarray) -> tuple[ImageSource, str]:
        """A source for these rows' images, and a hash of what their pixels depend on.

        Raises:
            InputError: some are missing.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A data set as its tables give it; the empty string stands for a missing value.

    Attributes:
        origin: what to name in messages, a path or the generator.
        id_n, label_n, cluster_n: str (n,); a row without a cluster is one of its own.
        class_names: the set's own classes, in order; all labels are among them.
        group_n: group attribute -> str (n,).
        group_names: group attribute -> its groups, in order.
        images: the rows' images.
        official_n: str (n,), the split that the set's own lists give each row; None where it has no lists.
        notes: what reading the tables left out or took for unknown.
    """

    origin: str
    id_n: np.ndarray
    label_n: np.ndarray
    cluster_n: np.ndarray
    class_names: tuple[str, ...]
    group_n: Mapping[str, np.ndarray]
    group_names: Mapping[str, tuple[str, ...]]
    images: RowImages
    official_n: np.ndarray | None = None
    notes: tuple[str, ...] = ()


def assemble(
    rows: Rows,
    config: DatasetBase,
    *,
    unknown_groups: Literal["drop", "keep"] = "drop",
    missing_images: Literal["refuse", "drop"] = "refuse",
) -> Samples:
    """The samples of ``rows``, in the order of their ids.

    Args:
        rows: with all plain attributes that ``config.group_attributes`` are made of.
        config: its label map, dropped classes and group attributes.
        unknown_groups, missing_images: see ``fqsweep.config.FilesBase``.

    Raises:
        InputError: ids repeat, a class is named that is not there, images are missing, or nothing is left.
    """
    _refuse_repeated_ids(rows)
    label_n, class_names, label_notes = _map_labels(rows, config.label_map, config.drop_classes)
    notes = [*rows.notes, *label_notes]
    keep_n = label_n != ""
    if unknown_groups == "drop":
        keep_n, dropped = _without_unknown_groups(rows, keep_n)
        notes += dropped
    if rows.official_n is not None:
        keep_n, dropped = _without(keep_n, rows.official_n == "", "in none of the official lists")
        notes += dropped
    if missing_images == "drop":
        keep_n, dropped = _without(keep_n, ~rows.images.present(), "without an image file")
        notes += dropped
    kept = np.flatnonzero(keep_n)
    if len(kept) == 0:
        raise InputError(f"{rows.origin}: no image is left of {len(keep_n)} rows; {' '.join(notes)}")
    kept = kept[np.argsort(rows.id_n[kept], kind="stable")]
    class_names, without = _classes_with_images(label_n[kept], class_names)
    notes += _alike("classes", class_names, by="label_map")
    for name, groups in rows.group_names.items():
        notes += _alike(f"groups of {name}", groups, by="group_maps")
    encoded = {name: _encode_groups(rows, name, kept) for name in config.group_attributes}
    _check_group_keys(config.name, encoded)
    source, content = rows.images.open(kept)
    return Samples(
        id_n=rows.id_n[kept],
        label_n=_codes(label_n[kept], class_names),
        class_names=class_names,
        groups=encoded,
        cluster_n=_cluster_codes(rows.cluster_n[kept]),
        source=source,
        content=content,
        notes=(*notes, *without),
        official_n=None if rows.official_n is None else rows.official_n[kept],
    )


def _check_group_keys(name: str, groups: Mapping[str, Groups]) -> None:
    """Every group has keys of its own: of two with one, MLflow would keep the figures of the last."""
    for attribute, group in groups.items():
        first: dict[str, str] = {}
        for group_name in group.names:
            key = group_metric_key("val", "acc_group", group_name)
            other = first.setdefault(key, group_name)
            if other != group_name:
                raise InputError(
                    f"{name}: groups {other!r} and {group_name!r} of {attribute} would both be recorded as {key!r}; "
                    "give one of them another name (group_maps)"
                )


def _alike(what: str, names: Sequence[str], *, by: str) -> list[str]:
    """A note where names differ only in capitals."""
    spelled: dict[str, list[str]] = {}
    for name in names:
        spelled.setdefault(name.casefold(), []).append(name)
    several = [name for same in spelled.values() if len(same) > 1 for name in same]
    return [f"{what} that differ in capitals alone: {listed(several)}; {by} makes them one."] if several else []


def _refuse_repeated_ids(rows: Rows) -> None:
    ids, count = np.unique(rows.id_n, return_counts=True)
    if (count > 1).any():
        first = ", ".join(ids[count > 1][:3])
        raise InputError(
            f"{rows.origin}: every image must have one row, but {int((count > 1).sum())} have several "
            f"({first}{', ...' if (count > 1).sum() > 3 else ''}); remove the repeated rows"
        )


# --- labels ---------------------------------------------------------------------------------------


def _map_labels(
    rows: Rows, label_map: Mapping[str, Sequence[str]] | None, drop_classes: Sequence[str]
) -> tuple[np.ndarray, tuple[str, ...], list[str]]:
    for name in drop_classes:
        _require_class(name, rows, where="drop_classes")
    label_n = np.where(np.isin(rows.label_n, list(drop_classes)), "", rows.label_n)
    unlabelled, dropped = int((rows.label_n == "").sum()), int((label_n != rows.label_n).sum())
    notes = [f"{images_text(unlabelled)} without a label left out."] if unlabelled else []
    if dropped:
        notes.append(f"{images_text(dropped)} of dropped classes left out: {listed(drop_classes)}.")
    names = tuple(name for name in rows.class_names if name not in drop_classes)
    if label_map is None:
        return label_n, names, notes
    new_name = _inverted(label_map, rows, drop_classes)
    mapped_n = np.array([new_name.get(label, "") for label in label_n], dtype=str)
    left_out = sorted(set(label_n[mapped_n == ""]) - {""})
    if left_out:
        count = int((mapped_n == "").sum()) - unlabelled - dropped
        notes.append(f"{images_text(count)} of classes outside label_map left out: {listed(left_out)}.")
    return mapped_n, tuple(label_map), notes


def _require_class(name: str, rows: Rows, *, where: str) -> None:
    if name not in rows.class_names:
        raise InputError(
            f"{where}: {rows.origin} has no class {name!r}{nearest(name, rows.class_names)}; "
            f"its classes: {', '.join(rows.class_names)}"
        )


def _inverted(
    label_map: Mapping[str, Sequence[str]], rows: Rows, drop_classes: Sequence[str]
) -> dict[str, str]:
    new_name: dict[str, str] = {}
    for new, olds in label_map.items():
        for old in olds:
            _require_class(old, rows, where=f"label_map: {new}")
            if old in drop_classes:
                raise InputError(f"class {old!r} stands in label_map and in drop_classes; keep one")
            if old in new_name:
                raise InputError(
                    f"label_map: class {old!r} stands under both {new_name[old]!r} and {new!r}; keep one"
                )
            new_name[old] = new
    return new_name


def _classes_with_images(
    label_n: np.ndarray, class_names: tuple[str, ...]
) -> tuple[tuple[str, ...], list[str]]:
    present = set(label_n.tolist())
    empty = [name for name in class_names if name not in present]
    notes = [f"Classes without any image are left out: {listed(empty)}."] if empty else []
    return tuple(name for name in class_names if name in present), notes


# --- groups and clusters ----------------------------------------------------------------------------


def _without_unknown_groups(rows: Rows, keep_n: np.ndarray) -> tuple[np.ndarray, list[str]]:
    notes = []
    for attribute, value_n in rows.group_n.items():
        unknown_n = keep_n & (value_n == "")
        if unknown_n.any():
            notes.append(f"{images_text(int(unknown_n.sum()))} of unknown {attribute} left out.")
        keep_n = keep_n & ~unknown_n
    return keep_n, notes


def _without(keep_n: np.ndarray, leave_n: np.ndarray, what: str) -> tuple[np.ndarray, list[str]]:
    count = int((keep_n & leave_n).sum())
    return keep_n & ~leave_n, [f"{images_text(count)} {what} left out."] if count else []


def _encode_groups(rows: Rows, attribute: str, kept: np.ndarray) -> Groups:
    value_n, names = _crossed(rows, crossed_parts(attribute), kept)
    value_n = np.where(value_n == "", UNKNOWN_GROUP, value_n)
    if (value_n == UNKNOWN_GROUP).any() and UNKNOWN_GROUP not in names:
        names = (*names, UNKNOWN_GROUP)
    present = set(value_n.tolist())
    names = tuple(name for name in names if name in present)
    return Groups(code_n=_codes(value_n, names), names=names)


def _crossed(rows: Rows, parts: Sequence[str], kept: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """Values and names of the crossing of ``parts``, the first changing slowest; empty where one is unknown."""
    value_n, names = rows.group_n[parts[0]][kept], rows.group_names[parts[0]]
    for part in parts[1:]:
        other_n, others = rows.group_n[part][kept], rows.group_names[part]
        pair_n = [f"{one}{CROSS}{other}" for one, other in zip(value_n, other_n, strict=True)]
        value_n = np.where((value_n == "") | (other_n == ""), "", np.array(pair_n, dtype=str))
        names = tuple(f"{one}{CROSS}{other}" for one in names for other in others)
    return value_n, names


def _cluster_codes(cluster_n: np.ndarray) -> np.ndarray:
    """Int64 (n,): equal names share a code, and each empty one has its own."""
    named_n = np.array([name or f"\0{row}" for row, name in enumerate(cluster_n.tolist())], dtype=object)
    _, code_n = np.unique(named_n, return_inverse=True)
    return code_n.astype(np.int64)


def _codes(value_n: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
    position = {name: code for code, name in enumerate(names)}
    return np.array([position[value] for value in value_n.tolist()], dtype=np.int64)


def listed(names: Sequence[str]) -> str:
    """The first eight of a list in words, and how many more there are."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
