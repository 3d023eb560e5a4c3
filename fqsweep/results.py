"""The record that a trial leaves on disk: read by the driver, which needs no torch for it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """What a finished trial leaves.

    Attributes:
        key, title, params, weights: what was asked for.
        metrics: every key of ``names.metric_keys`` and the groups' own; all finite.
        history: one mapping an epoch of this trial's own training (the parent's for fp32).
        layers: one row a layer, columns ``trial.BITS_COLUMNS``.
        pruned: the trial was stopped early: ``metrics`` holds its time alone, ``history`` its epochs so far.
    """

    key: str
    title: str
    params: dict[str, str]
    weights: dict[str, float]
    metrics: dict[str, float]
    history: list[dict[str, float]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    pruned: bool = False


def read_result(path: Path) -> TrialResult:
    """Read a ``result.json``."""
    return TrialResult(**json.loads(path.read_text()))
