"""The finished trial runs of a sweep as one data frame, from MLflow or from a CSV file.

Columns: ``run_id``, ``key``, ``parent_run_id``, ``experiment_id``, ``start_time`` (ms), ``budget``, every
parameter of ``fqsweep.names.RUN_PARAMS`` and every metric under its full key. What was left out or looks
odd is in ``frame.attrs["notes"]``, a list of sentences; ``attrs["pruned"]`` are the rows of trials that were stopped
early, ``attrs["energy_kwh"]`` what the driver's machine counted and ``attrs["shared_s"]`` what full-precision parents
and cost tables took (NaN: not known).
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import math
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import yaml

from analysis.columns import (
    GROUP_ACCURACY,
    GROUP_COUNT,
    PANEL,
    REFERENCE_VARIANT,
    is_full_precision,
    listing,
    with_budget,
)
from fqsweep.errors import InputError
from fqsweep.names import (
    DEFAULT_SELECTION,
    ENERGY_KWH,
    GROUP_METRICS,
    KIND_SWEEP,
    KIND_TRIAL,
    NO_VALUE,
    RUN_PARAMS,
    SHARED_S,
    SPLIT_PREFIXES,
    TAG_KEY,
    TAG_KIND,
    TAG_PARENT,
    TAG_PRUNED,
    TAG_RETIRED,
    TAG_SWEEP,
    metric_keys,
    selection_of,
)
from fqsweep.stores import (
    check_exists,
    fetch_artifact,
    fetch_space_file,
    find_run,
    first_line,
    search_runs,
    try_database,
    without_password,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

NUMERIC_PARAMS = (
    "budget_bits",
    "budget_bytes",
    "seed",
    "fairness_weight",
    "bitrate_weight",
    "finetune_epochs",
    "distillation_weight",
)
MAX_SAID = 300  # letters of what a store says of itself
NUM_NAMED = 3  # run ids that a note names before it only counts


def load_runs(tracking_uri: str, sweep: str, *, parent_id: str | None = None) -> pd.DataFrame:
    """Read the finished trial runs of the latest sweep called ``sweep``.

    Of several runs with one trial key the newest counts (an earlier attempt was lost and repeated).

    Args:
        tracking_uri: an MLflow tracking URI, for example ``sqlite:////data/out/mlflow.db``.
        sweep: the sweep's name, as in its search space.
        parent_id: the parent run of the sweep that is meant, or its first letters, where several are called so.

    Returns:
        One row a run, see the top of this file.

    Raises:
        InputError: the tracking URI cannot be read, has no such sweep, the parent run is not of that sweep, or it has
            no finished run.
    """
    client = _connect(tracking_uri)
    try:
        parent, notes = _latest_parent(client, sweep, tracking_uri=tracking_uri, parent_id=parent_id)
        children = list(search_runs(client, f"tags.`{TAG_PARENT}` = '{parent.info.run_id}'"))
    except InputError:
        raise
    except Exception as error:  # MLflow raises what its backend raises: SQLAlchemy, requests, its own
        raise _unreadable(tracking_uri, error) from error
    trials = _sort_trials(children)
    if not trials.finished:
        raise InputError(
            f"Sweep {sweep!r} must have a finished trial run, but has {_status_counts(trials.unfinished)}: "
            "wait for one, or run `fqsweep run` again and read what failed."
        )
    frame = _typed(pd.DataFrame([_row(run) for run in trials.finished]), [*notes, *trials.notes()])
    frame.attrs["pruned"] = [_row(run) for run in trials.pruned]
    frame.attrs["energy_kwh"] = parent.data.metrics.get(ENERGY_KWH, math.nan)
    frame.attrs["shared_s"] = parent.data.metrics.get(SHARED_S, math.nan)
    return frame


def load_csv(path: Path) -> pd.DataFrame:
    """Read runs from a CSV with the columns of ``load_runs`` (``python -m analysis.load --out FILE``).

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
    return _typed(frame, [])


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run as it is stored."""

    run_id: str
    name: str
    status: str
    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]


def load_run(tracking_uri: str, run_id: str) -> RunRecord:
    """Read one run by its id, or by the first letters of it that no other run has.

    Raises:
        InputError: the tracking URI cannot be read, or no run or several are called so.
    """
    client = _connect(tracking_uri)
    try:
        return _record(find_run(client, run_id, uri=tracking_uri))
    except InputError:
        raise
    except Exception as error:
        raise _unreadable(tracking_uri, error) from error


def _record(run: Run) -> RunRecord:
    data = run.data
    return RunRecord(
        run_id=run.info.run_id,
        name=run.info.run_name or "",
        status=run.info.status,
        params=dict(data.params),
        metrics=dict(data.metrics),
        tags=dict(data.tags),
    )


def load_layers(tracking_uri: str, run_ids: Iterable[str]) -> pd.DataFrame:
    """Where the bits of runs went: their ``bits.csv`` under one another, with the column ``run_id``.

    Runs without that file (full precision, old records) and stores that do not hand out files have no rows.
    """
    client, parts = _connect(tracking_uri), []
    for run_id in run_ids:
        with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Exception):  # what the backend raises
            parts.append(
                pd.read_csv(fetch_artifact(client, tracking_uri, run_id, "bits.csv", folder)).assign(
                    run_id=run_id
                )
            )
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["run_id", "layer"])


def load_selection(tracking_uri: str, runs: pd.DataFrame) -> tuple[str, list[str]]:
    """The metric that chose while ``runs`` were searched, by the search space stored with each parent run.

    Returns:
        The metric, ``val/acc_worst`` where no space can be read or those of several sweeps do not agree, and a
        sentence on each of these.
    """
    client, parents = _connect(tracking_uri), [str(run) for run in runs["parent_run_id"].unique()]
    said = {run: _selection_of_sweep(client, tracking_uri, run) for run in parents}
    known, unread = sorted({s for s in said.values() if s}), [run for run, s in said.items() if not s]
    metric, notes = known[0] if len(known) == 1 else DEFAULT_SELECTION, []
    if unread:
        notes.append(
            f"The search space of parent run {', '.join(unread)} cannot be read, so what its search chose by is not "
            f"known: {metric} chooses here, --metric names another."
        )
    if len(known) > 1:
        notes.append(
            f"The sweeps were searched by {listing(known)}: {metric} chooses here, --metric names another."
        )
    return metric, notes


def _selection_of_sweep(client: MlflowClient, tracking_uri: str, parent_id: str) -> str | None:
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Exception):  # what the backend raises
        text = fetch_space_file(client, tracking_uri, parent_id, folder).read_text(encoding="utf-8")
        return selection_of(yaml.safe_load(text).get("search", {}).get("objectives", ()))
    return None


def join_sweeps(frames: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Runs of several sweeps as one: each variant gets its sweep's name.

    Full precision stays one reference where all sweeps have the same; else a sweep would be compared with the better
    of its own parent and another's.

    Args:
        frames: by name of the sweep, from ``load_runs`` or ``load_csv``.
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


# --- MLflow --------------------------------------------------------------------------------------


def _connect(tracking_uri: str) -> MlflowClient:
    """A client, without creating what does not exist: MLflow writes a new database at an unknown path."""
    check_exists(tracking_uri)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # the default, 7, waits four minutes
    from mlflow import MlflowClient  # costs two seconds, and reading a CSV does not need it

    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    try:
        try_database(tracking_uri)
        return MlflowClient(tracking_uri)
    except Exception as error:
        raise _unreadable(tracking_uri, error) from error


def _latest_parent(
    client: MlflowClient, sweep: str, *, tracking_uri: str, parent_id: str | None
) -> tuple[Run, list[str]]:
    """The parent run asked for, or the newest of that name; the name is compared here, never put into a query."""
    if parent_id is not None:
        return _named_parent(client, sweep, tracking_uri=tracking_uri, parent_id=parent_id), []
    parents = list(search_runs(client, f"tags.`{TAG_KIND}` = '{KIND_SWEEP}'"))
    named = [run for run in parents if run.data.tags.get(TAG_SWEEP) == sweep]
    if not named:
        raise InputError(
            _no_such_sweep(sweep, {run.data.tags.get(TAG_SWEEP, "") for run in parents}, tracking_uri)
        )
    named.sort(key=lambda run: (run.info.start_time, run.info.run_id))
    notes = []
    if len(named) > 1:
        older = ", ".join(run.info.run_id for run in named[:-1])
        notes.append(
            f"{len(named)} sweeps are called {sweep!r}: this is the latest, parent run "
            f"{named[-1].info.run_id}; not read: {older} (--parent RUN reads another)."
        )
    return named[-1], notes


def _named_parent(client: MlflowClient, sweep: str, *, tracking_uri: str, parent_id: str) -> Run:
    """The run asked for, which must be the parent run of a sweep of that name."""
    run = find_run(client, parent_id, uri=tracking_uri)
    tags = run.data.tags
    if tags.get(TAG_KIND) != KIND_SWEEP or tags.get(TAG_SWEEP) != sweep:
        what = (
            f"the parent run of {tags.get(TAG_SWEEP)!r}"
            if tags.get(TAG_KIND) == KIND_SWEEP
            else "no parent run"
        )
        raise InputError(f"--parent must name a parent run of the sweep {sweep!r}, but {parent_id} is {what}.")
    return run


def _no_such_sweep(sweep: str, known: set[str], tracking_uri: str) -> str:
    store = without_password(tracking_uri)
    if not known:
        return f"Sweep {sweep!r} must exist, but {store!r} holds no sweep at all."
    nearest = difflib.get_close_matches(sweep, sorted(known), n=1, cutoff=0.0)
    listed = ", ".join(repr(name) for name in sorted(known)[:20])
    return f"Sweep {sweep!r} must exist, but {store!r} holds {listed}: use {nearest[0]!r}?"


@dataclass(frozen=True, kw_only=True)
class _Trials:
    """The trial runs of a sweep by what becomes of them: only those that are finished take part."""

    finished: list[Run]
    unfinished: list[Run]
    retired: list[Run]
    pruned: list[Run]

    def notes(self) -> list[str]:
        """What was left out, in sentences."""
        whole = sum(map(len, (self.finished, self.unfinished, self.retired, self.pruned)))
        left_out = (
            (f"Left out: {_status_counts(self.unfinished)}", self.unfinished),
            (f"No result of the search space as it is, and left out: {len(self.retired)}", self.retired),
            (f"Stopped early and left out: {len(self.pruned)}", self.pruned),
        )
        return [f"{text} of {whole} trial runs." for text, runs in left_out if runs]


def _sort_trials(children: Iterable[Run]) -> _Trials:
    """Runs that are retired first, then those that were stopped early, then those that have not finished."""
    trials = _Trials(finished=[], unfinished=[], retired=[], pruned=[])
    for run in children:
        if run.data.tags.get(TAG_KIND) != KIND_TRIAL:
            continue
        if run.data.tags.get(TAG_RETIRED) == "true":
            trials.retired.append(run)
        elif run.data.tags.get(TAG_PRUNED) == "true":
            trials.pruned.append(run)
        else:
            (trials.finished if run.info.status == "FINISHED" else trials.unfinished).append(run)
    return trials


def _row(run: Run) -> dict[str, Any]:
    params = {name: run.data.params.get(name, NO_VALUE) for name in RUN_PARAMS}
    return {
        "run_id": run.info.run_id,
        "key": run.data.tags.get(TAG_KEY, run.info.run_id),
        "parent_run_id": run.data.tags.get(TAG_PARENT),
        "experiment_id": run.info.experiment_id,
        "start_time": run.info.start_time,
        **params,
        **run.data.metrics,
    }


def _status_counts(runs: list[Run]) -> str:
    counts = pd.Series([run.info.status.lower() for run in runs], dtype="string").value_counts()
    return ", ".join(f"{count} {status}" for status, count in counts.items()) or "no trial runs"


def _unreadable(tracking_uri: str, error: Exception) -> InputError:
    """What went wrong at the store, and what to do where the server says it wants to know who asks."""
    said = first_line(error)[:MAX_SAID]
    if isinstance(error, ModuleNotFoundError):
        said += '; for PostgreSQL install the extra: pip install "fqsweep[postgres]"'
    refused = re.search(r"\b(401|403|UNAUTHENTICATED|PERMISSION_DENIED)\b", said)
    hint = (
        " Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN."
        if refused
        else ""
    )
    return InputError(f"The tracking URI {without_password(tracking_uri)!r} cannot be read: {said}{hint}")


# --- types and checks ----------------------------------------------------------------------------


def _typed(frame: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
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


def main(argv: list[str] | None = None) -> int:
    """Print what was loaded, or write it as CSV."""
    from analysis import cli

    parser = cli.source_parser("analysis.load", "Read the finished runs of a sweep, or write them as CSV.")
    parser.add_argument("--out", type=Path, help="CSV file to write, readable with --csv")

    def act(arguments: Any) -> None:
        frame = cli.read_source(arguments, shows_notes=True)
        for note in frame.attrs["notes"]:
            print(f"Note: {note}")
        if arguments.out:
            cli.write_text(arguments.out, frame.to_csv(index=False))
        print(f"{len(frame)} finished runs" + (f" -> {arguments.out}" if arguments.out else ""))

    return cli.run(parser, act, argv)


if __name__ == "__main__":
    raise SystemExit(main())
