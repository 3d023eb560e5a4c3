"""One cell in, one result out: the story of a trial, without Ray and without MLflow.

data -> parent (shared) -> importance (shared) -> allocation -> quantisers -> weights reconstructed, outputs matched
-> fine-tuning -> packed file without dropped channels -> the model read back from that file -> metrics. What is
scored is what lies on disk.
"""

from __future__ import annotations

import csv
import io
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fqsweep.assignment import Budget, allowed_choices, assign_bits
from fqsweep.baseline import baseline_log, ensure_baseline, ensure_importance
from fqsweep.cells import (
    Cell,
    exempt_of,
    finetune_epochs,
    granularity_of,
    matches_moments,
    reconstructs,
    run_params,
)
from fqsweep.checkpoints import Checkpoint
from fqsweep.config import Allocating, BaqMethod, Finetuning, Fp32Method, UniformMethod
from fqsweep.errors import TrialError
from fqsweep.fairness import FairnessReport
from fqsweep.files import SweepPaths, write_bytes, write_json
from fqsweep.importance import start_steps
from fqsweep.models import count_macs
from fqsweep.names import group_metric_key
from fqsweep.pictures import draw_bits, draw_confusion
from fqsweep.quant.at_once import can_quantise_at_once
from fqsweep.quant.baq import LearnedBits
from fqsweep.quant.convert import QuantisedState, attach_quantisers, detach_quantisers, freeze_bits
from fqsweep.quant.costs import FULL_PRECISION_BITS, effective_gbops, fixed_packed_bytes, mean_weight_bits
from fqsweep.quant.kernels import Kernels, choose_kernels
from fqsweep.quant.moments import Moments, match_moments, noting_moments
from fqsweep.quant.packed_model import load_model, shrink
from fqsweep.quant.packing import pack_weights
from fqsweep.quant.reconstruction import Reconstruction, noting_patches
from fqsweep.quant.removal import RemovalError
from fqsweep.quant.units import UnitTable, list_units
from fqsweep.results import TrialResult
from fqsweep.setting import Setting, open_setting, seed_everything
from fqsweep.training import Recorder, TrainingLog, TrainingPlan, train

BITS_COLUMNS = ("layer", "units", "weights_per_unit", "mean_bits", *(f"units_at_{b}" for b in range(9)))
# In one batch: at 224 px the outputs of a ResNet50's first stage take 0.8 GB.
MOST_MATCHED_IMAGES = 256
CONFUSION_COLUMNS = ("split", "group", "true_class", "predicted_class", "images")


def run_trial(
    cell: Cell,
    *,
    key: str,
    weights: dict[str, float],
    paths: SweepPaths,
    data_dir: Path | None,
    device: str,
    recorder: Recorder,
) -> TrialResult:
    """Run one trial and write its folder: ``model.fqs`` (packed), tables and pictures and, last, ``result.json``.

    Args:
        weights: values of the cell's free weights.
        device: ``cpu`` or ``cuda``.

    Raises:
        TrialError, InputError: the trial cannot be done as asked; nothing easier is done instead.
    """
    start = time.perf_counter()
    setting = open_setting(cell, paths=paths, data_dir=data_dir, device=device)
    parent = ensure_baseline(setting, paths, recorder)
    seed_everything(cell.seed)
    units = list_units(parent, granularity=granularity_of(cell), exempt=exempt_of(cell))
    macs = count_macs(parent, image_size=cell.dataset.image_size)
    checkpoint = Checkpoint(paths.checkpoint(key), stop_request=paths.cancel_request)
    state, bits_u, log = _quantise(setting, parent, units, weights, paths, recorder, checkpoint)
    blob = pack_weights(
        state.tensors,
        {f"{name}.weight": bits for name, bits in state.bits.items()},
        steps={f"{name}.weight": steps for name, steps in state.steps.items()},
        metadata=_file_notes(setting),
    )
    if (bits_u == 0).any():
        blob = _without_dropped_channels(blob, recorder)
    _check_budget(cell, units, bits_u, packed_bytes=len(blob))
    write_bytes(paths.trial(key) / "model.fqs", blob)
    packed = load_packed(blob, setting)
    val_metrics, val_report = setting.score(packed, "val")
    test_metrics, test_report = setting.score(packed, "test")
    layers = _bits_table(units, bits_u)
    metrics = {
        **val_metrics,
        **test_metrics,
        **_group_metrics("val", val_report, setting),
        **_group_metrics("test", test_report, setting),
        "bits/mean_weight": mean_weight_bits(units, bits_u),
        "size/packed_bytes": float(len(blob)),
        "ops/effective_gbops": effective_gbops(*macs, units, bits_u),
        "time/train_s": log.train_s,
        "time/total_s": time.perf_counter() - start,
    }
    result = TrialResult(
        key=key,
        title=cell.title,
        params=run_params(cell, weights=weights),
        weights=weights,
        metrics=metrics,
        history=log.epochs,
        layers=layers,
    )
    folder = paths.trial(key)
    if not isinstance(cell.point.settings, Fp32Method):
        write_bytes(folder / "bits.csv", _as_csv(layers, BITS_COLUMNS))
        write_bytes(folder / "bits.png", draw_bits(layers, title=cell.title))
    _write_confusion(folder, setting, {"validation": val_report, "test": test_report})
    write_json(paths.result(key), asdict(result))
    checkpoint.remove()
    return result


