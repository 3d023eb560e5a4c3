"""Search spaces: what a file may say, and what makes a cell the same cell."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fqsweep import cells
from fqsweep.cells import (
    Cell,
    expand_cells,
    finetune_epochs,
    matches_moments,
    method_points,
    reconstructs,
    run_params,
    trial_key,
)
from fqsweep.config import RECIPES, Allocating, SearchSpace, content_hash
from fqsweep.errors import InputError
from fqsweep.names import METHODS, RUN_PARAMS
from fqsweep.space import SHIPPED_SPACES, find_space, load_space
from tests.small_spaces import SMALL, small_space, write_space

SHIPPED = sorted(path for folder in SHIPPED_SPACES for path in folder.glob("*.yaml"))


def cell_of(space: SearchSpace, method: str) -> Cell:
    return next(cell for cell in expand_cells(space) if cell.point.method == method)


# --- what comes with fqsweep ---------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_space_loads_and_says_its_question_and_command_first(path: Path) -> None:
    space = load_space(path)
    assert space.name == path.stem
    head = path.read_text().split("name:")[0]
    assert "?" in head
    assert f"fqsweep run search_spaces/{path.name}" in head
    assert expand_cells(space)


def test_the_demo_the_paper_and_the_real_cpu_space_are_shipped() -> None:
    assert {"demo", "paper", "isic2019_cpu"} <= {path.stem for path in SHIPPED}


def test_the_papers_grid_is_whole() -> None:
    space = load_space(find_space("paper"))
    cells = expand_cells(space)
    assert {cell.dataset.kind for cell in cells} == {"fitzpatrick17k", "isic2019"}
    assert len({cell.architecture.name for cell in cells}) == 4
    assert {cell.seed for cell in cells} == {2, 42, 107, 1337, 2026}
    assert {cell.point.method for cell in cells} == set(METHODS)
    blocks = Counter(
        (cell.dataset.name, cell.group_attribute, cell.architecture.name, cell.seed) for cell in cells
    )
    assert len(blocks) == 2 * 4 * 5
    # fp32, uniform 4 and 8 with and without fine-tuning, and seven methods at three budgets.
    assert set(blocks.values()) == {1 + 4 + 7 * 3}
    for method in set(METHODS) - {"fp32", "uniform"}:
        assert {cell.budget_bits for cell in cells if cell.point.method == method} == {4, 5, 6}
    assert len({cell.key for cell in cells}) == len(cells)
    assert len({cell.baseline_key for cell in cells}) == 2 * 4 * 5


def test_a_shipped_space_is_found_by_name_and_by_path() -> None:
    found = [find_space(name).resolve() for name in ("demo", "demo.yaml", "search_spaces/demo.yaml")]
    assert set(found) == {found[0]}
    assert found[0].name == "demo.yaml"
    with pytest.raises(
        InputError, match=r"search space 'dem': no such file; did you mean 'demo'\? .with fqsweep come: .*demo"
    ):
        find_space("dem")
    with pytest.raises(InputError, match="'mine/demo.yaml': no such file; did you mean 'demo'"):
        find_space("mine/demo.yaml")


# --- cells ---------------------------------------------------------------------------------------


def test_cells_are_the_grid_in_its_order(tmp_path: Path) -> None:
    titles = [cell.title for cell in expand_cells(small_space(tmp_path))]
    one = ["fp32", "uniform-4", "static@1", "static@3", "baq@1", "baq@3"]
    assert titles == [f"synthderm/skin_tone test_resnet {row} seed {seed}" for seed in (0, 1) for row in one]


def test_every_group_attribute_has_cells_that_share_the_parent(tmp_path: Path) -> None:
    cells = expand_cells(small_space(tmp_path, ("[skin_tone]", "[skin_tone, skin_type]")))
    assert len(cells) == 24
    assert len({cell.baseline_key for cell in cells}) == 2
    tables = {cell.importance_key for cell in cells} - {None}
    assert len(tables) == 4


def test_a_methods_own_budgets_stand_in_place_of_the_spaces(tmp_path: Path) -> None:
    space = small_space(tmp_path, ("    bitrate_weight: 0.01", "    budgets_bits: [2, 2.5, 5]"))
    assert [c.budget_bits for c in expand_cells(space) if c.point.method == "baq" and c.seed == 0] == [
        2,
        2.5,
        5,
    ]
    assert [c.budget_bits for c in expand_cells(space) if c.point.method == "static"] == [1, 3, 1, 3]


def test_uniform_has_a_row_for_each_width_and_fine_tuning(tmp_path: Path) -> None:
    space = small_space(tmp_path, ("bits: [4]", "bits: [2, 8]\n    finetune: [false, true]"))
    points = [point for point in method_points(space) if point.method == "uniform"]
    assert [point.variant for point in points] == ["uniform-2", "uniform-2-ft", "uniform-8", "uniform-8-ft"]
    cells = {cell.point.variant: cell for cell in expand_cells(space)}
    assert cells["uniform-8"].budget_bits == 8.0
    assert finetune_epochs(cells["uniform-8"]) == 0
    assert finetune_epochs(cells["uniform-8-ft"]) == 1


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_a_comparator_is_static_with_what_its_paper_fixes(tmp_path: Path, recipe: str) -> None:
    space = small_space(
        tmp_path, ("method: baq\n    bitrate_weight: 0.01", f"method: {recipe}\n    budgets_bits: [4]")
    )
    cell = cell_of(space, recipe)
    settings = cell.point.settings
    assert isinstance(settings, Allocating)
    for name, value in RECIPES[recipe].items():
        assert getattr(settings, name) == value
    assert run_params(cell, weights={})["method"] == recipe


def test_every_run_has_the_same_parameters(tmp_path: Path) -> None:
    for cell in expand_cells(small_space(tmp_path)):
        params = run_params(cell, weights={})
        assert tuple(sorted(params)) == tuple(sorted(RUN_PARAMS))
        assert all(isinstance(value, str) and value for value in params.values())


def test_what_a_method_does_not_have_is_recorded_as_none(tmp_path: Path) -> None:
    space = small_space(tmp_path)
    plain = run_params(cell_of(space, "fp32"), weights={})
    assert {plain[name] for name in ("budget_bits", "fairness_weight", "importance", "choices")} == {"none"}
    untuned = run_params(cell_of(space, "uniform"), weights={})
    no_epoch = small_space(
        tmp_path,
        (
            "method: baq\n    bitrate_weight: 0.01",
            "method: hawq\n    budgets_bits: [3]\n    finetune_epochs: 0",
        ),
    )
    assert run_params(cell_of(no_epoch, "hawq"), weights={})["fairness_weight"] == "none"
    assert (untuned["fairness_weight"], untuned["budget_bits"], untuned["finetune_epochs"]) == (
        "none",
        "4",
        "0",
    )
    assert {untuned[name] for name in ("exempt", "pin", "limits", "bit_gradient", "settle_frac")} == {"none"}
    searched = run_params(cell_of(space, "static"), weights={"fairness_weight": 0.125})
    assert (searched["fairness_weight"], searched["choices"]) == ("0.125", "0,1,2,3,4,5,6,7,8")


def test_options_of_layers_and_of_learned_bits_are_recorded(tmp_path: Path) -> None:
    options = """bitrate_weight: 0.01
    exempt: [last, "*.downsample.*"]
    pin: {first: 8, "layer1.*": 4}
    limits: {"layer4.*": {min: 1, max: 4}}
    bit_learning_rate: 0.05"""
    params = run_params(cell_of(small_space(tmp_path, ("bitrate_weight: 0.01", options)), "baq"), weights={})
    assert params["exempt"] == "last,*.downsample.*"
    assert params["pin"] == "first:8,layer1.*:4"
    assert params["limits"] == "layer4.*:1-4"
    assert (params["bit_gradient"], params["bit_learning_rate"]) == ("fracbits", "0.05")


# --- identity ------------------------------------------------------------------------------------


def test_cells_of_a_space_have_keys_of_their_own_and_the_same_each_time(tmp_path: Path) -> None:
    keys = [cell.key for cell in expand_cells(small_space(tmp_path))]
    assert len(set(keys)) == len(keys)
    assert keys == [cell.key for cell in expand_cells(small_space(tmp_path))]


SAME = {
    "label": ("  - method: static\n", "  - method: static\n    label: mine\n"),
    "name of the data set": ("kind: synthderm\n", "kind: synthderm\n    name: shown\n"),
    "name of the sweep": ("name: small", "name: other"),
    "other budgets": ("budgets_bits: [1, 3]", "budgets_bits: [1, 2, 3, 7]"),
    "other seeds": ("seeds: [0, 1]", "seeds: [0, 5]"),
    "more trials": ("trials_per_cell: 2", "trials_per_cell: 9"),
    "other resources": ("search:", "resources: {cpus_per_trial: 2}\nsearch:"),
    "defaults written out": ("recipe:\n", "recipe:\n  batch_size: 64\n"),
    "order of choices": ("  - method: static\n", "  - method: static\n    choices: [8,7,6,5,4,3,2,1,0]\n"),
}
OTHER = {
    "learning rate": ("learning_rate: 1.0e-3", "learning_rate: 1.0e-4"),
    "fine-tuning": ("finetune_epochs: 1", "finetune_epochs: 2"),
    "number of images": ("num_images: 500", "num_images: 501"),
    "image size": ("image_size: 32", "image_size: 64"),
    "architecture": ("[test_resnet]", "[resnet18]"),
    "seed": ("seeds: [0, 1]", "seeds: [7]"),
    "budget": ("budgets_bits: [1, 3]", "budgets_bits: [1.001, 3]"),
    "range of a weight": ("high: 1.0", "high: 2.0"),
    "scale": ("  - method: static\n", "  - method: static\n    scale: absmax\n"),
    "choices": ("  - method: static\n", "  - method: static\n    choices: [0, 2, 4]\n"),
    "group": ("[skin_tone]", "[skin_type]"),
    "split": ("num_images: 500\n", "num_images: 500\n    splits: {seed: 1}\n"),
}


@pytest.mark.parametrize("change", SAME.values(), ids=SAME)
def test_what_does_not_change_the_result_does_not_change_the_key(tmp_path: Path, change: Any) -> None:
    before, after = cell_of(small_space(tmp_path), "static"), cell_of(small_space(tmp_path, change), "static")
    assert after.key == before.key
    assert after.baseline_key == before.baseline_key


RECIPE_EDITS = {
    "fine-tuning": ("finetune_epochs: 1", "finetune_epochs: 2"),
    "rate of fine-tuning": ("finetune_epochs: 1", "finetune_epochs: 1\n  finetune_learning_rate: 1.0e-5"),
    "kernels": ("finetune_epochs: 1", "finetune_epochs: 1\n  quantiser_kernels: eager"),
    "calibration": ("finetune_epochs: 1", "finetune_epochs: 1\n  calibration_images: 20"),
}


@pytest.mark.parametrize("edit", RECIPE_EDITS)
def test_a_setting_of_the_recipe_is_in_the_keys_of_those_that_use_it(tmp_path: Path, edit: str) -> None:
    untrained = ("fairness_weight: {low: 0.0, high: 1.0, start: 0.25}", "finetune_epochs: 0")
    both = [small_space(tmp_path, *changes, untrained) for changes in ((), (RECIPE_EDITS[edit],))]
    changed = {
        method
        for method in ("fp32", "uniform", "static", "baq")
        if cell_of(both[0], method).key != cell_of(both[1], method).key
    }
    users = {"baq", "static", "uniform"} if edit == "calibration" else {"baq"}
    assert changed == users


def test_no_fine_tuning_by_the_recipe_is_not_taken_for_some(tmp_path: Path) -> None:
    plain = (
        "    fairness_weight: {low: 0.0, high: 1.0, start: 0.25}\n  - method: baq\n    bitrate_weight: 0.01\n",
        "",
    )
    none, some = (small_space(tmp_path, plain, ("finetune_epochs: 1", f"finetune_epochs: {n}")) for n in (0, 3))
    assert cell_of(none, "static").key != cell_of(some, "static").key


def test_how_bits_learn_changes_the_key_of_learned_bits(tmp_path: Path) -> None:
    found = set()
    for option in (
        "bit_warmup_frac: 0",
        "bit_warmup_frac: 0.2",
        "mix_temperature: 0.2",
        "mix_temperature: 0.3",
    ):
        space = small_space(tmp_path, ("bitrate_weight: 0.01", f"bitrate_weight: 0.01\n    {option}"))
        found.add(cell_of(space, "baq").key)
    assert len(found) == 4 and cell_of(small_space(tmp_path), "baq").key in found


def test_a_temperature_where_nothing_is_mixed_is_refused(tmp_path: Path) -> None:
    options = "bitrate_weight: 0.01\n    bit_gradient: lsq\n    mix_temperature: 0.5"
    with pytest.raises(InputError, match="mix_temperature is for bit_gradient fracbits: lsq mixes no grids"):
        small_space(tmp_path, ("bitrate_weight: 0.01", options))


@pytest.mark.parametrize("change", OTHER.values(), ids=OTHER)
def test_what_changes_the_result_changes_the_key(tmp_path: Path, change: Any) -> None:
    before, after = cell_of(small_space(tmp_path), "static"), cell_of(small_space(tmp_path, change), "static")
    assert after.key != before.key


def test_two_rows_that_differ_in_their_label_alone_are_one_result(tmp_path: Path) -> None:
    space = small_space(tmp_path, ("- method: uniform\n", "- method: uniform\n    label: plain\n"))
    assert cell_of(space, "uniform").point.variant == "plain-4"
    assert cell_of(space, "uniform").key == cell_of(small_space(tmp_path), "uniform").key


@pytest.mark.parametrize("change", ["fine-tuning", "budget", "range of a weight", "scale", "choices"])
def test_the_parent_does_not_depend_on_what_comes_after_it(tmp_path: Path, change: str) -> None:
    before, after = small_space(tmp_path), small_space(tmp_path, OTHER[change])
    assert cell_of(after, "static").baseline_key == cell_of(before, "static").baseline_key


@pytest.mark.parametrize("change", ["learning rate", "number of images", "architecture", "seed", "split"])
def test_the_parent_depends_on_its_data_and_training(tmp_path: Path, change: str) -> None:
    before, after = small_space(tmp_path), small_space(tmp_path, OTHER[change])
    assert cell_of(after, "static").baseline_key != cell_of(before, "static").baseline_key


def test_static_and_baq_of_every_budget_share_one_cost_table(tmp_path: Path) -> None:
    cells = [cell for cell in expand_cells(small_space(tmp_path)) if cell.seed == 0]
    allocating = [isinstance(cell.point.settings, Allocating) for cell in cells]
    assert len({cell.importance_key for cell, has in zip(cells, allocating, strict=True) if has}) == 1
    assert {cell.importance_key for cell, has in zip(cells, allocating, strict=True) if not has} == {None}


def test_a_trials_key_depends_on_its_number_and_weights(tmp_path: Path) -> None:
    cell = cell_of(small_space(tmp_path), "static")
    keys = {trial_key(cell, number=n, weights={"fairness_weight": w}) for n in (0, 1) for w in (0.1, 0.2)}
    assert len(keys) == 4


def test_a_cell_survives_the_way_through_json(tmp_path: Path) -> None:
    for cell in expand_cells(small_space(tmp_path)):
        again = Cell.model_validate_json(cell.model_dump_json())
        assert again == cell
        assert (again.key, again.baseline_key, again.importance_key) == (
            cell.key,
            cell.baseline_key,
            cell.importance_key,
        )


def test_a_copy_of_a_cell_with_other_values_has_keys_of_its_own(tmp_path: Path) -> None:
    cell = cell_of(small_space(tmp_path), "static")
    before = cell.key, cell.baseline_key
    other = cell.model_copy(update={"seed": 7})
    assert other.seed == 7 and other.key != before[0] and other.baseline_key != before[1]
    assert (cell.key, cell.baseline_key) == before and cell.model_copy() == cell
    with pytest.raises(ValidationError):
        cell.model_copy(update={"seed": "seven"})


def test_a_method_may_be_given_by_its_name_alone(tmp_path: Path) -> None:
    short = load_space(write_space(tmp_path, SMALL.replace("- method: fp32", "- fp32")))
    assert short.methods == small_space(tmp_path).methods
    with pytest.raises(InputError, match="statik"):
        load_space(write_space(tmp_path, SMALL.replace("- method: fp32", "- statik")))


def test_a_hash_does_not_depend_on_the_order_of_keys() -> None:
    assert content_hash({"a": 1, "b": [2.5]}) == content_hash({"b": [2.5], "a": 1})
    assert content_hash({"a": 1}) != content_hash({"a": 2})
    with pytest.raises(TypeError, match="set has no content hash"):
        content_hash({1, 2})


def test_the_small_space_of_these_tests_is_a_good_one(tmp_path: Path) -> None:
    assert load_space(write_space(tmp_path, SMALL)).name == "small"


def test_records_cannot_be_changed(tmp_path: Path) -> None:
    space = small_space(tmp_path)
    with pytest.raises(ValidationError, match="frozen"):
        space.recipe.epochs = 7  # type: ignore[misc]


def test_pinned_widths_are_measured_beside_the_choices(tmp_path: Path) -> None:
    change = ("bitrate_weight: 0.01", "choices: [1, 2, 3]\n    pin: {fc: 8}")
    settings = cell_of(small_space(tmp_path, change), "baq").point.settings
    assert isinstance(settings, Allocating)
    assert settings.measured_choices == (1, 2, 3, 8)


@pytest.mark.parametrize("method", ["static", "baq"])
def test_importance_prices_what_matching_leaves_where_outputs_are_matched(method: str) -> None:
    def cell(**options: object) -> Cell:
        space = load_space(find_space("demo")).model_dump(mode="json") | {
            "methods": [{"method": method, **options}]
        }
        return expand_cells(SearchSpace.model_validate(space))[0]

    assert run_params(cell(), weights={})["importance"] == "taylor_matched"
    for off in (False, 0, "off"):
        assert run_params(cell(match_moments=off), weights={})["importance"] == "taylor"
    assert run_params(cell(importance="taylor"), weights={})["importance"] == "taylor"
    assert run_params(cell(importance="hawq", match_moments=False), weights={})["importance"] == "hawq"
    assert cell(importance="taylor").importance_key == cell(match_moments=False).importance_key
    assert cell().importance_key != cell(importance="taylor").importance_key
    with pytest.raises(ValidationError, match="importance taylor_matched prices what matching leaves"):
        cell(importance="taylor_matched", match_moments=0)


@pytest.mark.parametrize(
    ("method", "by_default"), [("uniform", False), ("static", True), ("baq", True), ("hawq", False)]
)
def test_outputs_are_matched_by_default_where_bits_are_allocated_by_our_methods(
    method: str, by_default: bool
) -> None:
    def cell(match_moments: bool | None) -> Cell:
        row = {"method": method, "match_moments": match_moments}
        space = load_space(find_space("demo")).model_dump(mode="json") | {"methods": [row]}
        return expand_cells(SearchSpace.model_validate(space))[0]

    assert matches_moments(cell(None)) is by_default
    assert cell(None).key == cell(by_default).key != cell(not by_default).key
    assert run_params(cell(True), weights={})["match_moments"] == "true"
    assert cell(True).baseline_key == cell(False).baseline_key


@pytest.mark.parametrize(
    ("method", "by_default"), [("uniform", False), ("static", True), ("baq", True), ("hawq", False)]
)
def test_weights_are_reconstructed_by_default_where_outputs_are_matched_by_our_methods(
    method: str, by_default: bool
) -> None:
    def cell(**options: bool | None) -> Cell:
        space = load_space(find_space("demo")).model_dump(mode="json")
        return expand_cells(SearchSpace.model_validate(space | {"methods": [{"method": method, **options}]}))[0]

    assert reconstructs(cell()) is by_default
    assert run_params(cell(), weights={})["reconstruct"] == str(by_default).lower()
    assert not reconstructs(cell(match_moments=False))
    on, off = cell(match_moments=True, reconstruct=True), cell(match_moments=True, reconstruct=False)
    assert reconstructs(on) and not reconstructs(off) and on.key != off.key
    assert cell(match_moments=True).key == (on if by_default else off).key
    assert (on.baseline_key, on.importance_key) == (off.baseline_key, off.importance_key)
    with pytest.raises(ValidationError, match="reconstruct leaves mean and spread to match_moments"):
        cell(match_moments=False, reconstruct=True)


@pytest.mark.parametrize(
    ("row", "key"),
    [
        ({"method": "static", "match_moments": True, "reconstruct": False}, "9e7324ab981ce1cb"),
        ({"method": "static", "match_moments": False}, "41fdfcf10deabdab"),
        ({"method": "baq", "reconstruct": False}, "dbddc938eeac51e3"),
        (
            {"method": "baq", "reconstruct": False, "bit_warmup_frac": 0, "mix_temperature": 1},
            "dbddc938eeac51e3",
        ),
        ({"method": "uniform", "bits": [4], "match_moments": True}, "d02915d56d6b1264"),
        ({"method": "hawq"}, "9f7d41d34e579698"),
    ],
)
def test_a_new_option_left_the_keys_of_cells_without_it_as_they_were(
    monkeypatch: pytest.MonkeyPatch, row: dict[str, object], key: str
) -> None:
    """The keys are those of version 3 before weights were re-fitted; a raised ``RESULT_VERSION`` changes them all."""
    monkeypatch.setattr(cells, "RESULT_VERSION", 3)
    space = {
        "name": "s",
        "datasets": [{"kind": "synthderm", "num_images": 500, "group_attributes": ["skin_tone"]}],
        "architectures": ["test_resnet"],
        "budgets_bits": [1],
        "seeds": [0],
        "methods": [row],
    }
    assert expand_cells(SearchSpace.model_validate(space))[0].key == key
