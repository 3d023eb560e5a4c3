"""Data sets in words: what can be used, and what one holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fqsweep.config import DatasetConfig
from fqsweep.data.records import Samples, Splits
from fqsweep.data.splits import MIN_PAIR_IMAGES, describe_leaks, find_leaks, thin_pairs

KINDS = {
    "synthderm": "procedural skin images, six skin types; needs no files",
    "isic2019": "dermoscopy, 8 diagnoses, groups by sex and age; DATA/isic2019 in the official layout",
    "fitzpatrick17k": "clinical photos, 114 conditions, groups by skin type; DATA/fitzpatrick17k",
    "table": "any CSV with an image folder; columns are named in the search space",
}


def describe_kinds(data_dir: Path | None) -> str:
    """One line a kind of data set: what it is, and whether it lies in ``data_dir``."""
    lines = []
    for kind, text in KINDS.items():
        state = ""
        if kind in ("isic2019", "fitzpatrick17k"):
            there = data_dir is not None and (data_dir / kind).is_dir()
            state = "installed" if there else "not found" if data_dir else "unknown without --data-dir"
        lines.append(f"{kind:<15} {text}{f' [{state}]' if state else ''}")
    return "\n".join(lines)


def describe_set(config: DatasetConfig, samples: Samples, splits: Splits) -> str:
    """Counts of a data set: images by split, class and group, and what was left out."""
    parts = ", ".join(f"{name} {len(index):,}" for name, index in splits.items())
    lines = [f"{config.name}: {len(samples):,} images ({parts})", *(f"  {note}" for note in samples.notes)]
    lines.append(_counts("class", samples.label_n, samples.class_names, splits))
    for attribute in config.group_attributes:
        groups = samples.groups[attribute]
        lines.append(_counts(attribute, groups.code_n, groups.names, splits))
    return "\n".join(lines)


def describe_warnings(config: DatasetConfig, samples: Samples, splits: Splits) -> list[str]:
    """What to know of a set before its figures are believed: what was left out, and ``describe_risks``."""
    notes = [f"{config.name}: {note}" for note in samples.notes]
    return notes + describe_risks(config, samples, splits)


def describe_risks(config: DatasetConfig, samples: Samples, splits: Splits) -> list[str]:
    """Leaks, and where test images are few: a warning a group attribute with such (class, group) pairs."""
    warnings = []
    leaks = find_leaks(samples, splits)  # of a split that was given: ours keep clusters together
    if leaks:
        warnings.append(
            f"warning: {config.name}: {describe_leaks(leaks)}; test figures are too good for these: correct the "
            "given split, or leave it out and have one made"
        )
    for attribute in config.group_attributes:
        thin = thin_pairs(samples, splits, attributes=[attribute])
        if thin:
            warnings.append(
                f"warning: {config.name}: {len(thin)} (class, group) pairs have fewer than {MIN_PAIR_IMAGES} test "
                f"images, so that balanced_acc_worst by {attribute} is noisy; first: {thin[0]}"
            )
    return warnings


def _counts(title: str, code_n: np.ndarray, names: tuple[str, ...], splits: Splits) -> str:
    """A small table: one row a name, one column a split."""
    width = max(len(title), *(len(name) for name in names))
    columns = [(name, np.bincount(code_n[index], minlength=len(names))) for name, index in splits.items()]
    head = f"  {title:<{width}}" + "".join(f"  {name:>11}" for name, _ in columns)
    rows = [
        f"  {name:<{width}}" + "".join(f"  {counts[code]:>11,}" for _, counts in columns)
        for code, name in enumerate(names)
    ]
    return "\n".join([head, *rows])
