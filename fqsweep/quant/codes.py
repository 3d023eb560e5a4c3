"""Levels as codes of a few bits, and codes as bytes (the layout is in docs/packed_format.md).

Axes: u units, n weights of a unit or values in a row, b bits of a code.
"""

from __future__ import annotations

import numpy as np
import torch

from fqsweep.quant.levels import LIMIT_BY_BITS, limits_of, round_to_levels


def codes_of(level_un: torch.Tensor, width: int) -> np.ndarray:
    """Levels of units of one width as whole numbers from 0, uint8 (values,)."""
    if width == 1:
        return (level_un > 0).numpy().astype(np.uint8).ravel()
    return (level_un + LIMIT_BY_BITS[width]).numpy().astype(np.uint8).ravel()


def codes_to_bytes(code_n: np.ndarray, width: int) -> np.ndarray:
    """Codes side by side, most significant bit first, the last byte padded with zeros: uint8."""
    plane_nb = (code_n[:, None] >> np.arange(width - 1, -1, -1, dtype=np.uint8)) & 1
    return np.packbits(plane_nb.astype(np.uint8).ravel())


def levels_from_bytes(packed: np.ndarray, count: int, width: int) -> np.ndarray:
    """Levels, float32 (count,), from what ``codes_to_bytes`` gives.

    Raises:
        ValueError: so many codes do not take so many bytes.
    """
    if len(packed) != (count * width + 7) // 8:
        raise ValueError(f"codes of {width} bits have {len(packed)} bytes")
    plane_nb = np.unpackbits(packed, count=count * width).reshape(count, width)
    code_n = plane_nb @ (1 << np.arange(width - 1, -1, -1)).astype(np.float32)
    return (code_n - LIMIT_BY_BITS[width]).astype(np.float32)


def codes_as_bytes(weight_un: np.ndarray, step_u: np.ndarray, bits: int) -> np.ndarray:
    """The codes of units of one width as in a packed file, but padded to whole bytes for every 8 codes.

    Args:
        weight_un: float32 (u, n), on the grid of ``step_u``; bits: 1 to 8.
    """
    widths = torch.full((len(step_u),), bits)
    level_un = round_to_levels(
        torch.from_numpy(weight_un), torch.from_numpy(step_u)[:, None], *limits_of(widths)
    )
    code_n = codes_of(level_un, bits)
    return codes_to_bytes(np.concatenate([code_n, np.zeros(-len(code_n) % 8, dtype=np.uint8)]), bits)


def pair_widths(width_n: np.ndarray) -> np.ndarray:
    """Widths up to 15, two a byte, high half first."""
    padded = np.concatenate([width_n, np.zeros(len(width_n) % 2, dtype=np.uint8)])
    return (padded[0::2] << 4 | padded[1::2]).astype(np.uint8)


def unpair_widths(packed: np.ndarray, count: int) -> np.ndarray:
    """What ``pair_widths`` was given, uint8 (count,)."""
    return np.stack([packed >> 4, packed & 15], axis=1).ravel()[:count]
