"""The finished trial runs of a sweep as one data frame, whatever they are read from.

Columns: ``run_id``, ``key``, ``parent_run_id``, ``experiment_id``, ``start_time`` (ms), ``budget``, every
parameter of ``fqsweep.names.RUN_PARAMS`` and every metric under its full key. What was left out or looks
odd is in ``frame.attrs["notes"]``, a list of sentences; ``attrs["pruned"]`` are the rows of trials that were stopped
early, ``attrs["energy_kwh"]`` what the driver's machine counted and ``attrs["shared_s"]`` what full-precision parents
and cost tables took (NaN: not known).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.columns import (
    GROUP_ACCURACY,
    GROUP_COUNT,
    PANEL,
    REFERENCE_VARIANT,
    is_full_precision,
    with_budget,
)
from fqsweep.errors import InputError
from fqsweep.names import GROUP_METRICS, NO_VALUE, RUN_PARAMS, SPLIT_PREFIXES, metric_keys
from fqsweep.tracking.stores import first_line

NUMERIC_PARAMS = (
    "budget_bits",
    "budget_bytes",
    "seed",
    "fairness_weight",
    "bitrate_weight",
    "finetune_epochs",
    "distillation_weight",
)
MAX_SAID = 300  # letters of what a store or a file says of itself
NUM_NAMED = 3  # run ids that a note names before it only counts


def load_csv(path: Path) -> pd.DataFrame:
    """Read runs from a CSV with the columns of ``mlflow_runs.load_runs`` (``python -m analysis.load --out FILE``).

    Raises:
        InputError: there is no such file, it is no CSV, or a column is missing.
    """
    try:
        frame = pd.read_csv(
            path, dtype=dict.fromkeys(("run_id", "key", "experiment_id", *RUN_PARAMS), "string")
        )
    except FileNotFoundError:
        raise InputError(f"The CSV must exist, but there is no file {str(path)!r}.") from None
    except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise InputError(f"{str(path)!r} cannot be read as CSV: {first_line(error)[:MAX_SAID]}") from error
    missing = [c for c in ("dataset", "architecture", "variant", "budget_bits", "seed") if c not in frame]
    if missing:
        raise InputError(f"{str(path)!r} must have the columns {', '.join(missing)}, but has not.")
    if frame.empty:
        raise InputError(f"{str(path)!r} must have a finished run, but has no rows.")
    if "run_id" not in frame:
        frame["run_id"] = [f"row-{i}" for i in range(1, len(frame) + 1)]
    return typed_runs(frame, [])


def join_sweeps(frames: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Runs of several sweeps as one: each variant gets its sweep's name.

    Full precision stays one reference where all sweeps have the same; else a sweep would be compared with the better
    of its own parent and another's.

    Args:
        frames: by name of the sweep, from ``mlflow_runs.load_runs`` or ``load_csv``.
    """
    if len(frames) == 1:
        return next(iter(frames.values()))
    parts, notes = [], []
    is_shared = _share_full_precision(frames.values())
    if not is_shared:
        notes.append(
            "The sweeps' full-precision networks differ (recipe, images or data set): each has its sweep's name."
        )
    for name, frame in frames.items():
        is_full = is_full_precision(frame)
        variant = frame["variant"].where(is_full & is_shared, frame["variant"] + f" ({name})")
        method = frame["method"].mask(is_full, REFERENCE_VARIANT)  # old records know it by the variant alone
        parts.append(frame.assign(variant=variant, method=method))
        parts[-1].attrs = {}
        notes += [f"{name}: {note}" for note in frame.attrs.get("notes", [])]
    joined = pd.concat(parts, ignore_index=True)
    joined.attrs["notes"] = notes
    joined.attrs["pruned"] = [
        row | {"variant": f"{row['variant']} ({name})"}
        for name, f in frames.items()
        for row in f.attrs.get("pruned", [])
    ]
    for what in ("energy_kwh", "shared_s"):
        joined.attrs[what] = sum(f.attrs.get(what, math.nan) for f in frames.values())
    return joined


