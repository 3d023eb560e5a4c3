"""The full-precision parent and the cost table: computed once, shared by every trial that needs them.

Both lie on disk under a key of what determines them. Whoever asks first computes, under a lock; a
file is there whole or not at all. A process that dies while it trains leaves a checkpoint, from which the next
one goes on.
"""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch import nn

from fqsweep.checkpoints import Checkpoint
from fqsweep.config import Allocating
from fqsweep.cost_table import Importance, load_importance, save_importance
from fqsweep.files import SweepPaths, locked, write_bytes, write_json
from fqsweep.importance import measure_importance
from fqsweep.models import build_model
from fqsweep.names import is_of_groups
from fqsweep.quant.units import list_units
from fqsweep.setting import Setting, seed_everything
from fqsweep.training import Recorder, TrainingPlan, train


def ensure_baseline(setting: Setting, paths: SweepPaths, recorder: Recorder) -> nn.Module:
    """The trained parent of a cell, on the setting's device in eval mode; trained now if it is not on disk."""
    folder = paths.baseline(setting.cell.baseline_key)
    with locked(folder):
        if not paths.baseline_meta(setting.cell.baseline_key).exists():
            _train_baseline(setting, paths, recorder)
    return setting.model_with(load_file(folder / "model.safetensors"))


def _train_baseline(setting: Setting, paths: SweepPaths, recorder: Recorder) -> None:
    cell, recipe = setting.cell, setting.cell.recipe
    recorder.note(f"training the full-precision parent of {cell.title}")
    seed_everything(cell.seed)
    model = build_model(
        cell.architecture, num_classes=setting.num_classes, image_size=cell.dataset.image_size
    ).to(setting.device)
    plan = TrainingPlan(
        epochs=recipe.epochs,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        warmup_frac=recipe.warmup_frac,
        gradient_clip=recipe.gradient_clip,
        patience=recipe.patience,
        schedule=recipe.schedule,
        ema_decay=recipe.ema_decay,
        autocast=setting.autocast,
        channels_last=setting.channels_last,
    )
    folder = paths.baseline(cell.baseline_key)
    checkpoint = Checkpoint(paths.checkpoint(cell.baseline_key), stop_request=paths.cancel_request)
    log = train(
        model,
        setting.training_batches(seed=cell.seed),
        plan,
        evaluate=lambda trained: setting.score(trained, "val", autocast=True)[0],
        recorder=recorder,
        checkpoint=checkpoint,
    )
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_bytes(folder / "model.safetensors", save_tensors(state))
    meta = {
        "architecture": cell.architecture.name,
        "dataset": cell.dataset.name,
        "data_digest": setting.dataset.digest,
        "seed": cell.seed,
        "group_attribute": cell.group_attribute,
        "train_s": log.train_s,
        "total_s": checkpoint.spent_s,
        "epochs": log.epochs,
        "best_epoch": log.best_epoch,
    }
    write_json(paths.baseline_meta(cell.baseline_key), meta)
    checkpoint.remove()


def baseline_curve(setting: Setting, paths: SweepPaths) -> list[dict[str, float]]:
    """The metrics of each epoch of the parent's training.

    Those that depend on groups are of the group attribute under which it was trained: a cell of another attribute
    goes without them.
    """
    noted = json.loads(paths.baseline_meta(setting.cell.baseline_key).read_text(encoding="utf-8"))
    epochs: list[dict[str, float]] = noted["epochs"]
    if noted.get("group_attribute", setting.cell.group_attribute) == setting.cell.group_attribute:
        return epochs
    return [{key: value for key, value in epoch.items() if not is_of_groups(key)} for epoch in epochs]


def ensure_importance(setting: Setting, parent: nn.Module, paths: SweepPaths, recorder: Recorder) -> Importance:
    """The cost table of a cell; measured now if it is not on disk."""
    cell = setting.cell
    settings = cell.point.settings
    assert isinstance(settings, Allocating) and cell.importance_key is not None
    path = paths.importance(cell.importance_key)
    with locked(path):
        if not path.exists():
            recorder.note(f"measuring importance ({settings.importance}) for {cell.title}")
            save_importance(path, _measure(setting, parent, settings, recorder))
    return load_importance(path)


def _measure(setting: Setting, parent: nn.Module, settings: Allocating, recorder: Recorder) -> Importance:
    importance = measure_importance(
        parent,
        list_units(parent, granularity=settings.granularity, exempt=settings.exempt),
        setting.calibration_batches(),
        num_groups=len(setting.group.names),
        predictor=settings.importance,
        choices=settings.measured_choices,
        scale=settings.scale,
        seed=setting.cell.seed,
        progress=lambda stage, frac: recorder.note(f"importance: {stage} {frac:.0%}"),
    )
    recorder.note(f"importance took {importance.seconds:.1f} s, {importance.passes:g} passes over the images")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return importance
