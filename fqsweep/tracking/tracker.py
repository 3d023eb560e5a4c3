"""MLflow: one parent run a sweep, one nested run a trial. Only the driver writes.

A trial's run carries its key as a tag. It is created, filled and ended in one go; a run that is not
ended was cut off and is removed and written anew, so runs and trials match one to one.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import os
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Experiment, InputTag, Metric, Param, RunStatus, RunTag
from mlflow.exceptions import MlflowException

from fqsweep import __version__
from fqsweep.disk import is_no_space
from fqsweep.errors import InputError, TrackingError
from fqsweep.files import MODEL_FILE, SPLITS_ENDING, SweepPaths, write_bytes
from fqsweep.names import (
    BITS,
    DEFAULT_EXPERIMENT,
    ENERGY_KWH,
    KIND_SWEEP,
    KIND_TRIAL,
    LEARNED_BITS,
    TAG_KEY,
    TAG_KIND,
    TAG_PARENT,
    TAG_PRUNED,
    TAG_RETIRED,
    TAG_SPACE,
    TAG_SWEEP,
)
from fqsweep.results import TrialResult
from fqsweep.tracking.moved import follow_artifacts
from fqsweep.tracking.new_database import making_tables
from fqsweep.tracking.stores import (
    ARTIFACTS,
    check_exists,
    check_is_address,
    drop_tag,
    fetch_artifact,
    fetch_space_file,
    find_run,
    first_line,
    is_server,
    search_runs,
    sqlite_file,
    try_database,
    without_password,
)

MAX_BATCH = 900
ALL_IS_KEPT = (
    "every finished trial is kept in the output folder; when MLflow is back, run the same command again"
)
MAX_VALUE = 500  # characters of a fact that are recorded, and of a parameter that are compared
MAX_DIGEST = 36  # characters of a digest that MLflow keeps


@dataclass(slots=True)
class _LoggedRun:
    """What is known of a trial's run: its parameters as ``_described_by`` tells them, and whether it is tagged as
    retired."""

    run_id: str
    described: int
    is_retired: bool = False


class Tracker:
    """The sweep's parent run and its children."""

    def __init__(self, client: MlflowClient, experiment_id: str, parent_id: str, sweep: str) -> None:
        self.client = client
        self.experiment_id = experiment_id
        self.parent_id = parent_id
        self.sweep = sweep
        self.logged = self._logged_before(f"tags.`{TAG_PARENT}` = '{parent_id}'")

    def log_trial(self, result: TrialResult, files: Sequence[Path], *, again: bool = False) -> str | None:
        """Write a trial's run; None if it is there already.

        Args:
            again: an earlier call failed: how far it came on the server is looked up first.
        """
        if again:
            query = f"tags.`{TAG_PARENT}` = '{self.parent_id}' and tags.`{TAG_KEY}` = '{result.key}'"
            self.logged |= self._logged_before(query)
        described = _described_by(result.params)
        known = self.logged.get(result.key)
        if known is not None and known.described == described:
            self._retire(known, is_over=False)
            return None
        if known is not None:
            # Renamed since, or with fewer parameters; those of a run cannot change, so that it is written anew.
            self.client.delete_run(known.run_id)
            del self.logged[result.key]
        tags = {
            TAG_PARENT: self.parent_id,
            TAG_KEY: result.key,
            TAG_KIND: KIND_TRIAL,
            TAG_SWEEP: self.sweep,
            **_who(),
            **({TAG_PRUNED: "true"} if result.pruned else {}),
            **{name: result.params[name] for name in ("method", "variant")},
        }
        now = int(time.time() * 1000)
        began = now - int(1000 * result.metrics.get("time/total_s", 0.0))
        run = self.client.create_run(self.experiment_id, began, tags, run_name=_run_name(result))
        run_id = run.info.run_id
        points = [Metric(name, value, now, 0) for name, value in result.metrics.items()]
        points += [
            Metric(f"epoch/{name}", value, began + (now - began) * (epoch + 1) // len(result.history), epoch)
            for epoch, metrics in enumerate(result.history)
            for name, value in _with_bits(metrics, result).items()
        ]
        params = [Param(name, value) for name, value in result.params.items()]
        for start in range(0, max(len(points), 1), MAX_BATCH):
            self.client.log_batch(run_id, metrics=points[start : start + MAX_BATCH], params=params)
            params = []
        for file in files:
            self.client.log_artifact(run_id, str(file))
        self.client.set_terminated(run_id, RunStatus.to_string(RunStatus.FINISHED), end_time=now)
        self.logged[result.key] = _LoggedRun(run_id, described)
        return run_id

    def retire(self, over: Collection[str]) -> None:
        """Tag the runs of these trials, no results of the search space as it is, and untag those that are again."""
        for key, run in self.logged.items():
            self._retire(run, is_over=key in over)

    def _retire(self, run: _LoggedRun, *, is_over: bool) -> None:
        if is_over and not run.is_retired:
            self.client.set_tag(run.run_id, TAG_RETIRED, "true")
        elif not is_over and run.is_retired:
            drop_tag(self.client, run.run_id, TAG_RETIRED)
        run.is_retired = is_over

    def log_numbers(self, numbers: Mapping[str, float], step: int = 0) -> None:
        """Metrics of the sweep as a whole, on the parent run."""
        now = int(time.time() * 1000)
        self.client.log_batch(self.parent_id, metrics=[Metric(k, v, now, step) for k, v in numbers.items()])

    def machine_before(self) -> tuple[int, float]:
        """What earlier starts sent of the machine: the next step, and the energy counted (kWh).

        Where the store does not answer now, it is as if nothing had been sent: no sweep ends for it.
        """
        with contextlib.suppress(Exception):
            return self._machine_before()
        return 0, 0.0

    def _machine_before(self) -> tuple[int, float]:
        sent = self.client.get_metric_history(self.parent_id, "system/cpu_utilization_percentage")
        energy_kwh = self.client.get_run(self.parent_id).data.metrics.get(ENERGY_KWH, 0.0)
        return 1 + max((point.step for point in sent), default=-1), energy_kwh

    def log_data(self, used: Collection[tuple[str, str]]) -> None:
        """The data sets as inputs of the parent run.

        Args:
            used: name and digest (of images, labels, groups and the split as it was used, near-duplicates joined).
        """
        found = self.client.get_run(self.parent_id).inputs
        known = {(one.dataset.name, one.dataset.digest) for one in found.dataset_inputs} if found else set()
        inputs = []
        for name, digest in used:
            if (name, digest[:MAX_DIGEST]) not in known:
                source = json.dumps({"name": name, "split": f"splits/{digest}{SPLITS_ENDING}"})
                dataset = Dataset(name, digest[:MAX_DIGEST], "local", source)
                inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", "sweep")]))
        if inputs:
            self.client.log_inputs(self.parent_id, datasets=inputs)

    def log_splits(self, tables: Iterable[Path]) -> None:
        """Keep with the parent run what lies beside the packs: on which side each image was, and warnings."""
        for table in tables:
            self.client.log_artifact(self.parent_id, str(table), "splits")

    def stopped(self) -> None:
        """Say of the parent run that it was stopped, if the store answers; a later start opens it again."""
        with contextlib.suppress(Exception):
            self.client.set_terminated(self.parent_id, RunStatus.to_string(RunStatus.KILLED))

    def end(self, *, done: bool) -> None:
        """End the parent run; a later start of the same sweep opens it again.

        MLflow's HTTP client asks again by itself where a reply got lost, so that a server may have made a run
        that nobody knows of: such a run is never ended, and is removed.
        """
        self._logged_before(f"tags.`{TAG_PARENT}` = '{self.parent_id}' and attributes.status != 'FINISHED'")
        status = RunStatus.FINISHED if done else RunStatus.FAILED
        self.client.set_terminated(self.parent_id, RunStatus.to_string(status))

    def _logged_before(self, query: str) -> dict[str, _LoggedRun]:
        """Trial key -> a run that is written; runs that were cut off are removed."""
        logged: dict[str, _LoggedRun] = {}
        cut_off = []
        for run in search_runs(self.client, query, experiment_id=self.experiment_id):
            key = run.data.tags.get(TAG_KEY)
            if run.info.status != "FINISHED" or key in logged:
                cut_off.append(run.info.run_id)
            elif key is not None:
                described = _described_by(run.data.params)
                logged[key] = _LoggedRun(run.info.run_id, described, is_retired=TAG_RETIRED in run.data.tags)
        for run_id in cut_off:  # only now: what is removed moves the pages that come after it
            self.client.delete_run(run_id)
        return logged


def _described_by(params: Mapping[str, str]) -> int:
    """The same for equal parameters; of a sweep's thousands of runs, only this is held."""
    return hash(frozenset((name, value[:MAX_VALUE]) for name, value in params.items()))


def _who() -> dict[str, str]:
    """What the UI shows as source and creator of a run."""
    with contextlib.suppress(OSError, KeyError):  # a container may run under a number that has no name
        return {"mlflow.source.name": f"fqsweep {__version__}", "mlflow.user": getpass.getuser()}
    return {"mlflow.source.name": f"fqsweep {__version__}"}


def _run_name(result: TrialResult) -> str:
    """Its title with what tells it from its siblings in front: tables cut names at their end."""
    where = f"{result.params['dataset']}/{result.params['group_attribute']} {result.params['architecture']}"
    own = result.title.removeprefix(f"{where} ")
    return result.title if own == result.title else f"{own}, {where}"


def _with_bits(metrics: Mapping[str, float], result: TrialResult) -> dict[str, float]:
    """An epoch's metrics with its mean bits: learned ones as they were, given ones the same in every epoch."""
    fixed = {BITS: result.metrics[BITS]} if BITS in result.metrics else {}
    learned = {BITS: metrics[LEARNED_BITS]} if LEARNED_BITS in metrics else {}
    return {name: value for name, value in metrics.items() if name != LEARNED_BITS} | (learned or fixed)


def open_tracker(
    uri: str,
    *,
    paths: SweepPaths,
    sweep: str,
    space_file: Path,
    facts: Mapping[str, str],
    tables: Callable[[], bytes] | None = None,
) -> Tracker:
    """Open the sweep's parent run, or make it.

    Args:
        facts: parameters of the parent run (versions, hashes of data sets).
        tables: what waits for the tables of a new database, where they have begun already (``making_tables``).

    Raises:
        InputError: the tracking server cannot be reached or refuses.
    """
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    check_is_address(uri)
    try:
        try_database(uri)
        with _ready_database(uri, tables):
            client = MlflowClient(tracking_uri=uri)
            experiment_id = _experiment(client, uri, paths)
            parent_id = _parent(client, experiment_id, sweep, paths)
        client.log_artifact(parent_id, str(space_file))
        client.set_tag(parent_id, TAG_SPACE, space_file.name)
        _log_facts(client, parent_id, {**facts, **_code_facts(client, parent_id)})
        return Tracker(client, experiment_id, parent_id, sweep)
    except InputError:
        raise
    except ModuleNotFoundError as error:
        raise InputError(
            f"tracking URI {without_password(uri)} needs the package {error.name}; for PostgreSQL: "
            'pip install "fqsweep[postgres]"'
        ) from error
    except Exception as error:  # what the store raises: MLflow, SQLAlchemy, requests
        own = paths.tracking_db
        remedy = (
            f"mend {own}, or move it away: the sweep then records its results anew"
            if sqlite_file(uri) == own.resolve()
            else "start the server or correct --tracking-uri; without it the sweep keeps its own database"
        )
        raise InputError(
            f"tracking URI {without_password(uri)} cannot be used: {first_line(error)}\n{remedy}"
        ) from error


@contextlib.contextmanager
def _ready_database(uri: str, tables: Callable[[], bytes] | None) -> Iterator[None]:
    """Make a sqlite file that is not there, and switch it to write-ahead logging; one that was moved goes on here."""
    file = sqlite_file(uri)
    if file is not None and not file.exists():
        with making_tables(uri) if tables is None else contextlib.nullcontext(tables) as tables:
            if tables is not None:
                _place_database(file, tables())
    elif file is not None:
        follow_artifacts(file, experiment=DEFAULT_EXPERIMENT)
    yield
    if file is not None and file.is_file():
        with contextlib.closing(sqlite3.connect(file)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")


def _place_database(file: Path, contents: bytes) -> None:
    """A sqlite file with MLflow's tables, whole or not at all: one with some of them MLflow refuses for ever.

    One that another sweep placed meanwhile stays, with the runs that it may have by now.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as folder:
        beside = Path(folder) / file.name
        write_bytes(beside, contents)
        try:
            os.link(beside, file)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            if not file.exists():
                os.rename(beside, file)


def _experiment(client: MlflowClient, uri: str, paths: SweepPaths) -> str:
    found = client.get_experiment_by_name(DEFAULT_EXPERIMENT) or _new_experiment(client, uri, paths)
    if found.lifecycle_stage != "active":
        raise InputError(
            f"experiment {DEFAULT_EXPERIMENT!r} at {without_password(uri)} is deleted; restore it or use another URI"
        )
    return str(found.experiment_id)


def _new_experiment(client: MlflowClient, uri: str, paths: SweepPaths) -> Experiment:
    # With a database alone the artifacts would follow the working directory; a server has a place of its own.
    file = sqlite_file(uri)
    beside = paths.artifacts if file is None else file.parent / ARTIFACTS
    location = None if is_server(uri) else beside.resolve().as_uri()
    kind = {"mlflow.experimentKind": "custom_model_development"}  # the UI has another page for language models
    try:
        return client.get_experiment(
            client.create_experiment(DEFAULT_EXPERIMENT, artifact_location=location, tags=kind)
        )
    except MlflowException:
        found = client.get_experiment_by_name(DEFAULT_EXPERIMENT)  # another sweep's, made meanwhile
        if found is None:
            raise
        return found


def _parent(client: MlflowClient, experiment_id: str, sweep: str, paths: SweepPaths) -> str:
    """The parent run of this output folder in this store.

    Beside the ledger lie the ids of all that it has, in whatever stores, that of the last start at the end.
    """
    noted = paths.parent_run.read_text().split() if paths.parent_run.exists() else []
    parent_id = next((run_id for run_id in reversed(noted) if _is_active(client, run_id)), None)
    if parent_id is None:
        tags = {TAG_KIND: KIND_SWEEP, TAG_SWEEP: sweep, **_who()}
        parent_id = str(client.create_run(experiment_id, tags=tags, run_name=sweep).info.run_id)
    else:
        client.update_run(parent_id, status="RUNNING")
    others = [run_id for run_id in noted if run_id != parent_id]
    write_bytes(paths.parent_run, "\n".join([*others, parent_id]).encode())
    return parent_id


def _is_active(client: MlflowClient, run_id: str) -> bool:
    """Whether a run is there. That a store does not answer is no word that it is not."""
    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False


def _log_facts(client: MlflowClient, parent_id: str, facts: Mapping[str, str]) -> None:
    """Parameters cannot change: what an earlier start wrote stays, and changes are tags."""
    known = client.get_run(parent_id).data.params
    params = [Param(name, value[:MAX_VALUE]) for name, value in facts.items() if name not in known]
    tags = [
        RunTag(name, value[:MAX_VALUE])
        for name, value in facts.items()
        if known.get(name, value[:MAX_VALUE]) != value[:MAX_VALUE]
    ]
    client.log_batch(parent_id, params=params, tags=tags)


def _code_facts(client: MlflowClient, parent_id: str) -> dict[str, str]:
    """The commit that this code is, where it is a git checkout; the UI shows it from MLflow's own tag."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():
        return {}
    commit = _git(checkout, "rev-parse", "HEAD")
    if not commit:
        return {}
    client.set_tag(parent_id, "mlflow.source.git.commit", commit)
    changes = _git(checkout, "status", "--porcelain", "--untracked-files=no")
    return {"version/commit": f"{commit} with changes" if changes else commit}


def _git(checkout: Path, *arguments: str) -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(checkout), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    return ""


@contextlib.contextmanager
def reaching(uri: str) -> Iterator[None]:
    """What goes wrong at the store is said in one line that tells how to go on.

    Raises:
        TrackingError: the store did not answer or refused; results are in the output folder.
        OSError: ``errno.ENOSPC``: the disk of its database is full.
    """
    try:
        yield
    except Exception as error:  # what the store raises: MLflow, SQLAlchemy, requests
        if is_no_space(error):
            raise
        raise TrackingError(
            f"MLflow at {without_password(uri)} did not take it: {first_line(error)}\n{ALL_IS_KEPT}"
        ) from error


@contextlib.contextmanager
def _reading(uri: str) -> Iterator[MlflowClient]:
    """A client of a store that must be there; what goes wrong at the store is said in one line."""
    check_exists(uri)
    try:
        try_database(uri)
        client = MlflowClient(tracking_uri=uri)
        client.get_experiment_by_name(DEFAULT_EXPERIMENT)
    except Exception as error:  # what the store raises: MLflow, SQLAlchemy, requests
        raise InputError(f"{without_password(uri)} cannot be read: {first_line(error)}") from error
    try:
        yield client
    except MlflowException as error:
        raise InputError(f"{without_password(uri)} cannot be read: {first_line(error)}") from error


def fetch_model(uri: str, run_id: str) -> bytes:
    """The packed model of a run, named by its id or its first letters.

    Raises:
        InputError: no such store or run, or the run has no packed model.
    """
    with _reading(uri) as client, tempfile.TemporaryDirectory() as folder:
        run = find_run(client, run_id, uri=uri)
        title = run.info.run_name
        if run.data.tags.get(TAG_KIND) == KIND_SWEEP:
            raise InputError(f"run {run_id} is that of the sweep {title!r}: give the run of one of its trials")
        try:
            return fetch_artifact(client, uri, run.info.run_id, MODEL_FILE, folder).read_bytes()
        except (MlflowException, OSError) as error:
            raise InputError(
                f"run {run_id} ({title}) has no packed model at {run.info.artifact_uri}: {first_line(error)}"
            ) from error


def fetch_space(uri: str, run_id: str, folder: Path) -> tuple[Path, dict[str, str]]:
    """The search space of a run's sweep, copied to ``folder`` or where it lies, and the run's parameters.

    Raises:
        InputError: the run or its sweep is not there.
    """
    with _reading(uri) as client:
        run = find_run(client, run_id, uri=uri)
        try:
            file = fetch_space_file(client, uri, run.data.tags[TAG_PARENT], str(folder))
        except (MlflowException, OSError, LookupError) as error:
            where = without_password(uri)
            raise InputError(
                f"the sweep of run {run_id} at {where} cannot be found: {without_password(str(error))}"
            ) from error
    return file, dict(run.data.params)
