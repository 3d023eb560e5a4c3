"""The state machine in a simulation with a virtual clock, and a study that needs no Optuna."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Mapping

from fqsweep.cells import Cell
from fqsweep.engine.search import SweepState
from fqsweep.engine.tasks import Task
from tests.small_spaces import METRICS

MANY = (
    ("seeds: [0, 1]", "seeds: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]"),
    ("architectures: [test_resnet]", "architectures: [test_resnet, resnet18]"),
    ("budgets_bits: [1, 3]", "budgets_bits: [1, 2, 3, 4, 5, 6]"),
    ("    fairness_weight: {low: 0.0, high: 1.0, start: 0.25}\n", ""),
    ("    bits: [4]", "    bits: [3, 4]"),
)


class FakeStudy:
    """Numbers trials as they are asked for; remembers what it was told."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.told: list[tuple[str, int]] = []
        self.given_up: list[tuple[str, int]] = []
        self.pruned: list[tuple[str, int]] = []

    def ask(self, cell: Cell) -> tuple[int, dict[str, float]]:
        number = self.asked[cell.key]
        self.asked[cell.key] += 1
        return number, {name: float(number) for name in cell.point.free_weights}

    def tell(self, cell: Cell, number: int, metrics: Mapping[str, float]) -> None:
        self.told.append((cell.key, number))

    def chosen(self, cell: Cell) -> dict[str, float] | None:
        told = [number for key, number in self.told if key == cell.key]
        return {name: float(told[-1]) for name in cell.point.free_weights} if told else None

    def prune(self, cell: Cell, number: int) -> None:
        self.pruned.append((cell.key, number))

    def give_up(self, cell: Cell, number: int) -> None:
        self.given_up.append((cell.key, number))


def one_each(_task: Task) -> float:
    return 1.0


def simulate(
    state: SweepState,
    *,
    slots: int,
    duration: Callable[[Task], float],
    ends: Callable[[Task, int], str] = lambda _task, _attempt: "done",
) -> tuple[float, list[tuple[float, float, Task]]]:
    """Run a sweep on a virtual clock; ``ends`` says how each attempt ends.

    Returns:
        the makespan, and (start, end, task) of every attempt. Checks on the way that a task starts after
        what it needs, that no task runs twice at once, and that nothing that is done runs again.
    """
    now, order = 0.0, 0
    busy: list[tuple[float, int, Task]] = []
    log: list[tuple[float, float, Task]] = []
    done: set[str] = set()
    attempts: Counter[str] = Counter()
    while True:
        while len(busy) < slots and (task := state.next_task()) is not None:
            assert set(task.needs) <= done, f"{task.title} starts before what it needs"
            assert task.key not in done, f"{task.title} runs again"
            assert task.key not in {other.key for _, _, other in busy}, f"{task.title} runs twice at once"
            attempts[task.key] += 1
            order += 1
            end = now + duration(task)
            heapq.heappush(busy, (end, order, task))
            log.append((now, end, task))
        if not busy:
            assert state.finished, "nothing runs, nothing is ready and the sweep does not end"
            return now, log
        assert not state.finished
        now, _, task = heapq.heappop(busy)
        outcome = ends(task, attempts[task.key])
        if outcome == "done":
            done.add(task.key)
            state.complete(task, METRICS)
        elif outcome == "lost":
            if not state.lose(task):
                state.fail(task, "its worker died")
        else:
            state.fail(task, outcome)
