"""A sweep from search space to report: Ray Tune runs the tasks that the state machine hands out.

The driver alone writes the ledger, the studies and MLflow (``fqsweep.engine.driver``).
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import shutil
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
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
from ray import tune
from ray.tune.search import Searcher

from fqsweep import __version__
from fqsweep.cells import expand_cells
from fqsweep.config import SearchSpace, content_hash
from fqsweep.disk import is_no_space, no_space
from fqsweep.engine.actor import TaskActor
from fqsweep.engine.checks import Prepared, preparing
from fqsweep.engine.control import is_asked_to_stop, only_driver, write_plan
from fqsweep.engine.driver import SweepDriver, adopt_finished, shared_seconds, used_data
from fqsweep.engine.estimate import CostModel
from fqsweep.engine.forgetting import ForgetfulProgress, ForgetfulScheduler, give_back_memory
from fqsweep.engine.gpus import MOST_TASKS_A_GPU, GpuShares
from fqsweep.engine.ledger import note_driver
from fqsweep.engine.search import plan_sweep
from fqsweep.engine.studies import OptunaStudies
from fqsweep.engine.tasks import Outcome, Task
from fqsweep.errors import ClusterError, InputError
from fqsweep.files import SPLITS_ENDING, WARNINGS_ENDING, SweepPaths
from fqsweep.names import SHARED_S
from fqsweep.processes import python_path
from fqsweep.progress import Display
from fqsweep.space import load_space
from fqsweep.tracking.machine import MachineWatch
from fqsweep.tracking.spool import Spool
from fqsweep.tracking.stores import default_uri
from fqsweep.tracking.tracker import Tracker, open_tracker, reaching

TICK_S = 1.0
LOOK_AT_RAY_S = 5.0
GIVE_BACK_S = 60.0
GRACE_S = 8.0


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """How the command line asks for a sweep.

    Attributes:
        command: the words that start it again, for messages.
        prepared: what has begun already; it begins with the sweep else.
        raise_if_stopped: asked before trials begin; raises ``KeyboardInterrupt`` if Ctrl-C got lost before.
        work: the module whose ``perform`` does a task; tests and benchmarks of the engine have cheaper work.
    """

    space_file: Path
    out: Path
    data_dir: Path | None = None
    tracking_uri: str | None = None
    address: str | None = None
    max_concurrent: int | None = None
    command: tuple[str, ...] = ()
    prepared: Prepared | None = None
    raise_if_stopped: Callable[[], None] = lambda: None
    work: str = "fqsweep.engine.work"


@dataclass(frozen=True, kw_only=True)
class SweepSummary:
    """How a sweep ended."""

    counts: dict[str, int]
    failures: list[str]
    tracking_uri: str
    parent_id: str


class TaskSearcher(Searcher):
    """The state machine as Ray Tune wants to see it."""

    def __init__(self, driver: SweepDriver, request: dict[str, Any], *, limit: int | None) -> None:
        super().__init__()
        self.driver = driver
        self.request = request
        self.limit = limit
        self.tasks: dict[str, Task] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Tune keeps a copy for its own way of going on, which is not used: ledger and studies are the state."""
        return {}

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        """The limit is kept in ``suggest``; what Tune is told is how many tasks may wait for a worker."""
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next task; None to be asked again later.

        Tune asks for more tasks than the cluster has room for, so that a worker that comes free finds its next one.
        A limit counts all that were handed out, and nothing is then handed out ahead.
        """
        if self.driver.stopped:
            return Searcher.FINISHED
        if self.limit is not None and len(self.tasks) >= self.limit:
            return None
        task = self.driver.next_task()
        if task is None:
            return Searcher.FINISHED if self.driver.stopped or self.driver.state.finished else None
        self.tasks[trial_id] = task
        return {**self.request, "gpus": self.driver.shares.of(task), "task": task.model_dump_json()}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """An attempt ended, or its worker died."""
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


def run_sweep(options: SweepOptions) -> SweepSummary:
    """Run a sweep, or go on with it: what is finished in ``out`` is not done again.

    Raises:
        InputError: bad input; nothing was started.
        TrackingError: MLflow was away at the end; the results are kept.
        ClusterError: Ray on this machine died; the results are kept.
        OSError: ``errno.ENOSPC``: a disk is full, whatever that led to; the results are kept.
        KeyboardInterrupt: Ctrl-C, or ``fqsweep cancel``; what is finished is kept, and of what was in training the
            epoch that ended within ``GRACE_S``, else the last that was saved.
    """
    paths = SweepPaths(options.out.resolve())
    uri = options.tracking_uri or default_uri(paths)
    try:
        with (
            contextlib.nullcontext(options.prepared)
            if options.prepared
            else preparing(options.space_file, paths, options.data_dir, uri)
        ) as prepared:
            return _run(options, prepared, paths, uri)
    except Exception as error:
        if is_no_space(error) and not isinstance(error, OSError):
            raise no_space(options.out) from error
        raise


def _run(options: SweepOptions, prepared: Prepared, paths: SweepPaths, uri: str) -> SweepSummary:
    space = load_space(options.space_file)
    checked = prepared.checked()
    for line in checked.warnings:
        print(line, flush=True)
    with only_driver(paths, options.command):
        tracker = open_tracker(
            uri,
            paths=paths,
            sweep=space.name,
            space_file=options.space_file,
            facts={**checked.facts, **_versions()},
            tables=prepared.tables,
        )
        costs = CostModel(space.resources, data_dir=options.data_dir, macs=checked.macs)
        cells = expand_cells(space)
        studies = OptunaStudies(space.search, paths.studies, cells=cells)
        state = plan_sweep(space, studies, costs.seconds, cells=cells)
        write_plan(paths, space.name, state)
        driver = SweepDriver(
            paths=paths,
            state=state,
            spool=Spool(tracker),
            costs=costs,
            shares=GpuShares(space.resources.gpus_per_trial, total=0),
        )
        how = "stopped"
        try:
            adopt_finished(driver, studies)
            driver.spool.retire_all_but(state.done)
            if not state.finished:
                with _watching(tracker, paths):
                    _run_with_ray(driver, space, options)
            if driver.trouble is not None:
                raise driver.trouble
            driver.spool.finish()
            how = "done"
        finally:
            driver.spool.stop()
            with contextlib.suppress(OSError):  # a full disk must not hide what it ended
                note_driver(paths, "end", how=how)
            if how == "stopped" and driver.spool.trouble is None:
                tracker.stopped()
        failures = [f"{failure.task.title}: {failure.reason}" for failure in state.failures]
        failures += [f"{title}: its prerequisite failed" for f in state.failures for title in f.blocked]
        with reaching(uri):
            tracker.log_numbers({f"cells/{name}": float(number) for name, number in state.counts().items()})
            tracker.log_numbers({SHARED_S: shared_seconds(paths, state.shared)})
            tracker.log_data(used_data(paths, state.shared))
            for ending in (SPLITS_ENDING, WARNINGS_ENDING):
                tracker.log_splits(paths.packs.glob(f"*{ending}"))
            tracker.end(done=not failures)
        for line in later_warnings(paths, checked.warnings):
            print(line, flush=True)
    return SweepSummary(counts=state.counts(), failures=failures, tracking_uri=uri, parent_id=tracker.parent_id)


def later_warnings(paths: SweepPaths, before: Collection[str]) -> list[str]:
    """What was found in the images when they were decoded, near-duplicates above all, and is not said yet."""
    files = sorted(paths.packs.glob(f"*{WARNINGS_ENDING}"))
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return [line for line in dict.fromkeys(lines) if line not in before]


@contextlib.contextmanager
def _watching(tracker: Tracker, paths: SweepPaths) -> Iterator[None]:
    """Sample this machine onto the parent run for as long as trials run."""
    step, energy_kwh = tracker.machine_before()
    watch = MachineWatch(tracker.log_numbers, folder=paths.out, first_step=step, energy_kwh=energy_kwh)
    try:
        yield
    finally:
        watch.stop()


def _versions() -> dict[str, str]:
    found = {f"version/{name}": version(name) for name in ("torch", "timm", "ray", "optuna", "mlflow", "numpy")}
    return {"version/fqsweep": __version__, "version/python": platform.python_version(), **found}


# --- Ray -----------------------------------------------------------------------------------------


def _run_with_ray(driver: SweepDriver, space: SearchSpace, options: SweepOptions) -> None:
    resources = space.resources
    with _ray(options.address), _scratch(driver.paths) as scratch:
        driver.num_slots = _count_slots(space, options.max_concurrent)
        driver.shares.total = ray.cluster_resources().get("GPU", 0)
        note_driver(driver.paths, "begin", pid=os.getpid(), host=platform.node(), slots=driver.num_slots)
        request = {
            "out": str(driver.paths.out),
            "data_dir": None if options.data_dir is None else str(options.data_dir.resolve()),
            "cpus": resources.cpus_per_trial,
            "time_limit_s": resources.time_limit_s,
            "work": options.work,
        }
        trainable = tune.with_resources(
            TaskActor,
            lambda config: tune.PlacementGroupFactory([{"CPU": config["cpus"], "GPU": config["gpus"]}]),
        )
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=TaskSearcher(driver, request, limit=options.max_concurrent),
                scheduler=ForgetfulScheduler(),
                num_samples=-1,
                max_concurrent_trials=driver.num_slots,  # so many may wait; else one, and workers start one by one
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="tasks",
                storage_path=scratch,
                verbose=0,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                callbacks=[ForgetfulProgress()],
            ),
        )
        with Display(driver.snapshot) as display, _ticking(display, driver):
            options.raise_if_stopped()
            try:
                tuner.fit()
            except (Exception, KeyboardInterrupt) as error:
                # What stopped the driver says more than what became of it in Tune.
                raise driver.trouble or error from None


@contextlib.contextmanager
def _scratch(paths: SweepPaths) -> Iterator[str]:
    """A folder of this machine for Tune's own copy of the state: of no use, because ledger and results are the truth.

    Not in the output folder, whose disk may be full or far away; workers write nothing there. Those that killed
    drivers of the same output folder left here are removed.
    """
    prefix = f"fqsweep-{content_hash(str(paths.out))[:8]}-"
    for leftover in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as folder:
        yield folder


@contextlib.contextmanager
def _ray(address: str | None) -> Iterator[None]:
    """A connection to the cluster at ``address``, or Ray on this machine for as long as the sweep runs.

    Without an address Ray would join any cluster whose traces it finds on this machine, or wait for a dead one.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    for name in ("ray", "ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Tune prints a traceback for each worker that dies; the ledger has the reason, and what Tune cannot do it raises.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ray.init(
                address=address or "local",
                log_to_driver=False,
                logging_level=logging.ERROR,
                **({} if address else {"include_dashboard": False}),
                runtime_env={"env_vars": {"PYTHONPATH": python_path(), **_worker_memory()}},
            )
        except ConnectionError as error:
            raise InputError(f"no Ray cluster at {address}: {error}") from error
        try:
            yield
        finally:
            ray.shutdown()


