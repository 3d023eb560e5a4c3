"""What runs next: a state machine over the tasks of a sweep, and one Optuna study a cell.

Pure Python: no Ray, no clock, no files of its own. ``sweep.py`` asks it for tasks and tells it how they ended.
Telling the same thing twice changes nothing.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from fqsweep.config import SearchConfig, SearchSpace, WeightRange
from fqsweep.files import write_bytes
from fqsweep.names import metric_of
from fqsweep.space import Cell, expand_cells, trial_key
from fqsweep.tasks import Task


class Study(Protocol):
    """Where the values of free weights come from."""

    def ask(self, cell: Cell) -> tuple[int, dict[str, float]]:
        """Number and values of the cell's next trial; a trial that was asked for and never told comes again."""
        ...

    def tell(self, cell: Cell, number: int, metrics: Mapping[str, float]) -> None:
        """The metrics of a finished trial; telling twice changes nothing."""
        ...

    def give_up(self, cell: Cell, number: int) -> None:
        """The trial failed for good."""
        ...


class OptunaStudies:
    """One multi-objective study a cell, in one journal that only the driver writes."""

    def __init__(self, config: SearchConfig, journal: Path) -> None:
        self.config = config
        journal.parent.mkdir(parents=True, exist_ok=True)
        _cut_off_unfinished_line(journal)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.storage = JournalStorage(JournalFileBackend(str(journal)))
        self.studies: dict[str, optuna.Study] = {}
        self.handed_out: set[tuple[str, int]] = set()

    def ask(self, cell: Cell) -> tuple[int, dict[str, float]]:
        """See ``Study.ask``."""
        study = self._study(cell)
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if (cell.key, trial.number) not in self.handed_out:
                return self._hand_out(cell, optuna.Trial(study, trial._trial_id))
        return self._hand_out(cell, study.ask())

    def _hand_out(self, cell: Cell, asked: optuna.Trial) -> tuple[int, dict[str, float]]:
        """Number and values; values that a driver killed between two of them left open are drawn now."""
        for name, limits in cell.point.free_weights.items():
            asked.suggest_float(name, limits.low, limits.high, log=limits.log)
        self.handed_out.add((cell.key, asked.number))
        return asked.number, dict(asked.params)

    def tell(self, cell: Cell, number: int, metrics: Mapping[str, float]) -> None:
        """See ``Study.tell``."""
        values = [metrics[key] for key in self.config.objectives]
        self._study(cell).tell(number, values, skip_if_finished=True)

    def give_up(self, cell: Cell, number: int) -> None:
        """See ``Study.give_up``."""
        self._study(cell).tell(number, state=TrialState.FAIL, skip_if_finished=True)

    def asked_before(self, cell: Cell) -> list[tuple[int, dict[str, float]]]:
        """Numbers and values of the trials that an earlier start asked for and that did not fail."""
        states = (TrialState.COMPLETE, TrialState.RUNNING)
        known = self._study(cell).get_trials(deepcopy=False, states=states)
        return [(trial.number, dict(trial.params)) for trial in known]

    def _study(self, cell: Cell) -> optuna.Study:
        """The cell's study; a new one begins with the start values of its ranges.

        It is found by the cell's key and the objectives: the title before them may have changed.
        """
        if cell.key in self.studies:
            return self.studies[cell.key]
        study = self._find_study(cell) or optuna.create_study(
            study_name=f"{cell.title} by {', '.join(self.config.objectives)} [{cell.key}]",
            storage=self.storage,
            directions=[_direction(key) for key in self.config.objectives],
            load_if_exists=True,  # a driver may have died before it gave the study its names
        )
        trials = study.get_trials(deepcopy=False)
        study.sampler = self._sampler(cell, num_trials=len(trials))
        if not trials:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                study.set_metric_names(self._metric_names())
            study.enqueue_trial({n: _start(limits) for n, limits in cell.point.free_weights.items()})
        self.studies[cell.key] = study
        return study

    def _find_study(self, cell: Cell) -> optuna.Study | None:
        for one in self.storage.get_all_studies():
            if one.study_name.endswith(f"[{cell.key}]"):
                study = optuna.load_study(study_name=one.study_name, storage=self.storage)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    if study.metric_names == self._metric_names():
                        return study
        return None

    def _metric_names(self) -> list[str]:
        return [key.replace("/", " ") for key in self.config.objectives]

    def _sampler(self, cell: Cell, *, num_trials: int) -> optuna.samplers.BaseSampler:
        # Each cell its own stream; going on after ``num_trials`` must not draw their values again.
        seed = (self.config.seed * 1_000_003 + int(cell.key, 16) + num_trials) % 2**32
        if self.config.sampler == "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=5, multivariate=True, constant_liar=True
            )


