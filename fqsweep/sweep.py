"""A sweep from search space to report: Ray Tune runs the tasks that the state machine hands out.

The driver alone writes the ledger, the studies and MLflow. Order on the end of a trial: its own result file
(by the worker), MLflow, the study, the ledger. Each step can be found done or not done at the next start.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import shutil
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Read by Ray and torch when they are imported.
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "600")
os.environ.setdefault("TUNE_RESULT_BUFFER_LENGTH", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from filelock import FileLock, Timeout
from ray import tune
from ray.tune.search import Searcher

from fqsweep import __version__
from fqsweep.actor import TaskActor
from fqsweep.config import SearchSpace, content_hash
from fqsweep.data import dataset_digest, plan_dataset
from fqsweep.errors import InputError, TrackingError
from fqsweep.estimate import CostModel
from fqsweep.files import SweepPaths, append_line, read_lines, write_bytes, write_json
from fqsweep.models import build_model
from fqsweep.progress import Display, Snapshot
from fqsweep.search import OptunaStudies, SweepState, plan_sweep
from fqsweep.space import Cell, load_space, trial_key
from fqsweep.tasks import Outcome, Task
from fqsweep.tracking import Tracker, default_uri, open_tracker
from fqsweep.trial import TrialResult, read_result

TICK_S = 1.0


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """How the command line asks for a sweep."""

    space_file: Path
    out: Path
    data_dir: Path | None = None
    tracking_uri: str | None = None
    address: str | None = None
    max_concurrent: int | None = None


@dataclass(frozen=True, kw_only=True)
class SweepSummary:
    """How a sweep ended."""

    counts: dict[str, int]
    failures: list[str]
    tracking_uri: str
    parent_id: str


# --- in the driver -------------------------------------------------------------------------------


class TaskSearcher(Searcher):
    """The state machine as Ray Tune wants to see it."""

    def __init__(self, driver: SweepDriver, request: dict[str, Any]) -> None:
        super().__init__()
        self.driver = driver
        self.request = request
        self.tasks: dict[str, Task] = {}

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        """Tune itself keeps the limit; were it to wrap this searcher, starts would come one by one."""
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next task; None to be asked again later."""
        if self.driver.stopped:
            return Searcher.FINISHED
        task = self.driver.state.next_task()
        if task is None:
            return Searcher.FINISHED if self.driver.state.finished else None
        self.tasks[trial_id] = task
        return {**self.request, "task": task.model_dump_json()}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """A task ended, or its worker died."""
        task = self.tasks.pop(trial_id, None)
        if task is None:
            return
        if error or not result or "outcome" not in result:
            self.driver.lost(task)
        else:
            self.driver.ended(task, Outcome.model_validate_json(result["outcome"]))

    def save(self, checkpoint_path: str) -> None:
        """The ledger and the studies are the state."""

    def restore(self, checkpoint_path: str) -> None:
        """See ``save``."""


@dataclass
class SweepDriver:
    """Books what happens: state, ledger, studies, MLflow."""

    paths: SweepPaths
    state: SweepState
    tracker: Tracker
    costs: CostModel
    num_slots: int
    best: dict[str, tuple[float, str]] = field(default_factory=dict)
    trouble: Exception | None = None
    spent_s: float = 0.0
    spent_cost: float = 0.0

    @property
    def stopped(self) -> bool:
        return self.trouble is not None

    def ended(self, task: Task, outcome: Outcome) -> None:
        """A task ended in its worker. Errors of the books are kept and raised by ``run_sweep``: never here."""
        try:
            if outcome.done:
                self._book(task, outcome.seconds)
            else:
                self.state.fail(task, outcome.reason)
                append_line(self.paths.ledger, _line(task, "failed", reason=outcome.reason))
        except Exception as error:
            self.trouble = self.trouble or error

    def lost(self, task: Task) -> None:
        """The worker died. If it had finished, its result counts; else the task comes again."""
        try:
            if task.kind == "trial" and self.paths.result(task.key).exists():
                self._book(task, 0.0)
            else:
                append_line(self.paths.ledger, _line(task, "lost"))
                self.state.lose(task, f"its worker process died (log: {self.paths.log(task.key)})")
        except Exception as error:
            self.trouble = self.trouble or error

    def _log(self, result: TrialResult, files: list[Path]) -> None:
        try:
            self.tracker.log_trial(result, files)
        except Exception as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise TrackingError(
                f"MLflow failed while {result.title} was recorded: {first}\n"
                "every finished trial is kept in the output folder; when MLflow is back, run the same command again"
            ) from error

    def _book(self, task: Task, seconds: float) -> None:
        if seconds:
            self.spent_s += seconds
            self.spent_cost += self.costs.seconds(task)
        metrics = None
        if task.kind == "trial":
            metrics = self.record(read_result(self.paths.result(task.key)))
        self.state.complete(task, metrics)
        append_line(self.paths.ledger, _line(task, "done", seconds=round(seconds, 3)))

    def record(self, result: TrialResult) -> dict[str, float]:
        """A finished trial goes to MLflow and to the list of the best."""
        folder = self.paths.trial(result.key)
        files = [folder / name for name in ("model.fqs", "bits.csv", "bits.png") if (folder / name).exists()]
        self._log(result, files)
        bits = result.metrics["bits/mean_weight"]
        budget = result.params["budget_bits"]
        label = "fp32" if bits == 32 else f"{float(budget):g} bit"
        value = result.metrics["val/acc_worst"]
        if label not in self.best or value > self.best[label][0]:
            self.best[label] = (value, result.params["variant"])
        return result.metrics

    def snapshot(self) -> Snapshot:
        """What the display shows."""
        left = None
        if self.spent_cost:
            left = self.state.cost_left() * (self.spent_s / self.spent_cost) / self.num_slots
        order = sorted(
            self.best, key=lambda label: (label == "fp32", float(label.split()[0]) if " " in label else 0)
        )
        return Snapshot(
            counts=self.state.counts(),
            prepared=(sum(key in self.state.done for key in self.state.shared), len(self.state.shared)),
            running=tuple(task.title for task in list(self.state.running.values())),
            best={label: self.best[label] for label in order},
            seconds_left=left,
        )


