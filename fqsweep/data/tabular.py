"""Read CSVs and Parquet files as text, with messages that name the file, the column and what to do.

Every cell is a string and a missing one is empty: what a value means (a number, an unknown) is for the
data set to say, not for a CSV reader to guess.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fqsweep.errors import InputError

PARQUET_SUFFIXES = (".parquet", ".pq")
_MISSING_LABEL = frozenset({"", "nan", "n/a"})
_MISSING = _MISSING_LABEL | {"na", "none", "null", "unknown"}
_DECIMAL = re.compile(r"([+-]?)(?=\.?[0-9])([0-9]*)(?:\.([0-9]*))?")


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
    how: dict[str, Any] = {
        "dtype": str,
        "keep_default_na": False,
        "encoding": "utf-8-sig",
        "skipinitialspace": True,
    }
    _refuse_other_separators(path)
    try:
        table = pd.read_csv(path, **how)
        header = pd.read_csv(path, header=None, nrows=1, **how).iloc[0].str.strip()
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path} cannot be read as a UTF-8 CSV with a header line: {error}") from error
    if not isinstance(table.index, pd.RangeIndex):  # pandas took the first cells for names of the rows
        raise InputError(
            f"{path}: its rows have more cells than its header line has names ({len(table.columns)}); name every "
            "column, put cells that hold commas in quotes, and end no row with a comma"
        )
    # pandas would call the second of two equal names otherwise, and nobody would know which of them is read.
    table.columns = pd.Index([own or made for own, made in zip(header, table.columns, strict=True)])
    return table


def _refuse_other_separators(path: Path) -> None:
    try:
        with path.open(encoding="utf-8-sig") as stream:
            header = stream.readline()
    except (OSError, UnicodeDecodeError):
        return  # the next to read it says so
    for separator, name in ((";", "semicolons"), ("\t", "tabs")):
        if separator in header and "," not in header:
            raise InputError(
                f"{path}: the names in its header line are separated by {name}; write it with commas"
            )


def _read_parquet(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_parquet(path, engine="pyarrow")
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise InputError(f"{path} cannot be read as a Parquet file: {error}") from error
    named = [name for name in table.index.names if name is not None and name not in table.columns]
    table = table.reset_index(level=named) if named else table
    return table.astype(object).where(table.notna(), "").astype(str)


def num_parquet_rows(path: Path) -> int:
    """Rows of a Parquet file, by its footer alone.

    Raises:
        OSError, ValueError: it cannot be read.
    """
    from pyarrow import parquet

    num_rows: int = parquet.read_metadata(path).num_rows
    return num_rows


def require_column(table: pd.DataFrame, column: str, *, path: Path) -> None:
    """Refuse a table without ``column``, listing those it has, or with several of that name.

    Raises:
        InputError: naming the file, the column, the nearest one and all there are.
    """
    if column not in table.columns:
        known = [str(name) for name in table.columns]
        raise InputError(
            f"{path} has no column {column!r}{nearest(column, known)}; its columns: {', '.join(known)}"
        )
    if (count := int((table.columns == column).sum())) > 1:
        raise InputError(f"{path} has {count} columns called {column!r}; give each a name of its own")


def nearest(name: str, known: Iterable[str]) -> str:
    """``" (nearest: 'x')"`` for the known name most like ``name``, or nothing where none is alike."""
    by_lower = {text.lower(): text for text in known}
    match = difflib.get_close_matches(name.lower(), list(by_lower), n=1, cutoff=0.5)
    return f" (nearest: {by_lower[match[0]]!r})" if match else ""


def plain_text(value: str | int | float) -> str:
    """A cell or a YAML value in one spelling, so that 3, 3.0 and "3" are the same; "" for a missing one.

    Only plain decimal numbers have several spellings: ``0_4`` and ``1e5`` may be names.

    >>> plain_text("3.0"), plain_text(3), plain_text("NaN"), plain_text("female"), plain_text("0_4")
    ('3', '3', '', 'female', '0_4')
    """
    text = str(value).strip()
    return "" if text.lower() in _MISSING else _one_spelling(text)


def as_written(value: str | int | float) -> str:
    """A cell or a YAML value in one spelling, whatever it says.

    >>> as_written("3.0"), as_written(" none ")
    ('3', 'none')
    """
    return _one_spelling(str(value).strip())


def label_text(value: str) -> str:
    """A class in one spelling, as ``plain_text``; words such as ``none`` and ``unknown`` are classes.

    >>> label_text("3.0"), label_text("None"), label_text("NaN")
    ('3', 'None', '')
    """
    text = value.strip()
    return "" if text.lower() in _MISSING_LABEL else _one_spelling(text)


def _one_spelling(text: str) -> str:
    number = _DECIMAL.fullmatch(text)
    if number is None:
        return text
    sign, whole, fraction = number[1], number[2].lstrip("0") or "0", (number[3] or "").rstrip("0")
    if not fraction:  # digit by digit: a float would round long ones, and patients would become one
        return f"-{whole}" if sign == "-" and whole != "0" else whole
    return repr(float(text)) if len(whole + fraction) <= sys.float_info.dig else text


def as_numbers(cells: pd.Series, *, path: Path) -> np.ndarray:
    """Float64 (n,) with NaN for missing cells.

    Args:
        cells: their index is the row of the file, from 0, whatever was left out or put in another order.

    Raises:
        InputError: a cell is neither a number nor missing.
    """
    texts = cells.map(plain_text)
    number_n = pd.to_numeric(texts.where(texts != ""), errors="coerce").to_numpy(np.float64)
    wrong = np.flatnonzero(np.isnan(number_n) & (texts != "").to_numpy())
    if len(wrong):
        line, text = cells.index[wrong[0]] + 2, cells.iloc[wrong[0]]
        raise InputError(
            f"{path}, line {line}: column {cells.name!r} must hold numbers, but has {text!r}; correct it, or "
            "name the values of a column of words or ranges in group_maps"
        )
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