def _cut_off_unfinished_line(journal: Path) -> None:
    """Drop what a crash left of a line: Optuna would append to it and never read the journal again."""
    content = journal.read_bytes() if journal.exists() else b""
    if content and not content.endswith(b"\n"):
        write_bytes(journal, content[: content.rfind(b"\n") + 1])


def _direction(key: str) -> Literal["minimize", "maximize"]:
    direction = metric_of(key).direction
    assert direction != "none"
    return direction


def _start(limits: WeightRange) -> float:
    return limits.low if limits.start is None else limits.start


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A task that failed for good; ``blocked`` names what could not run because of it."""

    task: Task
    reason: str
    blocked: tuple[str, ...]


@dataclass
class _CellState:
    """How far a cell is: trials wanted, handed out, ended."""

    cell: Cell
    wanted: int
    needs: tuple[str, ...]
    asked: int = 0
    done: int = 0
    failed: int = 0

    @property
    def open(self) -> bool:
        return self.asked < self.wanted


@dataclass
class SweepState:
    """What is done, running and ready.

    Build with ``plan_sweep``. Invariants: a task is handed out when everything it needs is done, and at most once
    unless it was lost; a trial whose parent failed is never handed out.

    Attributes:
        cost: expected cost of a task, in any unit; longer chains and dearer tasks go first.
        max_attempts: how often a task is tried when its worker dies.
    """

    cells: list[_CellState]
    shared: dict[str, Task]
    study: Study
    cost: Callable[[Task], float]
    max_attempts: int = 3
    done: set[str] = field(default_factory=set)
    running: dict[str, Task] = field(default_factory=dict)
    lost: list[Task] = field(default_factory=list)
    attempts: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)
    failed: set[str] = field(default_factory=set)
    _rank: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Rank shared tasks by the work that waits for them."""
        for task in self.shared.values():
            self._rank[task.key] = self.cost(task)
        for state in self.cells:
            own = self.cost(_trial(state.cell, 0, {}, state.needs)) * state.wanted
            for key in state.needs:
                self._rank[key] += own
        self._cell_cost = {
            state.cell.key: self.cost(_trial(state.cell, 0, {}, state.needs)) for state in self.cells
        }
        self._by_key = {state.cell.key: state for state in self.cells}
        self.cells.sort(key=lambda state: -self._cell_cost[state.cell.key])
        self._shared_order = sorted(self.shared.values(), key=lambda task: -self._rank[task.key])

    # --- asking ---

    def next_task(self) -> Task | None:
        """The next task to start, None if nothing is ready now."""
        task = self._next_lost() or self._next_shared() or self._next_trial()
        if task is not None:
            self.running[task.key] = task
            self.attempts[task.key] += 1
        return task

    def _next_lost(self) -> Task | None:
        return self.lost.pop(0) if self.lost else None

    def _next_shared(self) -> Task | None:
        for task in self._shared_order:
            ended = task.key in self.done or task.key in self.failed or task.key in self.running
            if not ended and self._is_ready(task.needs):
                return task
        return None

    def _next_trial(self) -> Task | None:
        for state in self.cells:
            if state.open and self._is_ready(state.needs):
                return self._ask(state)
        return None

    def _is_ready(self, needs: Iterable[str]) -> bool:
        return all(key in self.done for key in needs)

    def _ask(self, state: _CellState) -> Task:
        state.asked += 1
        if not state.cell.point.free_weights:
            return _trial(state.cell, 0, {}, state.needs)
        number, weights = self.study.ask(state.cell)
        return _trial(state.cell, number, weights, state.needs)

    # --- telling ---

    def complete(self, task: Task, metrics: Mapping[str, float] | None = None) -> None:
        """A task is done; of a trial with free weights, its metrics go to the study."""
        self.running.pop(task.key, None)
        if task.key in self.done or task.key in self.failed:
            return
        self.lost = [other for other in self.lost if other.key != task.key]
        self.done.add(task.key)
        if task.kind == "trial":
            self._state_of(task.cell).done += 1
            if task.weights and metrics is not None:
                self.study.tell(task.cell, task.number, metrics)

    def adopt(self, task: Task, metrics: Mapping[str, float]) -> None:
        """A trial that an earlier start finished: it counts as asked for and done."""
        if task.key not in self.done:
            self._state_of(task.cell).asked += 1
            self.complete(task, metrics)

    def lose(self, task: Task, reason: str) -> None:
        """The worker died: the task comes again, until it has been tried ``max_attempts`` times."""
        if self.running.pop(task.key, None) is None:
            return
        if self.attempts[task.key] >= self.max_attempts:
            self._give_up(task, f"{reason} ({self.attempts[task.key]} attempts)")
        else:
            self.lost.append(task)

    def fail(self, task: Task, reason: str) -> None:
        """The task itself failed: trying again would fail again."""
        if self.running.pop(task.key, None) is not None:
            self._give_up(task, reason)

    def _give_up(self, task: Task, reason: str) -> None:
        self.failed.add(task.key)
        if task.kind == "trial":
            self._state_of(task.cell).failed += 1
            if task.weights:
                self.study.give_up(task.cell, task.number)
            self.failures.append(Failure(task=task, reason=reason, blocked=()))
            return
        # Whatever needs a failed shared task, directly or through another, cannot run.
        for other in self.shared.values():
            if task.key in other.needs:
                self.failed.add(other.key)
        blocked = [state for state in self.cells if state.open and self.failed & set(state.needs)]
        for state in blocked:
            state.failed += state.wanted - state.asked
            state.asked = state.wanted
        self.failures.append(Failure(task=task, reason=reason, blocked=tuple(s.cell.title for s in blocked)))

    def _state_of(self, cell: Cell) -> _CellState:
        return self._by_key[cell.key]

    # --- looking ---

    @property
    def finished(self) -> bool:
        """Nothing runs and nothing can run any more."""
        if self.running or self.lost:
            return False
        open_shared = any(key not in self.done and key not in self.failed for key in self.shared)
        return not open_shared and not any(state.open for state in self.cells)

    def counts(self) -> dict[str, int]:
        """Cells by state: done, failed, running, waiting."""
        running = {task.cell.key for task in self.running.values() if task.kind == "trial"}
        counts = dict.fromkeys(("done", "failed", "running", "waiting"), 0)
        for state in self.cells:
            if state.failed:
                counts["failed"] += 1
            elif state.done >= state.wanted:
                counts["done"] += 1
            elif state.cell.key in running:
                counts["running"] += 1
            else:
                counts["waiting"] += 1
        return counts

    def cost_left(self) -> float:
        """Expected cost of all that is not ended, running tasks counted half."""
        ended = self.done | self.failed
        left = sum(self.cost(task) for task in self.shared.values() if task.key not in ended)
        for state in self.cells:
            open_trials = state.wanted - state.done - state.failed
            left += open_trials * self._cell_cost[state.cell.key]
        return left - 0.5 * sum(self.cost(task) for task in self.running.values())


