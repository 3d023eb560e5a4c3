"""What runs next: a state machine over the tasks of a sweep.

Pure Python: no Ray, no clock, no files, no Optuna. ``driver.py`` asks it for tasks and tells it how they ended.
Telling the same thing twice changes nothing.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fqsweep.cells import Cell, expand_cells, searched_cell, trial_key
from fqsweep.config import SearchConfig, SearchSpace
from fqsweep.engine.stopping import Curve, set_bars
from fqsweep.engine.tasks import Task


class Study(Protocol):
    """Where the values of free weights come from."""

    def ask(self, cell: Cell) -> tuple[int, dict[str, float]]:
        """Number and values of the cell's next trial; a trial that was asked for and never told comes again."""
        ...

    def tell(self, cell: Cell, number: int, metrics: Mapping[str, float]) -> None:
        """The metrics of a finished trial; telling twice changes nothing."""
        ...

    def prune(self, cell: Cell, number: int) -> None:
        """The trial was stopped early."""
        ...

    def give_up(self, cell: Cell, number: int) -> None:
        """The trial failed for good."""
        ...

    def chosen(self, cell: Cell) -> dict[str, float] | None:
        """The weights of the cell's trial that is best on validation data, None where no trial ended whole."""
        ...


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A task that failed for good; ``blocked`` names what could not run because of it."""

    task: Task
    reason: str
    blocked: tuple[str, ...]


@dataclass
class CellState:
    """How far a cell is: trials wanted, handed out, ended (``pruned`` ones are among ``done``).

    Attributes:
        repeats: key of the cell whose chosen weights this one takes once its search is over; None for all others.
        curves: of its ended trials, for the bars of those that are still to start.
    """

    cell: Cell
    wanted: int
    needs: tuple[str, ...]
    repeats: str | None = None
    asked: int = 0
    done: int = 0
    failed: int = 0
    pruned: int = 0
    curves: list[Curve] = field(default_factory=list)

    @property
    def open(self) -> bool:
        return self.asked < self.wanted

    @property
    def ended(self) -> bool:
        return self.done + self.failed >= self.wanted

    @property
    def key(self) -> str:
        return self.cell.key


Waiting = Task | CellState  # a shared task, or a cell with trials to hand out


def anything(_task: Task) -> bool:
    """Every task fits."""
    return True


@dataclass
class SweepState:
    """What is done, running and ready.

    Build with ``plan_sweep``. Invariants: a task is handed out when everything it needs is done, and at most once
    unless it was lost; a trial whose parent failed is never handed out.

    Order: the longest chain of work that begins with a task goes first (parents and cost tables carry what waits for
    them), so that the sweep ends soon after its work divided by its slots. Trials of a cell take turns with those of
    other cells: what the first of them shows is then known when the next one starts, to its study and to the bars
    that stop it early. With ``by_shape`` tasks that take the same share of a GPU stay together.

    Attributes:
        cost: expected cost of a task, in any unit.
        max_attempts: how often a task is tried when its worker dies.
        spared: of a task's attempts, those that do not count.
    """

    cells: list[CellState]
    shared: dict[str, Task]
    study: Study
    cost: Callable[[Task], float]
    search: SearchConfig
    max_attempts: int = 3
    by_shape: bool = False
    done: set[str] = field(default_factory=set)
    running: dict[str, Task] = field(default_factory=dict)
    lost: list[Task] = field(default_factory=list)
    attempts: Counter[str] = field(default_factory=Counter)
    spared: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)
    failed: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Rank everything by the longest chain of work that begins with it, and queue what needs nothing."""
        self._by_key = {state.key: state for state in self.cells}
        self._cost = {state.key: self.cost(self._task_of(state)) for state in self.cells}
        self._cost |= {key: self.cost(task) for key, task in self.shared.items()}
        self._waiters: dict[str, list[Waiting]] = defaultdict(list)
        items: list[Waiting] = [*self.shared.values(), *self.cells]
        for item in items:
            for key in item.needs:
                self._waiters[key].append(item)
        self._repeats: dict[str, list[CellState]] = defaultdict(list)
        for state in self.cells:
            if state.repeats is not None:
                self._repeats[state.repeats].append(state)
        self._rank = dict(self._cost)
        for task in sorted(self.shared.values(), key=lambda task: -len(task.needs)):
            self._rank[task.key] += max((self._rank[w.key] for w in self._waiters[task.key]), default=0.0)
        self._place = {item.key: place for place, item in enumerate(items)}
        self._first_of_shape: dict[tuple[str, ...], float] = {}
        for item in items:
            shape = self._shape(item)
            self._first_of_shape[shape] = max(self._rank[item.key], self._first_of_shape.get(shape, 0.0))
        # Of each shape: (trials handed out before, -rank, place, item).
        self._ready: dict[tuple[str, ...], list[tuple[int, float, int, Waiting]]] = {}
        for item in items:
            self._queue_if_ready(item)

    def _shape(self, item: Waiting) -> tuple[str, ...]:
        return self._task_of(item).shape if self.by_shape else ()

    def _task_of(self, item: Waiting) -> Task:
        """A shared task, or what stands for the trials of a cell: the first of them, its weights not known yet."""
        return item if isinstance(item, Task) else _trial(item.cell, 0, {}, item.needs)

    def _queue_if_ready(self, item: Waiting) -> None:
        is_searched = not isinstance(item, CellState) or self.weights_to_repeat(item) is not None
        if is_searched and all(key in self.done for key in item.needs):
            heap = self._ready.setdefault(self._shape(item), [])
            heapq.heappush(heap, (0, -self._rank[item.key], self._place[item.key], item))

    # --- asking ---

    def next_task(self, fits: Callable[[Task], bool] = anything) -> Task | None:
        """The next task to start, None if nothing is ready now.

        Args:
            fits: whether there is room for a task now; what does not fit is passed over.
        """
        task = self._next_lost(fits) or self._next_ready(fits)
        if task is None:
            return None
        self.attempts[task.key] += 1
        task = task.model_copy(update={"attempt": self.attempts[task.key]})
        self.running[task.key] = task
        return task

    def _next_lost(self, fits: Callable[[Task], bool]) -> Task | None:
        for place, task in enumerate(self.lost):
            if fits(task):
                return self.lost.pop(place)
        return None

    def _next_ready(self, fits: Callable[[Task], bool]) -> Task | None:
        for item in self._heads():
            if fits(self._task_of(item)):
                return item if isinstance(item, Task) else self._ask(item)
        return None

    def _heads(self) -> Iterator[Waiting]:
        """The first ready item of each shape, the shapes by their dearest item."""
        for shape in sorted(self._ready, key=lambda shape: -self._first_of_shape[shape]):
            heap = self._ready[shape]
            while heap and not self._is_first(heap[0]):
                _, rank, place, item = heapq.heappop(heap)
                if isinstance(item, CellState) and item.open:
                    heapq.heappush(heap, (item.asked, rank, place, item))
            if heap:
                yield heap[0][3]

    def _is_first(self, entry: tuple[int, float, int, Waiting]) -> bool:
        """Whether the head of a heap can be handed out, and in its turn."""
        turn, _, _, item = entry
        return self._is_open(item) and (isinstance(item, Task) or turn >= item.asked)

    def _is_open(self, item: Waiting) -> bool:
        if isinstance(item, CellState):
            return item.open
        return item.key not in self.done and item.key not in self.failed and self.attempts[item.key] == 0

    def _ask(self, state: CellState) -> Task:
        state.asked += 1
        if not state.cell.point.free_weights:
            return self._task_of(state)
        if state.repeats is not None:
            return _trial(state.cell, 0, self.weights_to_repeat(state) or {}, state.needs)
        number, weights = self.study.ask(state.cell)
        bars = set_bars(state.curves, rule=self.search.early_stopping, objectives=self.search.objectives)
        return _trial(state.cell, number, weights, state.needs).model_copy(update={"bars": bars})

    def weights_to_repeat(self, state: CellState) -> dict[str, float] | None:
        """What the search that this cell repeats has chosen: None before it is over, nothing where there is none."""
        if state.repeats is None:
            return {}
        source = self._by_key[state.repeats]
        return self.study.chosen(source.cell) if source.ended else None

    # --- telling ---

    def complete(
        self, task: Task, metrics: Mapping[str, float] | None = None, curve: Curve | None = None
    ) -> None:
        """A task is done, or was stopped early (its curve is not whole); a study learns of its free weights."""
        self.running.pop(task.key, None)
        if task.key in self.done or task.key in self.failed:
            return
        self.lost = [other for other in self.lost if other.key != task.key]
        self.done.add(task.key)
        if task.kind == "trial":
            self._count(self._by_key[task.cell.key], task, metrics, curve)
            return
        for waiter in self._waiters[task.key]:
            self._queue_if_ready(waiter)

    def _count(
        self, state: CellState, task: Task, metrics: Mapping[str, float] | None, curve: Curve | None
    ) -> None:
        state.done += 1
        pruned = curve is not None and not curve.whole
        state.pruned += pruned
        if not task.weights or state.repeats is not None:
            return
        if not state.open:
            state.curves.clear()
        elif curve is not None and self.search.early_stopping != "none":
            state.curves.append(curve.of(self.search.objectives))
        if pruned:
            self.study.prune(task.cell, task.number)
        elif metrics is not None:
            self.study.tell(task.cell, task.number, metrics)
        self._start_repeats(state)

    def _start_repeats(self, state: CellState) -> tuple[str, ...]:
        """What waits for this cell's search comes next, if it is over; names what can never run instead."""
        if not state.ended:
            return ()
        blocked = []
        for repeat in self._repeats[state.key]:
            if self.weights_to_repeat(repeat) is not None:
                self._queue_if_ready(repeat)
            elif repeat.open:
                repeat.failed, repeat.asked = repeat.wanted, repeat.wanted
                blocked.append(repeat.cell.title)
        return tuple(blocked)

    def adopt(self, task: Task, metrics: Mapping[str, float], curve: Curve | None = None) -> None:
        """A trial that an earlier start finished: it counts as asked for and done."""
        if task.key not in self.done and task.key not in self.failed:
            self._by_key[task.cell.key].asked += 1
            self.complete(task, metrics, curve)

    def adopt_failure(self, task: Task, reason: str) -> None:
        """A task that failed for good at an earlier start and was not cleared since."""
        if task.key in self.done or task.key in self.failed:
            return
        if task.kind == "trial":
            self._by_key[task.cell.key].asked += 1
        self._give_up(task, reason)

    def lose(self, task: Task, *, counts: bool = True) -> bool:
        """The attempt failed: the task comes again, unless it has been tried ``max_attempts`` times.

        Args:
            counts: whether this attempt is one of them.

        Returns:
            whether it comes again; if not, it is still to be failed.
        """
        self.spared[task.key] += not counts
        if self.attempts[task.key] - self.spared[task.key] >= self.max_attempts:
            return False
        if self.running.pop(task.key, None) is not None:
            self.lost.append(task)
        return True

    def fail(self, task: Task, reason: str) -> None:
        """The task itself failed: trying again would fail again."""
        if self.running.pop(task.key, None) is not None:
            self._give_up(task, reason)

    def _give_up(self, task: Task, reason: str) -> None:
        self.failed.add(task.key)
        if task.kind == "trial":
            state = self._by_key[task.cell.key]
            state.failed += 1
            if not state.open:
                state.curves.clear()
            if task.weights and state.repeats is None:
                self.study.give_up(task.cell, task.number)
            self.failures.append(Failure(task=task, reason=reason, blocked=self._start_repeats(state)))
            return
        # Whatever needs a failed shared task, directly or through another, cannot run.
        self.failed |= {w.key for w in self._waiters[task.key] if isinstance(w, Task)}
        blocked = [state for state in self.cells if state.open and self.failed & set(state.needs)]
        for state in blocked:
            state.failed += state.wanted - state.asked
            state.asked = state.wanted
        titles = [state.cell.title for state in blocked]
        titles += [title for state in blocked for title in self._start_repeats(state)]
        self.failures.append(Failure(task=task, reason=reason, blocked=tuple(titles)))

    def skip_unneeded(self) -> None:
        """Count parents and cost tables as done that nothing waits for: all their cells have ended before."""
        needed = {key for state in self.cells if not state.ended for key in state.needs}
        needed |= {key for task in self.shared.values() if task.key in needed for key in task.needs}
        for key, task in self.shared.items():
            if key not in needed:
                self.complete(task)

    # --- looking ---

    @property
    def finished(self) -> bool:
        """Nothing runs and nothing can run any more."""
        if self.running or self.lost:
            return False
        if any(key not in self.done and key not in self.failed for key in self.shared):
            return False
        return not any(state.open for state in self.cells)

    def counts(self, *, num_slots: int | None = None) -> dict[str, int]:
        """Cells by state: done, failed, running, waiting.

        Args:
            num_slots: how many tasks run at the same time; what was handed out beyond them waits for its turn.
        """
        running = {task.cell.key for task in list(self.running.values())[:num_slots] if task.kind == "trial"}
        counts = dict.fromkeys(("done", "failed", "running", "waiting"), 0)
        for state in self.cells:
            counts[cell_stage(state.wanted, state.done, state.failed, running=state.key in running)] += 1
        return counts

    def expected(self, key: str) -> float:
        """Expected cost of a shared task, or of one trial of a cell."""
        return self._cost[key]

    def cost_left(self) -> float:
        """Expected cost of all that is not ended, running tasks counted half."""
        ended = self.done | self.failed
        left = sum(self._cost[key] for key in self.shared if key not in ended)
        for state in self.cells:
            left += max(0, state.wanted - state.done - state.failed) * self._cost[state.key]
        running = list(self.running.values())
        return left - 0.5 * sum(self._cost[t.cell.key if t.kind == "trial" else t.key] for t in running)


