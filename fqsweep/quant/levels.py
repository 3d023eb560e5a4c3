"""The grids: which levels a bit-width has, and the nearest of them.

Axes: u units (rows), n weights of a unit (columns).

One formula covers every width. With b bits the levels are (k + o) * step:
- b from 2 to 8: whole numbers k from -(2^(b-1)-1) to 2^(b-1)-1, o = 0;
- b = 1: the half-numbers -1/2 and +1/2, so that the levels are -step/2 and +step/2;
- b = 0: step = 0, every weight becomes 0 and nothing is stored.
"""

from __future__ import annotations

from functools import lru_cache

import torch

MAX_BITS = 8
# Largest level and offset by bit-width, in steps.
LIMIT_BY_BITS = (0.0, 0.5, *(float(2 ** (b - 1) - 1) for b in range(2, MAX_BITS + 1)))
OFFSET_BY_BITS = (0.0, 0.5, *(0.0 for _ in range(2, MAX_BITS + 1)))


def limits_of(bits_u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest level and offset per unit, float32 (u, 1), from integer widths (u,)."""
    limit_b, offset_b = _tables(bits_u.device)
    width_u = bits_u.long()
    return limit_b[width_u][:, None], offset_b[width_u][:, None]


@lru_cache(maxsize=16)
def _tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Limits and offsets by width, copied to a device once: a copy in every step would make the host wait."""
    return torch.tensor(LIMIT_BY_BITS, device=device), torch.tensor(OFFSET_BY_BITS, device=device)


def round_to_levels(
    weight_un: torch.Tensor, step_u1: torch.Tensor, limit_u1: torch.Tensor, offset_u1: torch.Tensor
) -> torch.Tensor:
    """Nearest level of each weight, in steps; exact multiples of 1 (or odd multiples of 1/2 at 1 bit)."""
    divisor_u1 = torch.where(step_u1 > 0, step_u1, torch.ones_like(step_u1))
    level_un = weight_un / divisor_u1
    return level_un.sub_(offset_u1).round_().add_(offset_u1).clamp_(-limit_u1, limit_u1)


def absmax_steps(weight_un: torch.Tensor, bits_u: torch.Tensor) -> torch.Tensor:
    """Steps (u, 1) that just reach the largest weight; at 1 bit twice the mean magnitude; 0 at 0 bits."""
    limit_u1, _ = limits_of(bits_u)
    bits_u1 = bits_u.long()[:, None]
    absmax_u1 = weight_un.abs().amax(dim=1, keepdim=True)
    mean_u1 = weight_un.abs().mean(dim=1, keepdim=True)
    wide = absmax_u1 / limit_u1.clamp(min=1.0)
    return torch.where(bits_u1 >= 2, wide, torch.where(bits_u1 == 1, 2 * mean_u1, torch.zeros_like(mean_u1)))
