"""Step sizes before fine-tuning: for every unit and bit choice, the step of its grid.

Axes: u units of a layer, n weights of a unit, b bit choices.
"""

from __future__ import annotations

import torch

from fqsweep.config import ScaleRule
from fqsweep.quant.levels import absmax_steps, limits_of, round_to_levels

# Shares of the abs-max step that are tried. Wide grids lose little by clipping, so fewer are tried there.
NARROW_SHARES = tuple(0.22 + 0.06 * i for i in range(14))
WIDE_SHARES = (0.6, 0.7, 0.8, 0.9, 1.0)
NARROW_UP_TO_BITS = 4


def choose_steps(
    weight_un: torch.Tensor,
    choices: tuple[int, ...],
    *,
    rule: ScaleRule,
    curvature_un: torch.Tensor | None = None,
) -> torch.Tensor:
    """Steps per unit and choice.

    ``absmax`` reaches the largest weight. ``mse`` tries shares of that and keeps the least squared
    error; ``curvature`` weights the error by the second moment of the input that each weight multiplies,
    which is the diagonal of the layer's Gauss-Newton matrix up to a factor per unit.

    Args:
        weight_un: float32 (u, n).
        choices: bit-widths.
        rule: see above.
        curvature_un: not negative, (u, n) or (1, n); for ``curvature`` only.

    Returns:
        float32 (u, b).
    """
    if rule == "curvature" and curvature_un is None:
        raise ValueError("rule 'curvature' needs curvature_un")
    importance_un = curvature_un if rule == "curvature" else None
    return torch.cat([_steps_at(weight_un, bits, rule, importance_un) for bits in choices], dim=1)


def _steps_at(
    weight_un: torch.Tensor, bits: int, rule: ScaleRule, importance_un: torch.Tensor | None
) -> torch.Tensor:
    bits_u = torch.full((len(weight_un),), bits, dtype=torch.long, device=weight_un.device)
    widest = absmax_steps(weight_un, bits_u)
    if rule == "absmax" or bits == 0:
        return widest
    if bits == 1:
        return 2 * _weighted_mean(weight_un.abs(), importance_un)
    limit_u1, offset_u1 = limits_of(bits_u)
    best_step, best_error = widest, torch.full_like(widest, torch.inf)
    for share in NARROW_SHARES if bits <= NARROW_UP_TO_BITS else WIDE_SHARES:
        step = widest * share
        error_un = round_to_levels(weight_un, step, limit_u1, offset_u1).mul_(step).sub_(weight_un).square_()
        error = _weighted_mean(error_un, importance_un)
        better = error < best_error
        best_step, best_error = torch.where(better, step, best_step), torch.where(better, error, best_error)
    return best_step


def _weighted_mean(value_un: torch.Tensor, importance_un: torch.Tensor | None) -> torch.Tensor:
    """Mean over a unit's weights; plain where all importances of a unit are 0."""
    if importance_un is None:
        return value_un.mean(dim=1, keepdim=True)
    importance_un = importance_un.expand_as(value_un)
    total = importance_un.sum(dim=1, keepdim=True)
    weighted = (value_un * importance_un).sum(dim=1, keepdim=True) / total.clamp(min=1e-30)
    return torch.where(total > 0, weighted, value_un.mean(dim=1, keepdim=True))