# --- from parent to quantised state --------------------------------------------------------------


def _quantise(
    setting: Setting,
    parent: nn.Module,
    units: UnitTable,
    weights: dict[str, float],
    paths: SweepPaths,
    recorder: Recorder,
    checkpoint: Checkpoint,
) -> tuple[QuantisedState, np.ndarray, TrainingLog]:
    cell = setting.cell
    settings = cell.point.settings
    if isinstance(settings, Fp32Method):
        noted: Any = baseline_log(setting, paths)
        log = TrainingLog(epochs=noted["epochs"])  # the parent's curve; its training time is not this trial's
        tensors = {name: tensor.cpu() for name, tensor in parent.state_dict().items()}
        return (
            QuantisedState(tensors=tensors, bits={}, steps={}),
            np.full(units.num_units, FULL_PRECISION_BITS),
            log,
        )
    if isinstance(settings, UniformMethod):
        bits = settings.bits[0]
        bits_u = np.full(units.num_units, bits)
        batches = setting.calibration_batches()
        step_ub = start_steps(parent, units, batches, choices=(bits,), scale=settings.scale)
    else:
        importance = ensure_importance(setting, parent, paths, recorder)
        step_ub = importance.step_ub
        allocation = assign_bits(settings, importance, units, budget=_budget(setting, parent, units))
        bits_u = allocation.bits_u
    return _finetune(setting, parent, units, bits_u, step_ub, weights, recorder, checkpoint)


def _budget(setting: Setting, parent: nn.Module, units: UnitTable) -> Budget:
    """The cell's budget; of bytes on disk, what the file's other parts leave for codes and steps.

    Raises:
        TrialError: the file's other parts alone are larger.
    """
    cell = setting.cell
    if cell.budget_bytes is None:
        return Budget(mean_bits=cell.budget_bits)
    fixed = fixed_packed_bytes(parent.state_dict(), units, metadata=_file_notes(setting))
    if fixed >= cell.budget_bytes:
        raise TrialError(
            f"a budget of {cell.budget_bytes:,} bytes does not even hold what is not quantised ({fixed:,} bytes: "
            "biases, norms, exempt layers, bit index); raise it"
        )
    return Budget(code_bytes=cell.budget_bytes - fixed)


def _finetune(
    setting: Setting,
    parent: nn.Module,
    units: UnitTable,
    bits_u: np.ndarray,
    step_ub: np.ndarray,
    weights: dict[str, float],
    recorder: Recorder,
    checkpoint: Checkpoint,
) -> tuple[QuantisedState, np.ndarray, TrainingLog]:
    cell = setting.cell
    settings = cell.point.settings
    assert isinstance(settings, UniformMethod | Allocating)
    epochs = finetune_epochs(cell)
    teacher = (
        setting.model_with(parent.state_dict()).requires_grad_(False)
        if settings.distillation_weight > 0 and epochs
        else None
    )
    steps = {name: torch.from_numpy(part) for name, part in units.split(step_ub).items()}
    matched, moments, before = _calibrate(setting, parent, units)
    loader = setting.training_batches(seed=cell.seed + 1)
    at_once = epochs > 0 and _quantises_at_once(setting, settings)
    one_launch = at_once and setting.device.type == "cuda"
    if one_launch and setting.channels_last:
        parent.to(memory_format=torch.channels_last)
    kernels, remark = choose_kernels(
        "eager" if one_launch else cell.recipe.quantiser_kernels,
        setting.device,
        num_weights=int(units.num_weights_u.sum()),
        num_steps=epochs * loader.num_batches,
        at_once=at_once,
    )
    if remark:
        recorder.note(remark)
    plan = TrainingPlan(
        epochs=epochs,
        learning_rate=cell.recipe.finetune_learning_rate,
        weight_decay=cell.recipe.weight_decay,
        warmup_frac=0.0,
        gradient_clip=cell.recipe.gradient_clip,
        num_groups=len(setting.group.names),
        regulariser=settings.regulariser,
        fairness_weight=_weight("fairness_weight", settings, weights),
        distillation_weight=settings.distillation_weight,
        teacher=teacher,
        schedule=cell.recipe.schedule,
        autocast=setting.autocast,
        channels_last=setting.channels_last,
        at_once=at_once,
    )
    if isinstance(settings, BaqMethod) and epochs:
        limit = mean_weight_bits(units, bits_u) if cell.budget_bits is None else cell.budget_bits
        _learn_bits_into(plan, settings, parent, units, bits_u, steps, kernels, weights, budget_bits=limit)
    else:
        attach_quantisers(parent, units, steps, bits_u, kernels=kernels)
    if matched is not None:
        match_moments(parent, moments, matched, before=before)
    del matched, moments  # training has need of the memory
    log = TrainingLog()
    if epochs:
        log = train(
            parent,
            loader,
            plan,
            evaluate=lambda model: setting.score(model, "val")[0],
            recorder=recorder,
            checkpoint=checkpoint,
        )
    state = detach_quantisers(parent)
    return state, units.join(state.bits), log


