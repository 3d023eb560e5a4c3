"""Optuna's studies on a real journal."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import optuna
import optuna_dashboard
import pytest
from optuna.storages.journal import JournalFileSymlinkLock

from fqsweep.cells import Cell, expand_cells, trial_key
from fqsweep.config import SearchConfig, SearchSpace
from fqsweep.engine.search import trials_wanted
from fqsweep.engine.studies import OptunaStudies
from tests.small_spaces import METRICS, small_space


def searched_cell(space: SearchSpace) -> Cell:
    return next(cell for cell in expand_cells(space) if cell.point.free_weights)


def test_only_cells_with_free_weights_have_more_than_one_trial(tmp_path: Path) -> None:
    space = small_space(tmp_path)
    assert {trials_wanted(cell, space.search) for cell in expand_cells(space) if cell.point.free_weights} == {2}
    assert {trials_wanted(c, space.search) for c in expand_cells(space) if not c.point.free_weights} == {1}


def test_the_first_trial_has_the_start_values_and_all_lie_in_their_range(tmp_path: Path) -> None:
    space = small_space(tmp_path)
    studies = OptunaStudies(space.search, tmp_path / "journal")
    asked = [studies.ask(searched_cell(space)) for _ in range(6)]
    assert asked[0] == (0, {"fairness_weight": 0.25})
    assert [number for number, _ in asked] == list(range(6))
    assert len({weights["fairness_weight"] for _, weights in asked}) == 6
    assert all(0 <= weights["fairness_weight"] <= 1 for _, weights in asked)


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_a_driver_that_starts_again_gets_the_running_trials_again(tmp_path: Path, sampler: str) -> None:
    space = small_space(tmp_path, ("{trials_per_cell: 2}", f"{{trials_per_cell: 2, sampler: {sampler}}}"))
    cell = searched_cell(space)
    first = OptunaStudies(space.search, tmp_path / "journal")
    asked = [first.ask(cell) for _ in range(3)]
    first.tell(cell, 1, METRICS)
    second = OptunaStudies(space.search, tmp_path / "journal")
    assert second.asked_before(cell) == asked
    assert [second.ask(cell), second.ask(cell)] == [asked[0], asked[2]]
    number, weights = second.ask(cell)
    assert number == 3 and weights not in [known for _, known in asked]


def test_telling_a_study_twice_changes_nothing(tmp_path: Path) -> None:
    space = small_space(tmp_path)
    cell = searched_cell(space)
    studies = OptunaStudies(space.search, tmp_path / "journal")
    for _ in range(2):
        studies.ask(cell)
    studies.tell(cell, 0, METRICS)
    studies.tell(cell, 0, dict.fromkeys(METRICS, 0.0))
    studies.give_up(cell, 0)
    studies.give_up(cell, 1)
    studies.tell(cell, 1, METRICS)
    trials = studies._study(cell).get_trials()
    assert [trial.state.name for trial in trials] == ["COMPLETE", "FAIL"]
    assert trials[0].values == [0.5, 1.0]
    assert [number for number, _ in studies.asked_before(cell)] == [0, 1]


def test_the_objectives_have_the_directions_of_their_metrics(tmp_path: Path) -> None:
    space = small_space(tmp_path)
    study = OptunaStudies(space.search, tmp_path / "journal")._study(searched_cell(space))
    assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MINIMIZE"]


def test_the_same_start_gives_the_same_values_and_another_seed_others(tmp_path: Path) -> None:
    space = small_space(tmp_path)
    cell = searched_cell(space)

    def values(config: SearchConfig, journal: str) -> list[dict[str, float]]:
        studies = OptunaStudies(config, tmp_path / journal)
        return [studies.ask(cell)[1] for _ in range(4)]

    plain = values(space.search, "a")
    assert values(space.search, "b") == plain
    assert values(space.search.model_copy(update={"seed": 1}), "c")[1:] != plain[1:]


def test_a_trial_whose_driver_died_before_its_values_were_drawn_gets_them_when_it_comes_again(
    tmp_path: Path,
) -> None:
    space = small_space(tmp_path)
    cell = searched_cell(space)
    OptunaStudies(space.search, tmp_path / "journal")._study(cell).ask()
    number, weights = OptunaStudies(space.search, tmp_path / "journal").ask(cell)
    assert (number, weights) == (0, {"fairness_weight": 0.25})


def test_a_new_label_finds_the_study_of_the_same_cell(tmp_path: Path) -> None:
    space = small_space(tmp_path)
    renamed = small_space(tmp_path, ("  - method: static\n", "  - method: static\n    label: mine\n"))
    asked = OptunaStudies(space.search, tmp_path / "journal").ask(searched_cell(space))
    assert searched_cell(renamed).title != searched_cell(space).title
    assert OptunaStudies(space.search, tmp_path / "journal").asked_before(searched_cell(renamed)) == [asked]


def test_other_objectives_have_a_study_of_their_own_with_their_directions(tmp_path: Path) -> None:
    space = small_space(tmp_path)
    cell = searched_cell(space)
    OptunaStudies(space.search, tmp_path / "journal").ask(cell)
    swapped = space.search.model_copy(update={"objectives": ("bits/mean_weight", "val/acc_worst")})
    for _ in range(2):
        studies = OptunaStudies(swapped, tmp_path / "journal")
        number, _ = studies.ask(cell)
        studies.tell(cell, number, METRICS)
        assert [direction.name for direction in studies._study(cell).directions] == ["MINIMIZE", "MAXIMIZE"]
    assert [trial.values for trial in studies._study(cell).get_trials()] == [[1.0, 0.5], [1.0, 0.5]]
    assert len(OptunaStudies(space.search, tmp_path / "journal").asked_before(cell)) == 1


def test_a_driver_that_dies_while_it_makes_a_study_leaves_the_start_values_to_the_next(tmp_path: Path) -> None:
    space = small_space(tmp_path)
    cell = searched_cell(space)
    studies = OptunaStudies(space.search, tmp_path / "journal")
    name = f"{cell.title} by {', '.join(space.search.objectives)} [{cell.key}]"
    optuna.create_study(study_name=name, storage=studies.storage, directions=["maximize", "minimize"])
    assert OptunaStudies(space.search, tmp_path / "journal").ask(cell) == (0, {"fairness_weight": 0.25})


def test_a_journal_cut_short_by_a_crash_goes_on(tmp_path: Path) -> None:
    space = small_space(tmp_path)
    cell = searched_cell(space)
    first = OptunaStudies(space.search, tmp_path / "journal")
    first.ask(cell)
    first.tell(cell, 0, METRICS)
    journal = tmp_path / "journal"
    whole = journal.read_bytes()
    journal.write_bytes(whole[: len(whole) - 7])
    again = OptunaStudies(space.search, journal)
    number, _ = again.ask(cell)
    assert number == 0, "what was told last is lost with its line, and the trial comes again"
    again.tell(cell, number, METRICS)
    third = OptunaStudies(space.search, journal)
    assert [trial.state.name for trial in third._study(cell).get_trials()] == ["COMPLETE"]


def test_a_lock_that_a_killed_driver_left_is_not_waited_for(tmp_path: Path) -> None:
    space = small_space(tmp_path)
    cell = searched_cell(space)
    journal = tmp_path / "journal"
    first = OptunaStudies(space.search, journal)
    asked = first.ask(cell)
    assert JournalFileSymlinkLock(str(journal)).acquire()
    start = time.monotonic()
    second = OptunaStudies(space.search, journal)
    assert second.ask(cell) == asked
    second.tell(cell, asked[0], METRICS)
    assert time.monotonic() - start < 10, "Optuna waits 30 s"
    assert not list(tmp_path.glob("journal.lock*"))


def test_a_neighbouring_budget_gives_its_best_weights_to_the_next_study_once(tmp_path: Path) -> None:
    space = small_space(tmp_path)
    one, three = [c for c in expand_cells(space) if c.point.free_weights and c.seed == 0]
    studies = OptunaStudies(space.search, tmp_path / "journal", cells=expand_cells(space))
    worths = {0: 0.3, 1: 0.8, 2: 0.5}
    asked = [studies.ask(one) for _ in worths]
    for number, worth in worths.items():
        studies.tell(one, number, {**METRICS, "val/acc_worst": worth})
    assert [studies.ask(three)[1], studies.ask(three)[1]] == [{"fairness_weight": 0.25}, asked[1][1]]
    again = OptunaStudies(space.search, tmp_path / "journal", cells=expand_cells(space))
    again.tell(three, 0, METRICS)
    again.tell(three, 1, METRICS)
    assert again.ask(three)[1] not in (asked[1][1], {"fairness_weight": 0.25})


def test_nothing_is_held_for_cells_whose_trials_have_ended(tmp_path: Path) -> None:
    space = small_space(tmp_path)
    studies = OptunaStudies(space.search, tmp_path / "journal")
    cell = searched_cell(space)
    for _ in range(space.search.trials_per_cell):
        number, _weights = studies.ask(cell)
        studies.tell(cell, number, METRICS)
    assert studies.chosen(cell) is not None
    assert studies.asked_before(cell)
    assert not studies.studies


def test_the_weights_that_are_repeated_are_those_that_the_report_chooses(tmp_path: Path) -> None:
    config = SearchConfig(objectives=("val/acc_gap", "val/auc_worst"))
    cell = searched_cell(small_space(tmp_path))
    studies = OptunaStudies(config, tmp_path / "journal")
    asked = [studies.ask(cell)[1] for _ in range(2)]
    studies.tell(cell, 0, {"val/acc_gap": 0.01, "val/auc_worst": 0.6})
    studies.tell(cell, 1, {"val/acc_gap": 0.05, "val/auc_worst": 0.9})
    assert studies.chosen(cell) == asked[1]


@pytest.mark.parametrize("bits", [(1.0, 1.0, 1.0), (1.0, 0.9, 0.9)])
def test_of_equals_the_one_is_repeated_that_the_report_shows(tmp_path: Path, bits: tuple[float, ...]) -> None:
    space = small_space(tmp_path)
    cell = searched_cell(space)
    studies = OptunaStudies(space.search, tmp_path / "journal")
    asked = [studies.ask(cell)[1] for _ in bits]
    for number, mean_bits in enumerate(bits):
        studies.tell(cell, number, {**METRICS, "bits/mean_weight": mean_bits})
    keys = [trial_key(cell, number=number, weights=weights) for number, weights in enumerate(asked)]
    shown = min(range(len(bits)), key=lambda number: (bits[number], keys[number]))
    assert studies.chosen(cell) == asked[shown]


def test_the_values_of_a_trial_that_failed_come_again_once(tmp_path: Path) -> None:
    space = small_space(tmp_path)
    cell = searched_cell(space)
    studies = OptunaStudies(space.search, tmp_path / "journal")
    asked = [studies.ask(cell) for _ in range(3)]
    studies.tell(cell, 0, METRICS)
    studies.give_up(cell, 1)
    again = OptunaStudies(space.search, tmp_path / "journal")
    assert [again.try_again(cell, number) for number, _ in asked] == [False, True, False]
    assert again.try_again(cell, 1), "a driver that starts once more asks once more"
    assert again.ask(cell) == asked[2], "what was running comes first"
    assert again.ask(cell) == (3, asked[1][1])
    assert again.ask(cell)[1] not in [weights for _, weights in asked]


def test_weights_of_another_seed_are_no_neighbours(tmp_path: Path) -> None:
    space = small_space(tmp_path)
    first, second = [c for c in expand_cells(space) if c.point.free_weights and c.budget_bits == 1]
    studies = OptunaStudies(space.search, tmp_path / "journal", cells=expand_cells(space))
    asked = [studies.ask(first) for _ in range(2)]
    for number, _ in asked:
        studies.tell(first, number, {**METRICS, "val/acc_worst": float(number)})
    studies.ask(second)
    assert studies.ask(second)[1] != asked[1][1]


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_trials_that_were_stopped_early_are_known_to_the_study_and_harm_no_sampler(
    tmp_path: Path, sampler: str
) -> None:
    space = small_space(tmp_path, ("{trials_per_cell: 2}", f"{{trials_per_cell: 2, sampler: {sampler}}}"))
    cell = searched_cell(space)
    studies = OptunaStudies(space.search, tmp_path / "journal")
    for _ in range(12):
        number, _ = studies.ask(cell)
        if number % 2:
            studies.prune(cell, number)
        else:
            studies.tell(cell, number, {**METRICS, "val/acc_worst": 0.1 * number})
    states = [trial.state.name for trial in studies._study(cell).get_trials()]
    assert states == ["COMPLETE", "PRUNED"] * 6
    assert len(studies.asked_before(cell)) == 12


def test_opening_the_journal_again_lists_the_studies_once_however_many_cells_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = small_space(tmp_path, ("seeds: [0, 1]", f"seeds: {list(range(20))}"))
    searched = [cell for cell in expand_cells(space) if cell.point.free_weights]
    first = OptunaStudies(space.search, tmp_path / "journal")
    for cell in searched:
        first.ask(cell)
    second = OptunaStudies(space.search, tmp_path / "journal")
    monkeypatch.setattr(second.storage, "get_all_studies", lambda: pytest.fail("listed again"))
    assert all(len(second.asked_before(cell)) == 1 for cell in searched)


def test_optuna_dashboard_shows_the_journal(tmp_path: Path) -> None:
    space = small_space(tmp_path)
    cell = searched_cell(space)
    studies = OptunaStudies(space.search, tmp_path / "journal")
    for number, accuracy in enumerate((0.5, 0.75)):
        studies.ask(cell)
        studies.tell(cell, number, {**METRICS, "val/acc_worst": accuracy})
    app = optuna_dashboard.wsgi(str(tmp_path / "journal"))

    def ask(path: str) -> Any:
        environment: dict[str, Any] = {"PATH_INFO": path, "HTTP_HOST": "127.0.0.1", "QUERY_STRING": "after=0"}
        setup_testing_defaults(environment)
        statuses: list[str] = []
        body = b"".join(app(environment, lambda status, *_: statuses.append(status)))
        assert statuses[0].startswith("200"), (statuses, body)
        return json.loads(body)

    (shown,) = ask("/api/studies")["study_summaries"]
    assert cell.title in shown["study_name"] and shown["directions"] == ["maximize", "minimize"]
    trials = ask(f"/api/studies/{shown['study_id']}")["trials"]
    assert [(trial["state"], trial["values"]) for trial in trials] == [
        ("Complete", [0.5, 1.0]),
        ("Complete", [0.75, 1.0]),
    ]


def test_budgets_in_bytes_are_neighbours_of_each_other(tmp_path: Path) -> None:
    space = small_space(tmp_path, ("budgets_bits: [1, 3]", "budgets_bits: [1]\nbudgets_bytes: [40000, 60000]"))
    cells = [c for c in expand_cells(space) if c.point.free_weights and c.seed == 0]
    of_bits, small, large = cells
    studies = OptunaStudies(space.search, tmp_path / "journal", cells=expand_cells(space))
    for cell in (of_bits, small):
        for worth in (0.3, 0.8):
            number, _ = studies.ask(cell)
            studies.tell(cell, number, {**METRICS, "val/acc_worst": worth})
    best = [studies.chosen(small), studies.chosen(of_bits)]
    assert best[0] != best[1]
    assert [studies.ask(large)[1], studies.ask(large)[1]] == [{"fairness_weight": 0.25}, best[0]]
