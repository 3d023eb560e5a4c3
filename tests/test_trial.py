"""One cell in, one result out: every method through the same contract."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from fqsweep.assignment import assign_bits_in_file
from fqsweep.baseline import ensure_baseline
from fqsweep.cells import Cell, MethodPoint, expand_cells
from fqsweep.config import (
    ArchitectureConfig,
    BaqMethod,
    Fp32Method,
    RecipeMethod,
    SearchSpace,
    StaticMethod,
    SynthdermConfig,
    TrainingRecipe,
    UniformMethod,
)
from fqsweep.engine.work import LogFile
from fqsweep.errors import TrialError
from fqsweep.files import SweepPaths
from fqsweep.models import build_model
from fqsweep.names import group_metric_key, metric_keys
from fqsweep.quant.packing import read_metadata, unpack_weights
from fqsweep.quant.remainder import Remainder, bound_remainder
from fqsweep.quant.removal import RemovalError
from fqsweep.results import TrialResult, read_result
from fqsweep.setting import make_gpu_exact, open_setting
from fqsweep.trial import load_packed, run_trial

DATA = SynthdermConfig(
    kind="synthderm", num_images=240, image_size=32, min_group_count=4, group_attributes=("skin_tone",)
)
RECIPE = TrainingRecipe(epochs=1, batch_size=32, finetune_epochs=1, calibration_images=20)
OF_GROUPS = "acc_avg acc_worst acc_gap balanced_acc_worst eopp0 eopp1 eodd dp_gap auc_worst".split()
METHODS = {
    "fp32": (Fp32Method(method="fp32"), None),
    "uniform-4": (UniformMethod(method="uniform", bits=(4,)), None),
    "uniform-1-ft": (UniformMethod(method="uniform", bits=(1,), finetune=(True,), label="u1"), None),
    "static": (StaticMethod(method="static", fairness_weight=0.2), 0.5),
    "static-tensor": (StaticMethod(method="static", granularity="tensor", label="st", finetune_epochs=0), 2.5),
    "static-mean": (StaticMethod(method="static", reducer="cvar", allocator="mean", label="sm"), 1.5),
    "static-loss": (
        StaticMethod(method="static", allocator="minimax_loss", label="sl", finetune_epochs=0),
        1.5,
    ),
    "distilled": (StaticMethod(method="static", distillation_weight=0.5, label="sd"), 1.0),
    "baq": (BaqMethod(method="baq", bitrate_weight=0.05, fairness_weight=0.1), 0.75),
    "baq-lsq": (BaqMethod(method="baq", bit_gradient="lsq", settle_frac=0.0, label="bl"), 3.0),
    "fairquant": (RecipeMethod(method="fairquant"), 4.5),
    "reference": (RecipeMethod(method="reference"), 4.5),
    "static-gap": (StaticMethod(method="static", allocator="gap", label="sg", finetune_epochs=0), 1.5),
    "exempt": (StaticMethod(method="static", exempt=("first", "fc"), label="se", finetune_epochs=0), 1.5),
    "fairgrape": (RecipeMethod(method="fairgrape"), 3.0),
    "fairquantize": (RecipeMethod(method="fairquantize"), 3.0),
    "hawq": (RecipeMethod(method="hawq"), 3.0),
}


def cell_of(name: str, *, architecture: str = "test_resnet", **recipe: object) -> Cell:
    method, budget = METHODS[name]
    space = SearchSpace(
        name="t",
        datasets=(DATA,),
        architectures=(ArchitectureConfig(name=architecture),),
        methods=(method,),
        budgets_bits=(budget,) if budget else (),
        seeds=(0,),
        recipe=RECIPE.model_copy(update=recipe),
    )
    (cell,) = expand_cells(space)
    return cell


def trial(cell: Cell, folder: Path, key: str = "k") -> TrialResult:
    paths = SweepPaths(folder)
    log = LogFile(paths.log(key))
    return run_trial(cell, key=key, weights={}, paths=paths, data_dir=None, device="cpu", recorder=log)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("trials")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_keeps_the_contract(name: str, folder: Path) -> None:
    cell = cell_of(name)
    result = trial(cell, folder, name)
    paths = SweepPaths(folder)
    assert read_result(paths.result(name)) == result
    assert set(metric_keys()) <= set(result.metrics)
    assert np.isfinite(list(result.metrics.values())).all()
    file = paths.trial(name) / "model.fqs"
    assert result.metrics["size/packed_bytes"] == file.stat().st_size
    confusion = pd.read_csv(paths.trial(name) / "confusion.csv").query("split == 'test'")
    right = confusion[confusion["true_class"] == confusion["predicted_class"]]["images"].sum()
    assert right / confusion["images"].sum() == pytest.approx(result.metrics["test/acc_overall"])
    for group, count in confusion.groupby("group")["images"].sum().items():
        assert count == result.metrics[group_metric_key("test", "count_group", str(group))]
    # Bits on disk, counted weight by weight, are the bits that are claimed.
    unpacked = unpack_weights(file.read_bytes())
    if name == "fp32":
        assert result.metrics["bits/mean_weight"] == 32 and not unpacked.bits
        return
    on_disk = sum(
        int(bits.sum()) * unpacked[layer].numel() // len(bits) for layer, bits in unpacked.bits.items()
    )
    weights = sum(row["units"] * row["weights_per_unit"] for row in result.layers)
    claimed = result.metrics["bits/mean_weight"] * weights
    if any(row["units_at_0"] for row in result.layers):  # weights that only met dropped channels left with them
        assert on_disk <= claimed
        whole = float(read_metadata(file.read_bytes())["whole_mean_bits"])
        assert result.metrics["bits/mean_weight"] == pytest.approx(whole, rel=1e-5)
    else:
        assert claimed == pytest.approx(on_disk, rel=1e-12)
        units = sum(row["units"] for row in result.layers)
        assert units == sum(len(bits) for bits in unpacked.bits.values())
    if cell.budget_bits is not None:
        assert claimed <= cell.budget_bits * weights * (1 + 1e-12)
    assert file.stat().st_size >= on_disk / 8
    assert ("fc.weight" in unpacked.bits) == (name != "exempt")


def test_what_is_scored_is_what_lies_on_disk(folder: Path) -> None:
    cell = cell_of("static")
    result = trial(cell, folder, "scored")
    setting = open_setting(cell, paths=SweepPaths(folder), data_dir=None, device="cpu")
    model = load_packed((SweepPaths(folder).trial("scored") / "model.fqs").read_bytes(), setting)
    for split in ("val", "test"):
        metrics, _ = setting.score(model, split)
        assert all(result.metrics[name] == value for name, value in metrics.items())


def test_a_packed_file_says_what_it_needs_to_be_used_alone(folder: Path) -> None:
    trial(cell_of("uniform-4"), folder, "alone")
    notes = read_metadata((SweepPaths(folder).trial("alone") / "model.fqs").read_bytes())
    assert notes["architecture"] == "test_resnet"
    assert notes["image_size"] == "32"
    assert len(json.loads(notes["classes"])) == 6
    assert set(json.loads(notes["normalisation"])) == {"mean", "std"}


def test_the_same_cell_gives_the_same_metrics_to_the_last_digit(tmp_path: Path) -> None:
    results = [trial(cell_of("baq"), tmp_path / place) for place in ("a", "b")]
    untimed = [{k: v for k, v in r.metrics.items() if not k.startswith("time/")} for r in results]
    assert untimed[0] == untimed[1]
    files = [(SweepPaths(tmp_path / place).trial("k") / "model.fqs").read_bytes() for place in ("a", "b")]
    assert files[0] == files[1]


def test_learned_bits_move_and_stay_under_the_budget(folder: Path) -> None:
    budget = 1.5
    moved = cell_of("baq", finetune_epochs=8, batch_size=16, finetune_learning_rate=1e-3).model_copy(
        update={"budget_bits": budget}
    )
    settings = moved.point.settings.model_copy(update={"bit_learning_rate": 0.3, "bitrate_weight": 0.0})
    moved = moved.model_copy(update={"point": moved.point.model_copy(update={"settings": settings})})
    fixed_point = MethodPoint(
        method="static", variant="s", settings=StaticMethod(method="static", finetune_epochs=0)
    )
    fixed = moved.model_copy(update={"point": fixed_point})
    # How many units of a layer have at least so many bits: up and down both show, also within one layer.
    at_least = [
        [[sum(row[f"units_at_{c}"] for c in range(b, 9)) for b in range(1, 9)] for row in result.layers]
        for result in (trial(moved, folder, "moved"), trial(fixed, folder, "fixed"))
    ]
    change = np.array(at_least[0]) - np.array(at_least[1])
    assert (change > 0).any() and (change < 0).any()
    assert moved.point.settings != fixed.point.settings


def test_a_pinned_layer_keeps_its_bits_within_the_budget(folder: Path) -> None:
    settings = StaticMethod(method="static", pin={"*fc": 8}, finetune_epochs=0, choices=(0, 1, 2, 3, 4))
    cell = cell_of("static").model_copy(
        update={"point": MethodPoint(method="static", variant="p", settings=settings), "budget_bits": 2.0}
    )
    result = trial(cell, folder, "pinned")
    by_layer = {row["layer"]: row["mean_bits"] for row in result.layers}
    assert by_layer["fc"] == 8
    assert max(bits for name, bits in by_layer.items() if name != "fc") <= 4
    assert result.metrics["bits/mean_weight"] <= 2.0


def with_settings(settings: StaticMethod | BaqMethod, **budget: object) -> Cell:
    point = MethodPoint(method=settings.method, variant="v", settings=settings)
    return cell_of("static").model_copy(update={"point": point, "budget_bits": None, **budget})


@pytest.mark.parametrize("method", [StaticMethod, BaqMethod])
@pytest.mark.parametrize("budget_bytes", [30_000, 100_000])
def test_a_budget_in_bytes_holds_for_the_file_and_is_spent(
    method: type, budget_bytes: int, folder: Path
) -> None:
    settings = method(method=method.model_fields["method"].annotation.__args__[0])
    result = trial(
        with_settings(settings, budget_bytes=budget_bytes), folder, f"{budget_bytes}{settings.method}"
    )
    assert sum(row["units_at_0"] for row in result.layers) > 0  # what these would take goes to the others
    assert 0.97 * budget_bytes < result.metrics["size/packed_bytes"] <= budget_bytes
    assert result.params["budget_bytes"] == str(budget_bytes) and result.params["budget_bits"] == "none"


def test_a_budget_in_bytes_below_the_smallest_file_fails_the_trial(folder: Path) -> None:
    with pytest.raises(
        TrialError, match=r"a budget of 900 bytes does not hold the smallest allocation, which takes"
    ):
        trial(with_settings(StaticMethod(method="static"), budget_bytes=900), folder, "tiny")


def test_a_budget_in_bytes_fails_where_dropped_channels_cannot_leave(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_blob: bytes) -> bytes:
        raise RemovalError("other logits")

    monkeypatch.setattr("fqsweep.trial.shrink", fail)
    with pytest.raises(
        TrialError, match="dropped channels, which a budget in bytes does not hold, stay: other"
    ):
        trial(with_settings(StaticMethod(method="static"), budget_bytes=30_000), folder, "whole")


def test_learned_bits_that_make_the_file_too_large_are_fewer_then(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def remainder(*given: Any, **named: Any) -> Remainder:
        found = bound_remainder(*given, **named)
        asked.append(found.most_bytes)
        return replace(found, most_bytes=found.most_bytes + 400 * (len(asked) > allocations))

    def count(*given: Any, **named: Any) -> Any:
        nonlocal allocations
        found = assign_bits_in_file(*given, **named)
        allocations = len(asked)
        return found

    allocations = 99
    monkeypatch.setattr("fqsweep.finetuning.bound_remainder", remainder)
    monkeypatch.setattr("fqsweep.finetuning.assign_bits_in_file", count)
    result = trial(with_settings(BaqMethod(method="baq"), budget_bytes=30_000), folder, "fewer")
    assert len(asked) >= allocations + 2  # the first rounding was too large
    assert result.metrics["size/packed_bytes"] <= 30_000 - 400


def test_limits_hold_layer_by_layer(folder: Path) -> None:
    limits = {"layer1.*": {"min": 3}, "last": {"min": 2, "max": 2}}
    settings = StaticMethod(method="static", limits=limits, finetune_epochs=0)
    result = trial(with_settings(settings, budget_bits=2.0), folder, "limited")
    rows = {row["layer"]: row for row in result.layers}
    assert rows["fc"]["units_at_2"] == rows["fc"]["units"]
    narrow = [row for name, row in rows.items() if name.startswith("layer1.")]
    assert narrow and all(row[f"units_at_{b}"] == 0 for row in narrow for b in (0, 1, 2))
    assert any(row["units_at_0"] for row in rows.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"limits": {"fc": {"min": 5}}, "choices": (0, 1, 2)},
            r"limits 'fc' \(5 to 8 bits\) leave layer fc none",
        ),
        ({"limits": {"head*": {"min": 5}}}, r"limits 'head\*' fits no quantisable layer; the first are: "),
        ({"exempt": ("head",)}, r"exempt: 'head' fits no quantisable layer"),
        ({"exempt": ("*",)}, "no layer is left to quantise"),
    ],
)
def test_layer_options_that_cannot_hold_fail_the_trial(
    options: dict[str, object], message: str, folder: Path
) -> None:
    settings = StaticMethod(method="static", **options)
    with pytest.raises(TrialError, match=message):
        trial(with_settings(settings, budget_bits=1.0), folder, "impossible")


def test_learning_neither_revives_a_dropped_channel_nor_drops_one(folder: Path) -> None:
    learning = with_settings(BaqMethod(method="baq", bit_learning_rate=0.3, finetune_epochs=8), budget_bits=0.5)
    fixed = with_settings(StaticMethod(method="static", finetune_epochs=0), budget_bits=0.5)
    rows = [trial(cell, folder, key).layers for cell, key in ((learning, "alive"), (fixed, "still"))]
    dropped = [[row["units_at_0"] for row in layers] for layers in rows]
    assert sum(dropped[0]) > 0 and dropped[0] == dropped[1]
    assert [row["mean_bits"] for row in rows[0]] != [row["mean_bits"] for row in rows[1]]


def test_warm_up_and_temperature_reach_training(folder: Path) -> None:
    losses = set()
    for name, value in (("bit_learning_rate", 0.3), ("bit_warmup_frac", 0.9), ("mix_temperature", 0.2)):
        settings = BaqMethod(method="baq", finetune_epochs=8, **{"bit_learning_rate": 0.3, name: value})
        losses.add(trial(with_settings(settings, budget_bits=1.5), folder, name).metrics["val/loss"])
    assert len(losses) == 3


def test_learned_bits_with_a_pin_above_the_choices_move_between_the_choices(folder: Path) -> None:
    settings = BaqMethod(method="baq", pin={"*fc": 8}, choices=(2, 3, 4), bit_learning_rate=0.3)
    cell = cell_of("static").model_copy(
        update={"point": MethodPoint(method="baq", variant="bp", settings=settings), "budget_bits": 3.6}
    )
    result = trial(cell, folder, "bpinned")
    rows = {row["layer"]: row for row in result.layers}
    assert rows["fc"]["mean_bits"] == 8
    for name, row in rows.items():
        outside = sum(row[f"units_at_{b}"] for b in (0, 1, 5, 6, 7, 8))
        assert name == "fc" or outside == 0
    assert result.metrics["bits/mean_weight"] <= 3.6


def test_a_diverging_baq_trial_names_the_step_and_the_learning_rate(folder: Path) -> None:
    with pytest.raises(TrialError, match=r"loss is .* at epoch 1, step .* lower the learning rate"):
        trial(cell_of("baq", finetune_learning_rate=1e30, gradient_clip=None), folder, "diverging")


def test_a_pin_that_fits_no_layer_fails_the_trial(folder: Path) -> None:
    settings = StaticMethod(method="static", pin={"head.*": 8})
    cell = cell_of("static").model_copy(
        update={"point": MethodPoint(method="static", variant="p", settings=settings)}
    )
    with pytest.raises(TrialError, match=r"pin 'head\.\*' fits no quantisable layer; the first are: "):
        trial(cell, folder, "nopin")


def test_pins_that_break_the_budget_fail_the_trial(folder: Path) -> None:
    settings = StaticMethod(method="static", pin={"*": 8})
    cell = cell_of("static").model_copy(
        update={"point": MethodPoint(method="static", variant="p", settings=settings)}
    )
    with pytest.raises(TrialError, match="no allocation fits"):
        trial(cell, folder, "overpin")


def test_a_gpu_that_is_not_there_fails_the_trial_and_is_not_replaced(folder: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(TrialError, match="a GPU was asked for"):
        open_setting(cell_of("fp32"), paths=SweepPaths(folder), data_dir=None, device="cuda")


def test_a_gpu_is_asked_for_float32_and_for_the_same_result_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    try:
        make_gpu_exact()
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled(), "what has no such form is still done"
        assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
        assert not torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "highest"
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True


def test_the_parent_is_trained_once_and_shared(tmp_path: Path) -> None:
    paths = SweepPaths(tmp_path)
    trial(cell_of("fp32"), tmp_path, "a")
    meta = paths.baseline(cell_of("fp32").baseline_key) / "meta.json"
    first = meta.stat().st_mtime_ns
    trial(cell_of("uniform-4"), tmp_path, "b")
    assert meta.stat().st_mtime_ns == first
    assert len(list((tmp_path / "baselines").iterdir())) <= 2  # the folder and its lock


def test_a_full_precision_run_has_no_curve_of_another_attributes_groups(tmp_path: Path) -> None:
    """One parent serves all attributes; its epochs are scored by the first that asked for it."""
    data = DATA.model_copy(update={"group_attributes": ("skin_tone", "skin_type"), "min_group_count": 1})
    first = cell_of("fp32")
    other = first.model_copy(update={"dataset": data, "group_attribute": "skin_type"})
    own = first.model_copy(update={"dataset": data})
    assert own.baseline_key == other.baseline_key
    mine, others = (trial(cell, tmp_path, cell.group_attribute).history for cell in (own, other))
    assert mine and len(mine) == len(others)
    assert {"val/acc_worst", "val/eodd", "val/auc_worst", "val/acc_overall"} <= set(mine[0])
    assert set(mine[0]) - set(others[0]) == {f"val/{key}" for key in OF_GROUPS}
    assert others[0]["val/balanced_acc"] == mine[0]["val/balanced_acc"]


@pytest.mark.parametrize("architecture", ["test_vit", "test_efficientnet", "test_convnext"])
def test_other_architectures_go_all_the_way(architecture: str, tmp_path: Path) -> None:
    result = trial(cell_of("baq", architecture=architecture), tmp_path)
    assert result.metrics["bits/mean_weight"] <= 0.75


def test_pretrained_weights_from_a_file_are_loaded_and_the_classifier_is_new(tmp_path: Path) -> None:
    plain = ArchitectureConfig(name="test_resnet")
    source = build_model(plain, num_classes=1000, image_size=32)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    given = ArchitectureConfig(name="test_resnet", pretrained=str(tmp_path / "weights.safetensors"))
    loaded = build_model(given, num_classes=6, image_size=32)
    own, other = source.state_dict(), loaded.state_dict()
    same = [
        name for name in own if own[name].shape == other[name].shape and torch.equal(own[name], other[name])
    ]
    assert set(own) - set(same) == {name for name in own if name.startswith("fc.")}
    assert other["fc.weight"].shape[0] == 6


def test_the_parent_survives_its_children(folder: Path) -> None:
    cell = cell_of("static")
    setting = open_setting(cell, paths=SweepPaths(folder), data_dir=None, device="cpu")
    log = LogFile(folder / "log")
    before = ensure_baseline(setting, SweepPaths(folder), log).state_dict()
    trial(cell, folder, "child")
    after = ensure_baseline(setting, SweepPaths(folder), log).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