def cell_stage(wanted: int, done: int, failed: int, *, running: bool) -> str:
    """``failed`` where any trial failed, else ``done``, ``running`` or ``waiting``."""
    if failed:
        return "failed"
    if done >= wanted:
        return "done"
    return "running" if running else "waiting"


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
    """Trials of a cell: one, or as many as the search has where weights are free and searched in its seed."""
    return search.trials_per_cell if cell.point.free_weights and cell.seed not in search.repeat_seeds else 1


def plan_sweep(
    space: SearchSpace, study: Study, cost: Callable[[Task], float], *, cells: Sequence[Cell] | None = None
) -> SweepState:
    """The state of a sweep of which nothing is done; ``cells``: the space's, where they are at hand."""
    cells = expand_cells(space) if cells is None else cells
    states = []
    for cell in cells:
        source = searched_cell(space, cell)
        states.append(
            CellState(
                cell=cell,
                wanted=trials_wanted(cell, space.search),
                needs=tuple(key for key in (cell.baseline_key, cell.importance_key) if key is not None),
                repeats=None if source is None else source.key,
            )
        )
    return SweepState(
        cells=states,
        shared=shared_tasks(cells),
        study=study,
        cost=cost,
        search=space.search,
        max_attempts=space.resources.max_attempts,
        by_shape=space.resources.gpus_per_trial == "auto",
    )