def _share_full_precision(frames: Iterable[pd.DataFrame]) -> bool:
    """Whether full precision of one place and seed is one network in all: one trial key, or the same figures."""
    full = pd.concat([frame[is_full_precision(frame)] for frame in frames])
    figures = [f"{split}/{metric.key}" for split in SPLIT_PREFIXES for metric in GROUP_METRICS]
    key = full["key"] if "key" in full else pd.Series(pd.NA, index=full.index)
    grouped = full.assign(key=key, has_key=key.notna()).groupby([*PANEL, "variant", "seed"])
    same_key = grouped["has_key"].all() & (grouped["key"].nunique() == 1)
    same_figures = (grouped[figures].nunique(dropna=False) == 1).all(axis=1)
    return bool((same_key | same_figures).all())


# --- types and checks ----------------------------------------------------------------------------


def typed_runs(frame: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """Numbers as numbers, one run a key, rows without a seed left out."""
    frame = _newest_of_each_key(frame, notes)
    for name in RUN_PARAMS:
        if name not in frame:
            frame[name] = NO_VALUE
    text = [name for name in RUN_PARAMS if name not in NUMERIC_PARAMS]
    frame[text] = frame[text].fillna(NO_VALUE).astype(str)
    for name in (*NUMERIC_PARAMS, *_metric_columns(frame)):
        frame[name] = (
            pd.to_numeric(frame[name], errors="coerce").astype(float).replace([np.inf, -np.inf], np.nan)
        )
    frame = _with_seed(frame, notes)
    absent = [key for key in metric_keys() if key not in frame]
    frame = pd.concat([frame, pd.DataFrame(np.nan, index=frame.index, columns=absent)], axis=1)
    notes += _missing_metric_notes(frame)
    frame = with_budget(frame).sort_values([*PANEL, "variant", "budget_bits", "budget_bytes", "seed", "run_id"])
    frame = frame.reset_index(drop=True)
    frame.attrs["notes"] = notes
    return frame


def _metric_columns(frame: pd.DataFrame) -> list[str]:
    starts = tuple(f"{split}/{kind}" for split in ("val", "test") for kind in (GROUP_ACCURACY, GROUP_COUNT))
    return [c for c in frame.columns if c in metric_keys() or c.startswith(starts)]


def _newest_of_each_key(frame: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    if "key" not in frame or "start_time" not in frame:
        return frame.copy()
    newest = frame.sort_values(["start_time", "run_id"]).drop_duplicates("key", keep="last")
    if len(newest) < len(frame):
        older = frame.loc[~frame["run_id"].isin(newest["run_id"]), "run_id"]
        notes.append(f"Repeated trials, the newest run of each counts; left out: {_named(older)}.")
    return newest.copy()


def _with_seed(frame: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    without = frame["seed"].isna()
    if bool(without.any()):
        notes.append(f"Left out for having no seed: {_named(frame.loc[without, 'run_id'])}.")
    frame = frame.loc[~without].copy()
    if frame.empty:
        raise InputError("Every run must have a numeric seed, but none has one.")
    frame["seed"] = frame["seed"].astype("int64")
    return frame


def _missing_metric_notes(frame: pd.DataFrame) -> list[str]:
    """One sentence for each set of runs that lacks the same metrics."""
    lacking: dict[tuple[str, ...], list[str]] = {}
    for key in metric_keys():
        runs = tuple(frame.loc[frame[key].isna(), "run_id"])
        if runs:
            lacking.setdefault(runs, []).append(key)
    return [
        f"Not recorded, or not a number: {', '.join(keys)} of {_named(runs)}." for runs, keys in lacking.items()
    ]


def _named(run_ids: Any) -> str:
    """At most three run ids, then a count."""
    ids = [str(i) for i in run_ids]
    named = ", ".join(ids[:NUM_NAMED])
    more = f" and {len(ids) - NUM_NAMED} more" if len(ids) > NUM_NAMED else ""
    return f"{len(ids)} run{'' if len(ids) == 1 else 's'} ({named}{more})"