def _worker_memory() -> dict[str, str]:
    """Have glibc ask for large pages in workers, unless this process was told otherwise.

    Networks whose activations fill gigabytes on the CPU spent up to a fifth of each training step on faults of
    small pages (docs/results/speed.md). Read when a process starts; other C libraries, and glibc before 2.35,
    ignore it.
    """
    return {} if "GLIBC_TUNABLES" in os.environ else {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def _count_slots(space: SearchSpace, limit: int | None) -> int:
    """How many tasks run at the same time on what the cluster has now.

    Raises:
        InputError: not even one fits.
    """
    total = ray.cluster_resources()
    resources = space.resources
    slots = int(total.get("CPU", 0) / resources.cpus_per_trial)
    if resources.gpus_per_trial == "auto":
        slots = min(slots, int(total.get("GPU", 0)) * MOST_TASKS_A_GPU)
    elif resources.gpus_per_trial:
        per_gpu = int(1 / resources.gpus_per_trial + 1e-9) if resources.gpus_per_trial < 1 else 0
        gpus = total.get("GPU", 0)
        slots = min(slots, int(gpus) * per_gpu if per_gpu else int(gpus / resources.gpus_per_trial))
    if slots < 1:
        raise InputError(
            f"one trial needs {resources.cpus_per_trial:g} CPUs and {resources.most_gpus:g} GPUs, but Ray has "
            f"{total.get('CPU', 0):g} and {total.get('GPU', 0):g}; change resources in the search space"
        )
    return min(slots, limit) if limit else slots


@contextlib.contextmanager
def _ticking(display: Display, driver: SweepDriver) -> Iterator[None]:
    """Refresh the display once a second while Tune has the main thread, and look whether to stop.

    After trouble (a full disk, Ray dead, a wish to stop) running tasks have ``GRACE_S`` to end: Tune would wait for
    them, and for workers that cannot start, without end. Who is told to stop saves its state at the end of an epoch;
    a second signal does not wait for that. SIGTERM counts as Ctrl-C: batch systems send it. A driver that a shell
    made deaf to Ctrl-C, in the background, stays so.
    """
    over = threading.Event()
    main = threading.main_thread().ident
    assert main is not None

    def stop(*_given: Any) -> None:
        if driver.stopped:
            raise KeyboardInterrupt
        driver.stop_for(KeyboardInterrupt())
        with contextlib.suppress(OSError):
            driver.paths.cancel_request.touch()
        print(
            f"\nstopping: what ends an epoch within {GRACE_S:g} s is saved; Ctrl-C again ends it now",
            flush=True,
        )

    def run() -> None:
        troubled_since: float | None = None
        next_look = time.monotonic() + LOOK_AT_RAY_S
        next_give_back = time.monotonic()
        while not over.wait(TICK_S):
            if time.monotonic() > next_give_back:
                give_back_memory()
                next_give_back = time.monotonic() + GIVE_BACK_S
            with contextlib.suppress(RuntimeError, OSError):
                display.tick()
            if not driver.stopped and time.monotonic() > next_look:
                dead = _ray_is_dead(driver.paths)
                if dead is not None:
                    driver.stop_for(dead)
                next_look = time.monotonic() + LOOK_AT_RAY_S
            if not driver.stopped and is_asked_to_stop(driver.paths):
                driver.stop_for(KeyboardInterrupt())
            if driver.stopped and troubled_since is None:
                troubled_since = time.monotonic()
            if troubled_since is not None and time.monotonic() > troubled_since + GRACE_S:
                signal.pthread_kill(main, signal.SIGTERM)
                return

    heard = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        heard.append(signal.SIGINT)
    before = {number: signal.signal(number, stop) for number in heard}
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=2 * TICK_S)
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _ray_is_dead(paths: SweepPaths) -> ClusterError | None:
    """The error of a node whose Ray has died under the driver: no task can start any more, and Tune would wait on."""
    try:
        own = ray.get_runtime_context().get_node_id()
        dead = any(node["NodeID"] == own and not node["Alive"] for node in ray.nodes())
    except Exception:  # Ray is ending, or its head does not answer: it says so itself
        return None
    if not dead:
        return None
    return ClusterError(
        f"Ray on {platform.node()} died (killed, or out of memory?); what is finished is kept in {paths.out}, and "
        "the same command goes on"
    )