def _line(task: Task, event: str, **more: Any) -> dict[str, Any]:
    known = {"event": event, "key": task.key, "kind": task.kind, "title": task.title, "time": int(time.time())}
    return {**known, "cell": task.cell.key, "number": task.number, **more}


def run_sweep(options: SweepOptions) -> SweepSummary:
    """Run a sweep, or go on with it: what is finished in ``out`` is not done again.

    Raises:
        InputError: bad input; nothing was started.
    """
    space = load_space(options.space_file)
    paths = SweepPaths(options.out.resolve())
    facts = check_inputs(space, paths, options.data_dir)
    with _only_driver(paths):
        uri = options.tracking_uri or default_uri(paths)
        tracker = open_tracker(
            uri, paths=paths, sweep=space.name, space_file=options.space_file, facts={**facts, **_versions()}
        )
        costs = CostModel(space.resources, data_dir=options.data_dir)
        studies = OptunaStudies(space.search, paths.studies)
        state = plan_sweep(space, studies, costs.seconds)
        driver = SweepDriver(paths=paths, state=state, tracker=tracker, costs=costs, num_slots=1)
        adopt_finished(driver, studies)
        if not state.finished:
            _run_with_ray(driver, space, options)
        if driver.trouble is not None:
            raise driver.trouble
        failures = [f"{failure.task.title}: {failure.reason}" for failure in state.failures]
        failures += [f"{title}: its prerequisite failed" for f in state.failures for title in f.blocked]
        tracker.log_numbers({f"cells/{name}": float(number) for name, number in state.counts().items()})
        tracker.end(done=not failures)
    return SweepSummary(
        counts=state.counts(),
        failures=failures,
        tracking_uri=uri,
        parent_id=tracker.parent_id,
    )


# --- before it starts ----------------------------------------------------------------------------


def check_inputs(space: SearchSpace, paths: SweepPaths, data_dir: Path | None) -> dict[str, str]:
    """Everything that can be known to be wrong before a trial starts.

    Returns:
        facts for the parent run: data set name and configuration -> digest of images, labels, groups, splits.

    Raises:
        InputError: with the first data set or architecture that cannot be used.
    """
    _check_writable(paths.out)
    digests = {}
    for dataset in space.datasets:
        samples, splits = plan_dataset(dataset, data_dir=data_dir)
        # Another configuration is another data set with cells of its own: only the same one must not change.
        same = content_hash(dataset.model_dump(mode="json", exclude={"name"}))
        digests[f"data/{dataset.name}/{same}"] = dataset_digest(samples, splits, dataset.image_size)
        for architecture in space.architectures:
            untrained = architecture.model_copy(update={"pretrained": False})
            build_model(
                untrained, num_classes=len(samples.class_names), image_size=dataset.image_size, device="meta"
            )
            if (
                isinstance(architecture.pretrained, str)
                and not Path(architecture.pretrained).expanduser().is_file()
            ):
                raise InputError(
                    f"architecture {architecture.name}: no file {architecture.pretrained} (pretrained)"
                )
    _check_unchanged(paths, digests)
    return digests


def _check_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_bytes(out / ".writable", b"fqsweep")
        (out / ".writable").unlink()
    except OSError as error:
        raise InputError(
            f"output folder {out} cannot be written: {error.strerror}; give another --out"
        ) from error


def _check_unchanged(paths: SweepPaths, digests: dict[str, str]) -> None:
    """A sweep goes on only with the data it began with."""
    noted = paths.out / "data.json"
    before = json.loads(noted.read_text()) if noted.exists() else {}
    changed = [name for name, digest in digests.items() if before.get(name, digest) != digest]
    if changed:
        raise InputError(
            f"{', '.join(changed)}: the images or labels have changed since {paths.out} was begun; "
            "use another --out, or put the data back"
        )
    write_json(noted, {**before, **digests})