@torch.no_grad()
def _calibrate(
    setting: Setting, parent: nn.Module, units: UnitTable
) -> tuple[torch.Tensor | None, dict[str, Moments], Reconstruction | None]:
    """What the parent's layers see and say: images to match outputs on, their moments, and what re-fits weights.

    Without images where outputs are not matched, and without what re-fits where weights stay.
    """
    if not matches_moments(setting.cell):
        return None, {}, None
    matched = images_to_match(setting)
    refits = reconstructs(setting.cell)
    refitted = [layer.name for layer in units.layers] if refits else []
    with (
        noting_moments(parent) as moments,
        noting_patches(parent, names=refitted, num_images=len(matched)) as patches,
    ):
        parent(matched)
    settings = setting.cell.point.settings
    assert isinstance(settings, UniformMethod | Allocating)
    before = Reconstruction(patches, num_images=len(matched), rule=settings.scale) if refits else None
    return matched, moments, before


def images_to_match(setting: Setting) -> torch.Tensor:
    """Calibration images that outputs are matched on, float32 (b, c, h, w): one batch, as all correct each layer."""
    return torch.cat([image_bchw for image_bchw, _, _ in setting.calibration_batches(MOST_MATCHED_IMAGES)()])


def _quantises_at_once(setting: Setting, settings: Finetuning) -> bool:
    """Whether training quantises all layers together; on a GPU not where eager kernels were asked for."""
    bit_gradient = settings.bit_gradient if isinstance(settings, BaqMethod) else None
    wanted = setting.device.type == "cpu" or setting.cell.recipe.quantiser_kernels != "eager"
    return wanted and can_quantise_at_once(setting.device, bit_gradient=bit_gradient)


def _learn_bits_into(
    plan: TrainingPlan,
    settings: BaqMethod,
    model: nn.Module,
    units: UnitTable,
    bits_u: np.ndarray,
    steps: dict[str, torch.Tensor],
    kernels: Kernels,
    weights: dict[str, float],
    *,
    budget_bits: float,
) -> None:
    """Attach quantisers with learned widths and tell the plan how they learn and when they settle."""
    attach_quantisers(
        model,
        units,
        steps,
        bits_u,
        learn_bits=settings.bit_gradient,
        smallest=settings.measured_choices[0],
        kernels=kernels,
    )
    lowest_u, highest_u = _limits_of_learning(
        allowed_choices(settings, units, settings.measured_choices), np.array(settings.measured_choices), bits_u
    )
    learned = LearnedBits(
        model,
        units,
        lowest_u=lowest_u,
        highest_u=highest_u,
        budget_bits=budget_bits,
        learning_rate=settings.bit_learning_rate,
    )
    plan.learned_bits = learned
    plan.bitrate_weight = _weight("bitrate_weight", settings, weights)
    plan.settle_epoch = plan.epochs * (1 - settings.settle_frac)
    plan.freeze = lambda: freeze_bits(model, units, learned.round_under_budget())


