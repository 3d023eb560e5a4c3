"""A cost table: what quantising each unit is predicted to cost each group, reduced over groups, and on disk.

Axes: g groups, u units, b bit choices.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np

from fqsweep.config import Predictor, Reducer, ScaleRule
from fqsweep.files import write_bytes

CVAR_FRAC = 0.5
# What a predictor costs in forward passes over the calibration images, whatever the choices and for each of them;
# going back counts as two. Beside it there are one pass for the groups' losses, and one for ``curvature``.
PASSES: dict[Predictor, tuple[int, int]] = {
    "taylor_matched": (5, 2),
    "taylor": (3, 1),
    "gradient": (3, 0),
    "grape": (3, 0),
    "fisher": (3, 0),
    "hawq": (48, 0),
}


@dataclass(frozen=True, kw_only=True)
class Importance:
    """A cost table with what it rests on.

    Attributes:
        cost_gub: float64 (g, u, b), not negative and finite.
        choices: the b bit-widths.
        step_ub: float32 (u, 9), start steps at widths 0..8; NaN where a width is no choice.
        loss_g: mean full-precision loss of each group on the calibration images.
        count_g: calibration images per group.
        passes: cost in passes over the calibration images, in forward passes of the model.
    """

    cost_gub: np.ndarray
    choices: tuple[int, ...]
    step_ub: np.ndarray
    loss_g: np.ndarray
    count_g: np.ndarray
    passes: float
    seconds: float


def count_passes(predictor: Predictor, *, num_choices: int, scale: ScaleRule) -> int:
    """What a cost table costs, in forward passes over the calibration images."""
    fixed, per_choice = PASSES[predictor]
    return 1 + (scale == "curvature") + fixed + per_choice * num_choices


def reduce_groups(cost_gub: np.ndarray, reducer: Reducer, *, loss_g: np.ndarray) -> np.ndarray:
    """Group costs as one table, float64 (u, b).

    - ``mean``, ``max``: over groups, entry by entry;
    - ``cvar``: mean over the worse half of the groups, at least one, entry by entry;
    - ``balanced``: mean after every group's table is scaled to the same total, so that no group counts less
      because its losses are smaller;
    - ``subtractive``: cost of the group with the highest full-precision loss minus that of the lowest, sign
      kept (FairPrune's and FairQuantize's contrast of a disadvantaged and an advantaged group).

    Raises:
        ValueError: ``subtractive`` with one group, or ``none``, which keeps groups apart.
    """
    if reducer == "mean":
        return np.asarray(cost_gub.mean(axis=0))
    if reducer == "max":
        return np.asarray(cost_gub.max(axis=0))
    if reducer == "cvar":
        worst = max(1, int(np.ceil(CVAR_FRAC * len(cost_gub))))
        return np.asarray(np.sort(cost_gub, axis=0)[-worst:].mean(axis=0))
    if reducer == "balanced":
        total_g = cost_gub.sum(axis=(1, 2), keepdims=True)
        scale = np.where(total_g > 0, total_g.mean() / np.where(total_g > 0, total_g, 1), 1.0)
        return np.asarray((cost_gub * scale).mean(axis=0))
    if reducer == "subtractive":
        if len(cost_gub) < 2:
            raise ValueError("reducer subtractive contrasts two groups; there is only one")
        return np.asarray(cost_gub[int(loss_g.argmax())] - cost_gub[int(loss_g.argmin())])
    raise ValueError(f"reducer {reducer!r} does not make one table of the groups' costs")


def save_importance(path: Path, importance: Importance) -> None:
    """Write a cost table, whole or not at all."""
    stream = BytesIO()
    np.savez_compressed(
        stream,
        cost_gub=importance.cost_gub,
        choices=np.array(importance.choices),
        step_ub=importance.step_ub,
        loss_g=importance.loss_g,
        count_g=importance.count_g,
        spent=np.array([importance.passes, importance.seconds]),
    )
    write_bytes(path, stream.getvalue())


def load_importance(path: Path) -> Importance:
    """Read what ``save_importance`` wrote."""
    with np.load(path, allow_pickle=False) as content:
        return Importance(
            cost_gub=content["cost_gub"],
            choices=tuple(int(b) for b in content["choices"]),
            step_ub=content["step_ub"],
            loss_g=content["loss_g"],
            count_g=content["count_g"],
            passes=float(content["spent"][0]),
            seconds=float(content["spent"][1]),
        )
