"""The state machine by simulation on a virtual clock."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from fqsweep.cells import expand_cells
from fqsweep.config import Resources, SearchSpace
from fqsweep.engine.search import plan_sweep, shared_tasks
from fqsweep.engine.tasks import Task
from tests.engine.simulation import MANY, FakeStudy, one_each, simulate
from tests.small_spaces import METRICS, small_space

# --- the state machine ---------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 3, 50])
def test_every_task_runs_once_and_after_what_it_needs(tmp_path: Path, slots: int) -> None:
    space, study = small_space(tmp_path), FakeStudy()
    state = plan_sweep(space, study, one_each)
    _, log = simulate(state, slots=slots, duration=one_each)
    runs = Counter(task.key for _, _, task in log)
    assert set(runs.values()) == {1}
    # Two seeds: a parent and a cost table each; fp32, uniform, two static cells of two trials, two baq.
    assert Counter(task.kind for _, _, task in log) == {
        "baseline": 2,
        "importance": 2,
        "trial": 2 * (1 + 1 + 4 + 2),
    }
    assert state.counts() == {"done": 12, "failed": 0, "running": 0, "waiting": 0}
    assert len(study.told) == 8
    assert state.failures == []


REPEATED = ("{trials_per_cell: 2}", "{trials_per_cell: 2, repeat_seeds: [7, 8]}")


@pytest.mark.parametrize("slots", [1, 3, 50])
def test_other_seeds_repeat_what_the_first_seed_chose(tmp_path: Path, slots: int) -> None:
    study = FakeStudy()
    state = plan_sweep(small_space(tmp_path, REPEATED), study, one_each)
    _, log = simulate(state, slots=slots, duration=one_each)
    repeats = [(start, task) for start, _, task in log if task.kind == "trial" and task.cell.seed in (7, 8)]
    # Each of the two seeds: fp32, uniform, two static cells of one trial, two of baq.
    assert len(repeats) == 2 * 6
    weighted = [(start, task) for start, task in repeats if task.weights]
    assert len(weighted) == 4
    for start, task in weighted:
        searched = [
            (end, other)
            for _, end, other in log
            if other.weights and other.cell.seed == 0 and other.cell.budget_bits == task.cell.budget_bits
        ]
        assert len(searched) == 2 and start >= max(end for end, _ in searched)
        assert dict(task.weights) == study.chosen(searched[0][1].cell)
    assert len(study.told) == 8, "the study of the first seeds alone is told"
    assert state.finished and state.counts()["waiting"] == 0


def test_a_search_without_a_single_result_blocks_its_repeats_by_name(tmp_path: Path) -> None:
    state = plan_sweep(small_space(tmp_path, REPEATED), FakeStudy(), one_each)

    def ends(task: Task, _attempt: int) -> str:
        searches = task.weights and task.cell.seed == 0 and task.cell.budget_bits == 1
        return "no good" if searches else "done"

    _, log = simulate(state, slots=2, duration=one_each, ends=ends)
    blocked = [title for failure in state.failures for title in failure.blocked]
    assert sorted(blocked) == [f"synthderm/skin_tone test_resnet static@1 seed {seed}" for seed in (7, 8)]
    assert {task.cell.budget_bits for _, _, task in log if task.weights and task.cell.seed == 7} == {3}
    assert state.finished and state.counts()["failed"] == 3


def test_a_repeat_that_an_earlier_start_did_is_adopted_with_its_weights(tmp_path: Path) -> None:
    space = small_space(tmp_path, REPEATED)
    study = FakeStudy()
    first = plan_sweep(space, study, one_each)
    _, log = simulate(first, slots=2, duration=one_each)
    again = plan_sweep(space, study, one_each)
    for task in again.shared.values():
        again.complete(task)
    for cell in again.cells:
        weights = again.weights_to_repeat(cell)
        assert weights is not None, "a cell that repeats stands behind the one it repeats"
        for _, _, task in log:
            if task.kind == "trial" and task.cell.key == cell.key:
                again.adopt(task, METRICS)
    assert again.finished and again.next_task() is None


def thousand_cells(folder: Path) -> SearchSpace:
    """Two architectures of unlike cost, 25 seeds, 9 budgets: 1,000 cells and 2,350 trials."""
    return small_space(
        folder,
        ("seeds: [0, 1]", f"seeds: {list(range(25))}"),
        ("architectures: [test_resnet]", "architectures: [test_resnet, resnet18]"),
        ("budgets_bits: [1, 3]", "budgets_bits: [0.5, 1, 1.5, 2, 2.5, 3, 4, 5, 6]"),
        ("{trials_per_cell: 2}", "{trials_per_cell: 4}"),
    )


def lower_bound(log: list[tuple[float, float, Task]], slots: int) -> float:
    """No schedule can be shorter than its longest chain, nor than its work divided by its slots."""
    took = {task.key: end - start for start, end, task in log}

    def chain(task: Task) -> float:
        return sum(took[key] for key in (*task.needs, task.key))

    return max(sum(took.values()) / slots, *(chain(task) for *_, task in log))


@pytest.mark.parametrize("slots", [8, 64, 1024])
@pytest.mark.parametrize("by_shape", [False, True])
def test_1000_cells_of_mixed_length_end_within_5_percent_of_the_lower_bound(
    tmp_path: Path, slots: int, by_shape: bool
) -> None:
    space = thousand_cells(tmp_path)
    generator = random.Random(slots)
    cost = {"baseline": 20.0, "importance": 6.0, "trial": 4.0}
    slow = {"resnet18": 2.5, "test_resnet": 1.0}

    def expected(task: Task) -> float:
        return cost[task.kind] * slow[task.cell.architecture.name] * (1 + 0.1 * (task.cell.budget_bits or 0))

    if by_shape:
        space = space.model_copy(update={"resources": Resources(gpus_per_trial="auto")})
    state = plan_sweep(space, FakeStudy(), expected)
    assert len(state.cells) == 1000
    makespan, log = simulate(
        state, slots=slots, duration=lambda task: expected(task) * generator.uniform(0.8, 1.25)
    )
    assert makespan <= 1.05 * lower_bound(log, slots)


def test_tasks_of_one_shape_stay_together(tmp_path: Path) -> None:
    space = thousand_cells(tmp_path).model_copy(update={"resources": Resources(gpus_per_trial="auto")})
    _, log = simulate(plan_sweep(space, FakeStudy(), one_each), slots=1, duration=one_each)
    shapes = [task.shape for *_, task in log]
    assert len(set(shapes)) == 2 * len({"baseline", "importance", "trained", "scored"})
    assert sum(a != b for a, b in zip(shapes, shapes[1:], strict=False)) == len(set(shapes)) - 1


def test_trials_of_one_cell_take_turns_with_those_of_others(tmp_path: Path) -> None:
    space = small_space(tmp_path, ("{trials_per_cell: 2}", "{trials_per_cell: 5}"))
    state = plan_sweep(space, FakeStudy(), one_each)
    _, log = simulate(state, slots=3, duration=one_each)
    spans: dict[str, list[tuple[float, float]]] = {}
    for start, end, task in log:
        if task.weights:
            spans.setdefault(task.cell.key, []).append((start, end))
    assert sorted(len(found) for found in spans.values()) == [5, 5, 5, 5]
    for found in spans.values():
        assert all(start >= end for (_, end), (start, _) in zip(found, found[1:], strict=False))


def test_a_cell_that_is_left_alone_has_its_trials_side_by_side(tmp_path: Path) -> None:
    space = small_space(
        tmp_path,
        ("{trials_per_cell: 2}", "{trials_per_cell: 6}"),
        ("seeds: [0, 1]", "seeds: [0]"),
        ("budgets_bits: [1, 3]", "budgets_bits: [1]"),
    )
    makespan, log = simulate(plan_sweep(space, FakeStudy(), one_each), slots=9, duration=one_each)
    assert makespan == 3 and len(log) == 2 + 2 + 6 + 1


def test_what_does_not_fit_is_passed_over_and_comes_later(tmp_path: Path) -> None:
    space = small_space(tmp_path, ("[test_resnet]", "[test_resnet, resnet18]")).model_copy(
        update={"resources": Resources(gpus_per_trial="auto")}
    )
    state = plan_sweep(space, FakeStudy(), lambda t: 5.0 if t.cell.architecture.name == "resnet18" else 1.0)
    small = state.next_task(lambda task: task.cell.architecture.name == "test_resnet")
    assert small is not None and small.cell.architecture.name == "test_resnet"
    assert state.next_task(lambda task: False) is None and not state.finished
    large = state.next_task()
    assert large is not None and large.cell.architecture.name == "resnet18"


def test_what_was_handed_out_beyond_the_slots_is_not_running_yet(tmp_path: Path) -> None:
    state = plan_sweep(small_space(tmp_path), FakeStudy(), one_each)
    for task in state.shared.values():
        state.complete(task)
    assert all(state.next_task() for _ in range(4))
    assert state.counts()["running"] == 4
    assert state.counts(num_slots=3) == {"done": 0, "failed": 0, "running": 3, "waiting": 9}


def test_shared_work_is_done_once_for_all_cells(tmp_path: Path) -> None:
    cells = expand_cells(small_space(tmp_path, *MANY))
    kinds = Counter(task.kind for task in shared_tasks(cells).values())
    assert kinds == {"baseline": 20, "importance": 20}


def test_shared_tasks_are_told_apart_by_their_names(tmp_path: Path) -> None:
    more = """  - {method: static, label: a, importance: taylor}
  - {method: static, label: b, importance: taylor, granularity: tensor}
  - method: baq"""
    space = small_space(tmp_path, ("  - method: baq", more))
    titles = [task.title for task in shared_tasks(expand_cells(space)).values()]
    assert len(titles) == len(set(titles)) == 2 * 4, titles


def test_a_parent_that_fails_blocks_exactly_what_needs_it(tmp_path: Path) -> None:
    space, study = small_space(tmp_path), FakeStudy()
    state = plan_sweep(space, study, one_each)
    doomed = next(t for t in state.shared.values() if t.kind == "baseline" and t.cell.seed == 1)
    _, log = simulate(
        state,
        slots=4,
        duration=one_each,
        ends=lambda task, _n: "loss is not finite" if task.key == doomed.key else "done",
    )
    assert all(task.cell.seed == 0 for _, _, task in log if task.key != doomed.key)
    (failure,) = state.failures
    assert failure.task == doomed and failure.reason == "loss is not finite"
    assert sorted(failure.blocked) == sorted(c.title for c in expand_cells(space) if c.seed == 1)
    assert state.counts() == {"done": 6, "failed": 6, "running": 0, "waiting": 0}


def test_a_cost_table_that_fails_blocks_the_methods_that_allocate_and_no_other(tmp_path: Path) -> None:
    state = plan_sweep(small_space(tmp_path), FakeStudy(), one_each)
    doomed = next(t for t in state.shared.values() if t.kind == "importance" and t.cell.seed == 0)
    simulate(
        state, slots=2, duration=one_each, ends=lambda task, _n: "no" if task.key == doomed.key else "done"
    )
    (failure,) = state.failures
    assert {title.split()[2].split("@")[0] for title in failure.blocked} == {"static", "baq"}
    assert all(title.endswith("seed 0") for title in failure.blocked)
    assert state.counts() == {"done": 8, "failed": 4, "running": 0, "waiting": 0}


def test_a_trial_that_fails_fails_its_cell_alone(tmp_path: Path) -> None:
    study = FakeStudy()
    state = plan_sweep(small_space(tmp_path), study, one_each)
    doomed = "synthderm/skin_tone test_resnet static@3 seed 1"
    simulate(
        state,
        slots=2,
        duration=one_each,
        ends=lambda t, _n: "no" if t.kind == "trial" and t.cell.title == doomed and t.number == 0 else "done",
    )
    (failure,) = state.failures
    assert failure.task.cell.title == doomed and failure.blocked == ()
    assert study.given_up == [(failure.task.cell.key, 0)]
    assert (failure.task.cell.key, 1) in study.told
    assert state.counts() == {"done": 11, "failed": 1, "running": 0, "waiting": 0}


def test_a_lost_task_comes_again_until_it_was_tried_max_attempts_times(tmp_path: Path) -> None:
    space = small_space(tmp_path, ("search:", "resources: {max_attempts: 4}\nsearch:"))
    state = plan_sweep(space, FakeStudy(), one_each)
    unlucky = next(t for t in state.shared.values() if t.kind == "baseline")
    _, log = simulate(
        state,
        slots=3,
        duration=one_each,
        ends=lambda task, n: "lost" if task.key == unlucky.key and n < 4 else "done",
    )
    assert Counter(task.key for *_, task in log)[unlucky.key] == 4
    assert state.counts()["done"] == 12


def test_a_task_that_is_always_lost_fails_for_good(tmp_path: Path) -> None:
    state = plan_sweep(small_space(tmp_path), FakeStudy(), one_each)
    unlucky = next(t for t in state.shared.values() if t.kind == "baseline")
    _, log = simulate(
        state, slots=3, duration=one_each, ends=lambda task, _n: "lost" if task.key == unlucky.key else "done"
    )
    assert Counter(task.key for *_, task in log)[unlucky.key] == 3
    assert [failure.reason for failure in state.failures] == ["its worker died"]
    assert state.counts() == {"done": 6, "failed": 6, "running": 0, "waiting": 0}


@pytest.mark.parametrize("seed", range(5))
def test_whatever_dies_and_fails_every_cell_ends(tmp_path: Path, seed: int) -> None:
    generator = random.Random(seed)
    state = plan_sweep(small_space(tmp_path), FakeStudy(), one_each)
    simulate(
        state,
        slots=3,
        duration=lambda _task: generator.uniform(0.5, 2),
        ends=lambda _task, _n: generator.choices(["done", "lost", "no"], [6, 3, 1])[0],
    )
    counts = state.counts()
    assert counts["done"] + counts["failed"] == 12
    assert counts["running"] == counts["waiting"] == 0
    assert state.cost_left() == pytest.approx(
        sum(s.wanted - s.done - s.failed for s in state.cells)
        + sum(key not in state.done | state.failed for key in state.shared)
    )


def test_telling_twice_changes_nothing(tmp_path: Path) -> None:
    study = FakeStudy()
    state = plan_sweep(small_space(tmp_path), study, one_each)
    _, log = simulate(state, slots=1, duration=one_each)
    before = state.counts(), len(study.told), set(state.done)
    for *_, task in log:
        state.complete(task, METRICS)
        state.lose(task)
        state.fail(task, "again")
    assert (state.counts(), len(study.told), set(state.done)) == before
    assert state.finished and state.failures == []


def test_the_result_of_a_worker_that_was_thought_dead_counts_and_is_not_made_again(tmp_path: Path) -> None:
    state = plan_sweep(small_space(tmp_path), FakeStudy(), one_each)
    task = state.next_task()
    assert task is not None
    state.lose(task)
    state.complete(task)
    left = []
    while (other := state.next_task()) is not None:
        left.append(other.key)
        state.complete(other, METRICS)
    assert state.finished and task.key not in left
    assert len(left) == 2 + 2 + 16 - 1


def test_a_result_that_comes_after_the_task_was_given_up_does_not_count_twice(tmp_path: Path) -> None:
    state = plan_sweep(small_space(tmp_path), FakeStudy(), one_each)
    task = state.next_task()
    assert task is not None
    state.fail(task, "too long")
    before = state.counts()
    state.complete(task)
    assert state.counts() == before and task.key not in state.done


def test_adopted_results_are_not_made_again(tmp_path: Path) -> None:
    space = small_space(tmp_path)
    first = plan_sweep(space, FakeStudy(), one_each)
    _, log = simulate(first, slots=1, duration=one_each)
    kept = [task for *_, task in log if task.kind == "trial"][::2]
    second = plan_sweep(space, FakeStudy(), one_each)
    for task in second.shared.values():
        second.complete(task)
    for task in kept:
        second.adopt(task, METRICS)
        second.adopt(task, METRICS)
    assert sum(state.asked for state in second.cells) == len(kept)


def test_a_finished_sweep_that_is_planned_again_has_nothing_to_do(tmp_path: Path) -> None:
    space = small_space(tmp_path)
    first = plan_sweep(space, FakeStudy(), one_each)
    _, log = simulate(first, slots=2, duration=one_each)
    second = plan_sweep(space, FakeStudy(), one_each)
    for *_, task in log:
        if task.kind == "trial":
            second.adopt(task, METRICS)
        else:
            second.complete(task)
    assert second.finished and second.next_task() is None
    assert second.counts()["done"] == 12
    assert second.cost_left() == 0


def test_what_waits_for_more_work_starts_first(tmp_path: Path) -> None:
    space = small_space(tmp_path, ("[test_resnet]", "[test_resnet, resnet18]"))
    state = plan_sweep(space, FakeStudy(), lambda t: 5.0 if t.cell.architecture.name == "resnet18" else 1.0)
    started = [state.next_task() for _ in range(4)]
    assert [task.cell.architecture.name for task in started if task] == ["resnet18"] * 2 + ["test_resnet"] * 2
    assert state.next_task() is None and not state.finished


def test_the_expected_cost_left_falls_to_zero(tmp_path: Path) -> None:
    state = plan_sweep(small_space(tmp_path), FakeStudy(), one_each)
    left = [state.cost_left()]
    while (task := state.next_task()) is not None:
        left.append(state.cost_left())
        state.complete(task, METRICS)
        left.append(state.cost_left())
    assert left[0] == 20 and left[-1] == 0
    assert all(after < before for before, after in zip(left, left[1:], strict=False))


def test_an_attempt_that_does_not_count_leaves_as_many_as_there_were(tmp_path: Path) -> None:
    space = small_space(tmp_path, ("search:", "resources: {max_attempts: 1}\nsearch:"))
    state = plan_sweep(space, FakeStudy(), one_each)
    task = state.next_task()
    assert task is not None and state.lose(task, counts=False)
    again = state.next_task()
    assert again is not None and (again.key, again.attempt) == (task.key, 2)
    assert not state.lose(again)


def test_parents_and_tables_that_no_open_cell_needs_are_not_made(tmp_path: Path) -> None:
    space = small_space(tmp_path)
    state = plan_sweep(space, FakeStudy(), one_each)
    for cell_state in state.cells:
        if cell_state.cell.seed == 1 or cell_state.cell.point.method == "fp32":
            for number in range(cell_state.wanted):
                weights = {"fairness_weight": 0.1 * number} if cell_state.cell.point.free_weights else {}
                key = f"{cell_state.key}{number}"
                trial = Task(key=key, kind="trial", cell=cell_state.cell, number=number, weights=weights)
                state.adopt(trial, METRICS)
    state.skip_unneeded()
    handed_out = []
    while (task := state.next_task()) is not None:
        handed_out.append(task)
        state.complete(task, METRICS)
    assert {task.cell.seed for task in handed_out} == {0}
    assert [task.kind for task in handed_out if task.kind != "trial"] == ["baseline", "importance"]
    assert state.finished