@contextlib.contextmanager
def _only_driver(paths: SweepPaths) -> Iterator[None]:
    lock = FileLock(str(paths.driver_lock))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        holder = paths.out / "driver.txt"
        who = holder.read_text().strip() if holder.exists() else "another process"
        raise InputError(f"{paths.out} is in use by {who}; wait for it, or use another --out") from error
    try:
        (paths.out / "driver.txt").write_text(f"process {os.getpid()} on {platform.node()}")
        yield
    finally:
        lock.release()


def _versions() -> dict[str, str]:
    found = {f"version/{name}": version(name) for name in ("torch", "timm", "ray", "optuna", "mlflow", "numpy")}
    return {"version/fqsweep": __version__, "version/python": platform.python_version(), **found}


def adopt_finished(driver: SweepDriver, studies: OptunaStudies) -> None:
    """Take over what earlier starts finished: results on disk count, whether or not they were booked."""
    booked = {line["key"] for line in read_lines(driver.paths.ledger) if line.get("event") == "done"}
    for key, task in driver.state.shared.items():
        whole = (
            driver.paths.baseline(key) / "meta.json"
            if task.kind == "baseline"
            else driver.paths.importance(key)
        )
        if whole.exists():
            driver.state.complete(task)
    for cell_state in list(driver.state.cells):
        cell = cell_state.cell
        for task in _tasks_asked_before(cell, cell_state.needs, studies):
            if not driver.paths.result(task.key).exists():
                continue
            driver.state.adopt(task, driver.record(read_result(driver.paths.result(task.key))))
            if task.key not in booked:
                append_line(driver.paths.ledger, _line(task, "done", seconds=0.0))


def _tasks_asked_before(cell: Cell, needs: tuple[str, ...], studies: OptunaStudies) -> list[Task]:
    asked = studies.asked_before(cell) if cell.point.free_weights else [(0, {})]
    return [
        Task(
            key=trial_key(cell, number=number, weights=weights),
            kind="trial",
            cell=cell,
            number=number,
            weights=weights,
            needs=needs,
        )
        for number, weights in asked
    ]


# --- Ray -----------------------------------------------------------------------------------------


def _run_with_ray(driver: SweepDriver, space: SearchSpace, options: SweepOptions) -> None:
    resources = space.resources
    with _ray(options.address):
        driver.num_slots = _count_slots(space, options.max_concurrent)
        request = {
            "out": str(driver.paths.out),
            "data_dir": None if options.data_dir is None else str(options.data_dir.resolve()),
            "gpus": resources.gpus_per_trial,
            "cpus": resources.cpus_per_trial,
        }
        trainable = tune.with_resources(
            TaskActor, {"cpu": resources.cpus_per_trial, "gpu": resources.gpus_per_trial}
        )
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=TaskSearcher(driver, request),
                num_samples=-1,
                max_concurrent_trials=driver.num_slots,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="tasks",
                storage_path=str(driver.paths.ray_storage),
                verbose=0,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )
        # Ray's own copy of the state is of no use: ledger and results are the truth.
        shutil.rmtree(driver.paths.ray_storage, ignore_errors=True)
        with Display(driver.snapshot) as display, _ticking(display):
            tuner.fit()
        shutil.rmtree(driver.paths.ray_storage, ignore_errors=True)


@contextlib.contextmanager
def _ray(address: str | None) -> Iterator[None]:
    """A connection to the cluster at ``address``, or Ray on this machine for as long as the sweep runs."""
    for name in ("ray", "ray.tune", "ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **({} if address else {"include_dashboard": False}),
                runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(_import_paths())}},
            )
        except ConnectionError as error:
            raise InputError(f"no Ray cluster at {address}: {error}") from error
        try:
            yield
        finally:
            ray.shutdown()


def _import_paths() -> list[str]:
    """Where workers find this package, installed or not."""
    own = str(Path(__file__).resolve().parents[1])
    given = os.environ.get("PYTHONPATH", "")
    return [own, *(part for part in given.split(os.pathsep) if part and part != own)]


def _count_slots(space: SearchSpace, limit: int | None) -> int:
    """How many tasks run at the same time on what the cluster has now.

    Raises:
        InputError: not even one fits.
    """
    total = ray.cluster_resources()
    resources = space.resources
    slots = int(total.get("CPU", 0) / resources.cpus_per_trial)
    if resources.gpus_per_trial:
        per_gpu = int(1 / resources.gpus_per_trial + 1e-9) if resources.gpus_per_trial < 1 else 0
        gpus = total.get("GPU", 0)
        slots = min(slots, int(gpus) * per_gpu if per_gpu else int(gpus / resources.gpus_per_trial))
    if slots < 1:
        raise InputError(
            f"one trial needs {resources.cpus_per_trial:g} CPUs and {resources.gpus_per_trial:g} GPUs, but Ray has "
            f"{total.get('CPU', 0):g} and {total.get('GPU', 0):g}; change resources in the search space"
        )
    return min(slots, limit) if limit else slots


@contextlib.contextmanager
def _ticking(display: Display) -> Iterator[None]:
    """Refresh the display once a second while Tune has the main thread."""
    over = threading.Event()

    def run() -> None:
        while not over.wait(TICK_S):
            with contextlib.suppress(RuntimeError):
                display.tick()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=2 * TICK_S)