def _trial(cell: Cell, number: int, weights: dict[str, float], needs: tuple[str, ...]) -> Task:
    key = trial_key(cell, number=number, weights=weights)
    return Task(key=key, kind="trial", cell=cell, number=number, weights=weights, needs=needs)


def shared_tasks(cells: Iterable[Cell]) -> dict[str, Task]:
    """The parents and cost tables that the cells need, each once, by key."""
    tasks: dict[str, Task] = {}
    for cell in cells:
        baseline = cell.baseline_key
        tasks.setdefault(baseline, Task(key=baseline, kind="baseline", cell=cell))
        importance = cell.importance_key
        if importance is not None:
            tasks.setdefault(importance, Task(key=importance, kind="importance", cell=cell, needs=(baseline,)))
    return tasks


def trials_wanted(cell: Cell, search: SearchConfig) -> int:
    """Trials of a cell: one, or as many as the search has where weights are free."""
    return search.trials_per_cell if cell.point.free_weights else 1


def plan_sweep(space: SearchSpace, study: Study, cost: Callable[[Task], float]) -> SweepState:
    """The state of a sweep of which nothing is done."""
    cells = expand_cells(space)
    states = [
        _CellState(
            cell=cell,
            wanted=trials_wanted(cell, space.search),
            needs=tuple(key for key in (cell.baseline_key, cell.importance_key) if key is not None),
        )
        for cell in cells
    ]
    return SweepState(
        cells=states,
        shared=shared_tasks(cells),
        study=study,
        cost=cost,
        max_attempts=space.resources.max_attempts,
    )