def _limits_of_learning(
    allowed_ub: np.ndarray, choice_b: np.ndarray, bits_u: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest width that each unit's learning may reach, int64 (u,) each.

    What the allocation drops stays dropped, and what it keeps keeps at least 1 bit. A mix of 0 and 1 bits is a
    channel's weights times a factor, to which a normalisation layer behind it is blind: the loss says nothing
    about that step, and learned there, bits walk at random (1/8 bit, synthderm, 2 seeds: worst group .781, without
    learning .809).
    """
    lowest_u = choice_b[allowed_ub.argmax(axis=1)]
    highest_u = choice_b[allowed_ub.shape[1] - 1 - allowed_ub[:, ::-1].argmax(axis=1)]
    dropped_u = bits_u == 0
    smallest_kept_u = choice_b[(allowed_ub & (choice_b > 0)).argmax(axis=1)]
    return np.where(dropped_u, 0, np.maximum(lowest_u, smallest_kept_u)), np.where(dropped_u, 0, highest_u)


def _weight(name: str, settings: Finetuning, weights: dict[str, float]) -> float:
    """A weight's value: the search's, or the one that the space fixes."""
    value = weights.get(name, getattr(settings, name))
    if not isinstance(value, float | int):
        raise TrialError(f"{name} is free in the search space, but the trial came without its value")
    return float(value)


# --- from quantised state to numbers -------------------------------------------------------------


def _check_budget(cell: Cell, units: UnitTable, bits_u: np.ndarray, *, packed_bytes: int) -> None:
    """The budget holds exactly, counted in whole weight bits or in bytes on disk."""
    if cell.budget_bytes is not None and packed_bytes > cell.budget_bytes:
        raise TrialError(
            f"the file has {packed_bytes} bytes, the budget is {cell.budget_bytes}: this is a fault of fqsweep"
        )
    if cell.budget_bits is None:
        return
    spent = int(units.num_weights_u @ bits_u)
    limit = cell.budget_bits * int(units.num_weights_u.sum())
    if spent > limit * (1 + 1e-12):
        raise TrialError(
            f"the model spends {spent} bits, the budget is {limit:.0f}: this is a fault of fqsweep"
        )


def load_packed(blob: bytes, setting: Setting) -> nn.Module:
    """The model that a packed file holds, with nothing else from the trial that made it."""
    return load_model(blob).to(setting.device)


def _without_dropped_channels(blob: bytes, recorder: Recorder) -> bytes:
    """The smaller file of the same network: what nobody needs is neither stored nor computed."""
    try:
        return shrink(blob)
    except RemovalError as error:  # the whole network is what was asked for; smaller is a bonus
        recorder.note(f"dropped channels stay in the file: {error}")
        return blob


def _file_notes(setting: Setting) -> dict[str, str]:
    """What a packed file says of itself, so that it can be used without the sweep."""
    cell = setting.cell
    return {
        "architecture": cell.architecture.name,
        "image_size": str(cell.dataset.image_size),
        "classes": json.dumps(setting.dataset.samples.class_names),
        "normalisation": json.dumps({"mean": setting.normalisation.mean, "std": setting.normalisation.std}),
    }


def _group_metrics(split: str, report: FairnessReport, setting: Setting) -> dict[str, float]:
    metrics = {}
    for name, accuracy, count in zip(
        setting.group.names, report.acc_per_group, report.count_per_group, strict=True
    ):
        metrics[group_metric_key(split, "count_group", name)] = float(count)
        if np.isfinite(accuracy):
            metrics[group_metric_key(split, "acc_group", name)] = float(accuracy)
    return metrics


def _write_confusion(folder: Path, setting: Setting, reports: dict[str, FairnessReport]) -> None:
    """Which class each group's images were taken for: a table of both splits, and the test split as a picture."""
    groups, classes = setting.group.names, setting.dataset.samples.class_names
    rows = []
    for split, report in reports.items():
        for g, t, p in np.argwhere(report.confusion_gtp):
            values = (split, groups[g], classes[t], classes[p], int(report.confusion_gtp[g, t, p]))
            rows.append(dict(zip(CONFUSION_COLUMNS, values, strict=True)))
    write_bytes(folder / "confusion.csv", _as_csv(rows, CONFUSION_COLUMNS))
    picture = draw_confusion(
        reports["test"].confusion_gtp, groups=groups, classes=classes, title=f"{setting.cell.title}, test"
    )
    write_bytes(folder / "confusion.png", picture)


def _as_csv(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, columns)
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()


def _bits_table(units: UnitTable, bits_u: np.ndarray) -> list[dict[str, Any]]:
    rows = []
    for layer in units.layers:
        own = bits_u[layer.start : layer.stop]
        counts = [int((own == b).sum()) for b in range(9)]
        values = (layer.name, layer.num_units, layer.num_weights, float(own.mean()), *counts)
        rows.append(dict(zip(BITS_COLUMNS, values, strict=True)))
    return rows
