"""Read CSVs and Parquet files as text, with messages that name the file, the column and what to do.

Every cell is a string and a missing one is empty: what a value means (a number, an unknown) is for the
data set to say, not for a CSV reader to guess.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from fqsweep.errors import InputError

PARQUET_SUFFIXES = (".parquet", ".pq")
_MISSING = frozenset({"", "nan", "na", "n/a", "none", "null", "unknown"})


def read_table(path: Path, *, columns: Sequence[str]) -> pd.DataFrame:
    """The CSV (or, by its suffix, Parquet file) at ``path``, all cells as stripped text.

    Raises:
        InputError: the file is missing, cannot be read, or lacks one of ``columns``.
    """
    if not path.is_file():
        raise InputError(
            f"{path} is needed but is not there{_others_beside(path)}; put it there or set --data-dir"
        )
    table = _read_parquet(path) if path.suffix.lower() in PARQUET_SUFFIXES else _read_csv(path)
    for column in columns:
        require_column(table, column, path=path)
    stripped: pd.DataFrame = table.apply(lambda cells: cells.str.strip())
    return stripped


def _read_csv(path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig", skipinitialspace=True)
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path} cannot be read as a UTF-8 CSV with a header line: {error}") from error


def _read_parquet(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_parquet(path, engine="pyarrow")
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise InputError(f"{path} cannot be read as a Parquet file: {error}") from error
    return table.astype(object).where(table.notna(), "").astype(str)


def require_column(table: pd.DataFrame, column: str, *, path: Path) -> None:
    """Refuse a table without ``column``, listing those it has.

    Raises:
        InputError: naming the file, the column, the nearest one and all there are.
    """
    if column not in table.columns:
        known = [str(name) for name in table.columns]
        raise InputError(
            f"{path} has no column {column!r}{nearest(column, known)}; its columns: {', '.join(known)}"
        )


def nearest(name: str, known: Iterable[str]) -> str:
    """``" (nearest: 'x')"`` for the known name most like ``name``, or nothing where none is alike."""
    by_lower = {text.lower(): text for text in known}
    match = difflib.get_close_matches(name.lower(), list(by_lower), n=1, cutoff=0.5)
    return f" (nearest: {by_lower[match[0]]!r})" if match else ""


def plain_text(value: str | int | float) -> str:
    """A cell or a YAML value in one spelling, so that 3, 3.0 and "3" are the same; "" for a missing one.

    >>> plain_text("3.0"), plain_text(3), plain_text("NaN"), plain_text("female")
    ('3', '3', '', 'female')
    """
    text = str(value).strip()
    if text.lower() in _MISSING:
        return ""
    try:
        number = float(text)
    except ValueError:
        return text
    if not math.isfinite(number):
        return text
    return str(int(number)) if number.is_integer() else repr(number)


def as_numbers(cells: pd.Series, *, path: Path) -> np.ndarray:
    """Float64 (n,) with NaN for missing cells.

    Raises:
        InputError: a cell is neither a number nor missing.
    """
    texts = cells.map(plain_text)
    number_n = pd.to_numeric(texts.where(texts != ""), errors="coerce").to_numpy(np.float64)
    wrong = np.flatnonzero(np.isnan(number_n) & (texts != "").to_numpy())
    if len(wrong):
        line, text = wrong[0] + 2, cells.iloc[wrong[0]]
        raise InputError(f"{path}, line {line}: column {cells.name!r} must hold numbers, but has {text!r}")
    return number_n


def bin_names(edges: Sequence[float]) -> tuple[str, ...]:
    """Names of the bins between ``edges``; those of whole numbers name the last whole one.

    >>> bin_names((40, 60)), bin_names((0.5, 2))
    (('<40', '40-59', '60+'), ('<0.5', '0.5-2', '2+'))
    """
    whole = all(float(edge).is_integer() for edge in edges)
    inner = tuple(f"{low:g}-{high - 1 if whole else high:g}" for low, high in pairwise(edges))
    return (f"<{edges[0]:g}", *inner, f"{edges[-1]:g}+")


def name_bins(number_n: np.ndarray, edges: Sequence[float]) -> np.ndarray:
    """Each number's bin by name, str (n,); empty for NaN."""
    bin_n = np.digitize(np.nan_to_num(number_n), edges)
    return np.where(np.isnan(number_n), "", np.array(bin_names(edges))[bin_n])


def _others_beside(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (nor is its folder {path.parent})"
    found = sorted(other.name for other in path.parent.glob("*.csv"))
    return f" (CSVs beside it: {', '.join(found[:5])})" if found else ""
