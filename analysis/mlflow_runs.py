"""Runs as MLflow has them: all finished trials of a sweep, one run, where its bits went, what its search chose by."""

from __future__ import annotations

import contextlib
import difflib
import logging
import math
import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
import yaml

from analysis.columns import listing
from analysis.runs import MAX_SAID, typed_runs
from fqsweep.errors import InputError
from fqsweep.files import BITS_TABLE
from fqsweep.names import (
    DEFAULT_SELECTION,
    ENERGY_KWH,
    KIND_SWEEP,
    KIND_TRIAL,
    NO_VALUE,
    RUN_PARAMS,
    SHARED_S,
    TAG_KEY,
    TAG_KIND,
    TAG_PARENT,
    TAG_PRUNED,
    TAG_RETIRED,
    TAG_SWEEP,
    selection_of,
)
from fqsweep.tracking.stores import (
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


def load_runs(tracking_uri: str, sweep: str, *, parent_id: str | None = None) -> pd.DataFrame:
    """Read the finished trial runs of the latest sweep called ``sweep``.

    Of several runs with one trial key the newest counts (an earlier attempt was lost and repeated).

    Args:
        tracking_uri: an MLflow tracking URI, for example ``sqlite:////data/out/mlflow.db``.
        sweep: the sweep's name, as in its search space.
        parent_id: the parent run of the sweep that is meant, or its first letters, where several are called so.

    Returns:
        One row a run, see the top of ``runs.py``.

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
    frame = typed_runs(pd.DataFrame([_row(run) for run in trials.finished]), [*notes, *trials.notes()])
    frame.attrs["pruned"] = [_row(run) for run in trials.pruned]
    frame.attrs["energy_kwh"] = parent.data.metrics.get(ENERGY_KWH, math.nan)
    frame.attrs["shared_s"] = parent.data.metrics.get(SHARED_S, math.nan)
    return frame


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
                pd.read_csv(fetch_artifact(client, tracking_uri, run_id, BITS_TABLE, folder)).assign(
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


# --- the store -----------------------------------------------------------------------------------


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
