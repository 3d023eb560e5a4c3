"""What a search space may not say: every problem named with its place and line, and nothing started."""

from __future__ import annotations

from pathlib import Path

import pytest

from fqsweep.cells import expand_cells
from fqsweep.errors import InputError
from fqsweep.space import load_space
from tests.small_spaces import small_space, write_space


def problems_of(folder: Path, *changes: tuple[str, str]) -> str:
    with pytest.raises(InputError, match="nothing was started") as caught:
        small_space(folder, *changes)
    return str(caught.value)


WRONG = [
    ("  epochs: 2", "  epoch: 2", "19: recipe.epoch: unknown key; did you mean 'epochs'?"),
    ("  epochs: 2", "  epochs: 0", "recipe.epochs: Input should be greater than or equal to 1 (given: 0)"),
    ("  epochs: 2", "  epochs: two", "(given: 'two')"),
    (
        "  epochs: 2",
        "  epochs: yes",
        "18: recipe: epochs must be a number, but YAML reads yes, no, on, off as true and false",
    ),
    ("seeds: [0, 1]", "seeds: [0, true]", "seeds must be a number, but YAML reads"),
    (
        "bitrate_weight: 0.01",
        "limits: {first: {mini: 1}}",
        "limits.first.mini: unknown key; did you mean 'min'?",
    ),
    (
        "architectures:",
        "  - {kind: synthderm, name: b, group_attributes: [skin_tone], image_size: 32, num_images: 500}\n"
        "architectures:",
        "datasets[1]: b is synthderm under another name; leave one of them out",
    ),
    ("seeds: [0, 1]\n", "", "seeds: is required"),
    ("seeds: [0, 1]\n", "seed: [0, 1]\n", "seed: unknown key; did you mean 'seeds'?"),
    ("seeds: [0, 1]", "seeds: [0, 1, 0]", "9: seeds[2]: '0' stands here twice"),
    ("seeds: [0, 1]", "seeds: []", "9: seeds: "),
    ("cell: 2}", "cell: 2, repeat_seeds: [1, 5]}", "search.repeat_seeds[0]: 1 stands in seeds too"),
    ("cell: 2}", "cell: 2, repeat_seeds: [5, 5]}", "search.repeat_seeds[1]: '5' stands here twice"),
    (
        "cell: 2}",
        "cell: 2, repeat_seeds: [5], objectives: [bits/mean_weight]}",
        "give search.objectives one that rises there, such as val/acc_worst",
    ),
    ("cell: 2}", "cell: 2, objectives: []}", "search.objectives: "),
    ("cell: 2}", "cell: 2, objectives: [val/acc_gap, val/acc_gap]}", "'val/acc_gap' stands here twice"),
    ("seeds: [0, 1]", "seeds: [0, -1]", "seeds[1]: Input should be greater than or equal to 0"),
    ("bitrate_weight: 0.01", "budgets_bits: [2, 2.0]", "methods[3].budgets_bits[1]: '2' stands here twice"),
    ("bitrate_weight: 0.01", "budgets_bytes: [9, 9]", "methods[3].budgets_bytes[1]: '9' stands here twice"),
    (
        "bitrate_weight: 0.01",
        "regulariser: none\n    fairness_weight: 0.1",
        "fairness_weight weighs the regulariser: name one",
    ),
    (
        "bitrate_weight: 0.01",
        "regulariser: group_dro",
        "regulariser group_dro has no effect at fairness_weight 0: give it a weight, or leave it out",
    ),
    (
        "bitrate_weight: 0.01",
        "finetune_epochs: 0",
        "methods[3]: baq learns its bits in fine-tuning, but finetune_epochs is 0; raise it, or use method static",
    ),
    (
        "bitrate_weight: 0.01",
        "fairness_weight: 0.5\n    finetune_epochs: 0",
        "methods[3]: baq is not fine-tuned, so that fairness_weight 0.5 would change nothing",
    ),
    (
        "bits: [4]",
        "bits: [4]\n    distillation_weight: 0.5",
        "methods[1]: uniform-4 is not fine-tuned, so that distillation_weight 0.5 would change nothing",
    ),
    (
        "start: 0.25}",
        "start: 0.25}\n    finetune_epochs: 0",
        "methods[2]: static is not fine-tuned: fairness_weight must be a number, not a range",
    ),
    ("method: baq", "method: bqa", "method 'bqa' is not known; did you mean 'baq'?"),
    ("  - method: fp32\n", "  - label: x\n", "methods[0]: method is required"),
    ("kind: synthderm", "kind: synthdrem", "kind 'synthdrem' is not known; did you mean 'synthderm'?"),
    ("image_size: 32", "imagesize: 32", "datasets[0].imagesize: unknown key; did you mean 'image_size'?"),
    ("[skin_tone]", "[skin_tome]", "4: datasets[0].group_attributes[0]: "),
    ("[skin_tone]", "[skin_tone, skin_tone]", "4: datasets[0].group_attributes: 'skin_tone' stands here twice"),
    (
        "image_size: 32",
        "generator_seed: -1",
        "datasets[0].generator_seed: Input should be greater than or equal",
    ),
    ("low: 0.0, high: 1.0, start: 0.25", "low: 2.0, high: 1.0", "high (1) must be above low (2)"),
    ("low: 0.0, high: 1.0, start: 0.25", "low: 0.0, hihg: 1.0", "hihg: unknown key; did you mean 'high'?"),
    ("low: 0.0, high: 1.0, start: 0.25", "low: 0.0, high: 1.0, start: 3", "start (3) must lie between"),
    ("low: 0.0, high: 1.0, start: 0.25", "low: 0.0, high: 1.0, log: true", "a log range must start above 0"),
    ("bitrate_weight: 0.01", "bitrate_weight: -1", "methods[3].bitrate_weight: "),
    (
        "bitrate_weight: 0.01",
        "choices: [2, 4, 8]",
        "methods[3]: learned bits move between neighbouring widths: choices must be two or more without a hole",
    ),
    ("bitrate_weight: 0.01", "choices: [2, 9]", "bit choices must be whole numbers from 0 to 8"),
    ("bitrate_weight: 0.01", "choices: [two, 4]", "methods[3].choices[0]: Input should be a valid integer"),
    ("bits: [4]", "bits: []", "methods[1].bits: "),
    ("bits: [4]", "finetune: []", "methods[1].finetune: "),
    ("bits: [4]", "bits: [4]\n    budgets_bits: [3]", "uniform spends what its widths take"),
    ("bitrate_weight: 0.01", "reducer: mean", "set reducer to none"),
    ("bitrate_weight: 0.01", "allocator: mean", "allocator mean needs a reducer"),
    ("bitrate_weight: 0.01", "label: static", "'static' stands here twice; give one of them another label"),
    (
        "bitrate_weight: 0.01",
        "choices: [2, 3, 4]",
        "8: budgets_bits[0]: budget 1 is below the smallest bit choice",
    ),
    ("budgets_bits: [1, 3]\n", "", "static spends a budget: give budgets_bits or budgets_bytes"),
    ("budgets_bits: [1, 3]", "budgets_bits: [1, 9]", "budgets_bits[1]: "),
    ("budgets_bits: [1, 3]", "budgets_bits: [1, 1.0]", "budgets_bits[1]: '1' stands here twice"),
    ("budgets_bits: [1, 3]", "budgets_bits: [1, .nan]", "budgets_bits[1]: "),
    ("architectures: [test_resnet]", "architectures: [a, a]", "architectures[1]: 'a' stands here twice"),
    (
        "{trials_per_cell: 2}",
        "{objectives: [test/acc_worst]}",
        "test data may not choose a model; use val/acc_worst",
    ),
    ("{trials_per_cell: 2}", "{objectives: [val/acc]}", "'val/acc' is no objective; near: val/acc_"),
    ("  epochs: 2", "  quantiser_kernels: egaer\n  epochs: 2", "'egaer' is not known; did you mean 'eager'?"),
    ("seeds: [0, 1]", "seeds: 4", "seeds: must be a list, such as [4]"),
    ("seeds: [0, 1]", "seeds: 0-4", "seeds: must be a list, such as [0, 1, 2, 3, 4]"),
    ("{trials_per_cell: 2}", "{sampler: grid}", "search.sampler: "),
    ("name: small", "name: a b", "1: name: must be letters, digits, dots, dashes and underscores"),
    (
        "name: small",
        "name: 2024",
        '1: name: must be text, but YAML reads 2024 as a number: quote it, as in "2024"',
    ),
    (
        "image_size: 32",
        "drop_classes: [no]",
        "datasets[0].drop_classes[0]: must be text, but YAML reads yes, no",
    ),
    (
        "image_size: 32",
        "label_map: {0: [a]}",
        "5: datasets[0].label_map[0]: must be text, but YAML reads 0 as a",
    ),
    ("bits: [4]", "bits: [4]\n    budgets_bits: [3]", "12: methods[1]: uniform spends what its widths take"),
    (
        "bits: [4]",
        "bits: [4]\n    finetune: [true]\n    finetune_epochs: 0",
        "methods[1]: uniform-4-ft asks for fine-tuning, but finetune_epochs is 0",
    ),
    ("bitrate_weight: 0.01", 'label: ""', "methods[3].label: "),
    ("bitrate_weight: 0.01", 'label: "a\\nb"', "methods[3].label: must be one line without tabs"),
    ("recipe:\n", "recipe:\n  epochs: 3\n", "recipe.epochs: given twice"),
    ("num_images: 500\n", "splits: {train: 0.9}\n", "must be 1, but is 1.3"),
]


