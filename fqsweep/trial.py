"""One cell in, one result out: the story of a trial, without Ray and without MLflow.

data -> parent (shared) -> importance (shared) -> allocation -> quantisers -> weights reconstructed, outputs matched
-> fine-tuning -> packed file without dropped channels -> the model read back from that file -> metrics. What is
scored is what lies on disk.
"""

from __future__ import annotations

import csv
import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fqsweep.baseline import ensure_baseline
from fqsweep.cells import Cell, exempt_of, granularity_of, run_params
from fqsweep.checkpoints import Checkpoint
from fqsweep.config import Fp32Method
from fqsweep.errors import TrialError
from fqsweep.fairness import FairnessReport
from fqsweep.files import (
    BITS_PICTURE,
    BITS_TABLE,
    CONFUSION_PICTURE,
    CONFUSION_TABLE,
    MODEL_FILE,
    SweepPaths,
    write_bytes,
    write_json,
)
from fqsweep.finetuning import quantise
from fqsweep.models import count_macs
from fqsweep.names import group_metric_key
from fqsweep.pictures import draw_bits, draw_confusion
from fqsweep.quant.convert import QuantisedState
from fqsweep.quant.costs import effective_gbops, mean_weight_bits
from fqsweep.quant.packed_model import load_model, shrink
from fqsweep.quant.packing import pack_weights
from fqsweep.quant.removal import RemovalError
from fqsweep.quant.units import UnitTable, list_units
from fqsweep.results import TrialResult
from fqsweep.setting import Setting, open_setting, seed_everything
from fqsweep.training import Recorder

BITS_COLUMNS = ("layer", "units", "weights_per_unit", "mean_bits", *(f"units_at_{b}" for b in range(9)))
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

    Its checkpoint stays until the folder is at its place: whoever puts it there removes it.

    Args:
        weights: values of the cell's free weights.
        device: ``cpu`` or ``cuda``.

    Raises:
        TrialError, InputError: the trial cannot be done as asked; nothing easier is done instead.
    """
    checkpoint = Checkpoint(paths.checkpoint(key), stop_request=paths.cancel_request)
    setting = open_setting(cell, paths=paths, data_dir=data_dir, device=device)
    parent = ensure_baseline(setting, paths, recorder)
    seed_everything(cell.seed)
    units = list_units(parent, granularity=granularity_of(cell), exempt=exempt_of(cell))
    macs = count_macs(parent, image_size=cell.dataset.image_size)
    state, bits_u, log = quantise(setting, parent, units, weights, paths, recorder, checkpoint)
    blob = _pack(state, setting, recorder)
    _check_budget(cell, units, bits_u, packed_bytes=len(blob))
    write_bytes(paths.trial(key) / MODEL_FILE, blob)
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
        "time/total_s": checkpoint.spent_s,
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
    if not isinstance(cell.point.settings, Fp32Method):
        _write_bits(paths.trial(key), setting, layers)
    _write_confusion(paths.trial(key), setting, {"validation": val_report, "test": test_report})
    write_json(paths.result(key), asdict(result))
    return result


# --- from quantised state to numbers -------------------------------------------------------------


def _pack(state: QuantisedState, setting: Setting, recorder: Recorder) -> bytes:
    """The packed file, without dropped channels: what nobody needs is neither stored nor computed."""
    blob = pack_weights(
        state.tensors,
        {f"{name}.weight": bits for name, bits in state.bits.items()},
        steps={f"{name}.weight": steps for name, steps in state.steps.items()},
        metadata=setting.file_notes,
    )
    if all(bits.all() for bits in state.bits.values()):
        return blob
    try:
        return shrink(blob)
    except RemovalError as error:
        if setting.cell.budget_bytes is not None:
            raise TrialError(
                f"dropped channels, which a budget in bytes does not hold, stay: {error}"
            ) from error
        # The whole network is what was asked for; smaller is a bonus.
        recorder.note(f"dropped channels stay in the file: {error}")
        return blob


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


def _group_metrics(split: str, report: FairnessReport, setting: Setting) -> dict[str, float]:
    metrics = {}
    for name, accuracy, count in zip(
        setting.group.names, report.acc_per_group, report.count_per_group, strict=True
    ):
        metrics[group_metric_key(split, "count_group", name)] = float(count)
        if np.isfinite(accuracy):
            metrics[group_metric_key(split, "acc_group", name)] = float(accuracy)
    return metrics


def _write_bits(folder: Path, setting: Setting, layers: list[dict[str, Any]]) -> None:
    write_bytes(folder / BITS_TABLE, _as_csv(layers, BITS_COLUMNS))
    write_bytes(folder / BITS_PICTURE, draw_bits(layers, title=setting.cell.title))


def _write_confusion(folder: Path, setting: Setting, reports: dict[str, FairnessReport]) -> None:
    """Which class each group's images were taken for: a table of both splits, and the test split as a picture."""
    groups, classes = setting.group.names, setting.dataset.samples.class_names
    rows = []
    for split, report in reports.items():
        for g, t, p in np.argwhere(report.confusion_gtp):
            values = (split, groups[g], classes[t], classes[p], int(report.confusion_gtp[g, t, p]))
            rows.append(dict(zip(CONFUSION_COLUMNS, values, strict=True)))
    write_bytes(folder / CONFUSION_TABLE, _as_csv(rows, CONFUSION_COLUMNS))
    picture = draw_confusion(
        reports["test"].confusion_gtp, groups=groups, classes=classes, title=f"{setting.cell.title}, test"
    )
    write_bytes(folder / CONFUSION_PICTURE, picture)


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