@pytest.mark.parametrize(("old", "new", "message"), WRONG, ids=[new.strip() or old for old, new, _ in WRONG])
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = problems_of(tmp_path, (old, new))
    assert message in text
    assert "WeightRange" not in text and "float" not in text


@pytest.mark.parametrize(
    "new",
    ["low: 2.0, high: 1.0", "low: 0.0, high: 1.0, start: 3", "low: 0.0, high: 1.0, extra: 3", "high: 1.0"],
)
def test_a_wrong_range_is_one_problem(tmp_path: Path, new: str) -> None:
    text = problems_of(tmp_path, ("low: 0.0, high: 1.0, start: 0.25", new))
    assert "space.yaml: 1 problem, nothing was started\n  space.yaml:15: methods[2].fairness_weight" in text


@pytest.mark.parametrize("value", ["-1", "lots", "[1, 2]", ".inf"])
def test_a_wrong_weight_is_one_problem(tmp_path: Path, value: str) -> None:
    text = problems_of(tmp_path, ("bitrate_weight: 0.01", f"bitrate_weight: {value}"))
    assert (
        "space.yaml: 1 problem, nothing was started\n  space.yaml:17: methods[3].bitrate_weight: Input" in text
    )


def test_several_problems_are_reported_at_once_by_line(tmp_path: Path) -> None:
    text = problems_of(
        tmp_path,
        ("image_size: 32", "image_size: 4"),
        ("bits: [4]", "bits: [40]"),
        ("bitrate_weight: 0.01", "bitrate_wieght: 0.01"),
        ("  finetune_epochs: 1", "  finetune_epochs: -1"),
    )
    lines = text.splitlines()
    assert lines[0].endswith("space.yaml: 4 problems, nothing was started")
    assert [line.split(":")[1] for line in lines[1:]] == ["5", "13", "17", "21"]
    assert "datasets[0].image_size" in lines[1]
    assert "methods[1].bits[0]" in lines[2]
    assert "methods[3].bitrate_wieght: unknown key; did you mean 'bitrate_weight'?" in lines[3]
    assert "recipe.finetune_epochs" in lines[4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a search space is a mapping"),
        ("- a\n- b\n", "a search space is a mapping"),
        ("just words", "a search space is a mapping"),
        ("name: [a\nseeds: }", r"space.yaml:2: not valid YAML"),
        ("name: small\n\tseeds: [1]", r"space.yaml:2: not valid YAML"),
        ("name: 2026-99-99\n", "not valid YAML: month must be in 1..12"),
        ("name: !!python/object:os.system {}\n", "not valid YAML"),
        ("seeds: &all [*all]\n", "nested too deeply for a search space"),
        (f"seeds: {'[' * 2000}{']' * 2000}\n", "nested too deeply for a search space"),
    ],
)
def test_a_file_that_is_no_search_space_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_space(write_space(tmp_path, text))


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_space(tmp_path / "absent.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(InputError, match="cannot be read"):
        load_space(tmp_path / "latin.yaml")


def test_seeds_may_repeat_cells_that_have_nothing_to_search_whatever_the_objectives(tmp_path: Path) -> None:
    plain = ("fairness_weight: {low: 0.0, high: 1.0, start: 0.25}", "fairness_weight: 0.1")
    repeated = ("cell: 2}", "cell: 2, repeat_seeds: [5], objectives: [bits/mean_weight]}")
    assert {cell.seed for cell in expand_cells(small_space(tmp_path, plain, repeated))} == {0, 1, 5}


def test_budgets_in_bytes_that_differ_in_one_byte_are_two(tmp_path: Path) -> None:
    space = small_space(tmp_path, ("bitrate_weight: 0.01", "budgets_bytes: [1234567, 1234568]"))
    assert len({cell.key for cell in expand_cells(space) if cell.budget_bytes}) == 4


def test_a_budget_below_the_smallest_choice_of_a_comparator_is_found_before_the_start(tmp_path: Path) -> None:
    text = problems_of(tmp_path, ("method: baq\n    bitrate_weight: 0.01", "method: fairquant"))
    assert "8: budgets_bits[0]: budget 1 is below the smallest bit choice of fairquant (2)" in text
