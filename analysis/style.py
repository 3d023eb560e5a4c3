"""How a variant looks, the same in every figure: a colour that colour-blind readers can tell, and a shape."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

from analysis.columns import REFERENCE_VARIANT, variant_rank

# Okabe and Ito (2008) without yellow and black, which vanish on white and on dark ground; then four that are told
# from these less easily, and by their shapes.
COLORS = (
    *("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8c8c8c"),
    *("#7a68c7", "#a0793d", "#9aa03a", "#3f8f8f"),
)
# (matplotlib, plotly, an SVG path in a box of 16 x 16); as many as share no divisor with the colours, so that pairs
# repeat late.
SHAPES = (
    ("o", "circle", "M8 2.5a5.5 5.5 0 1 0 .01 0z"),
    ("s", "square", "M3 3h10v10H3z"),
    ("^", "triangle-up", "M8 2l6.5 11.5h-13z"),
    ("D", "diamond", "M8 1l7 7-7 7-7-7z"),
    ("v", "triangle-down", "M8 14L1.5 2.5h13z"),
    ("P", "cross", "M6 2h4v4h4v4h-4v4H6v-4H2V6h4z"),
    ("X", "x", "M4.2 1.4L8 5.2l3.8-3.8 2.8 2.8L10.8 8l3.8 3.8-2.8 2.8L8 10.8l-3.8 3.8-2.8-2.8L5.2 8 1.4 4.2z"),
    ("*", "star", "M8 1l2.1 4.7 5.1.5-3.8 3.4 1.1 5L8 12l-4.5 2.6 1.1-5L.8 6.2l5.1-.5z"),
)
# Names that the shipped search spaces use, ours with the strongest looks.
USUAL = (
    *("baq", "static", "static-untrained", "uniform-8", "uniform-4", "uniform-2-ft", "uniform-2"),
    *("fairgrape", "fairquantize", "hawq", "reference"),
)
REFERENCE_COLOR = "#767676"
FRONT_COLOR = "#8a8a8a"
BITS_TICKS = (0.125, 0.25, 0.5, 1, 2, 3, 4, 6, 8, 16, 32)


@dataclass(frozen=True, kw_only=True)
class Look:
    """Colour and marker of a variant: matplotlib's, Plotly's, and as an SVG path."""

    color: str
    marker: str
    symbol: str
    path: str


def looks(variants: Iterable[str]) -> dict[str, Look]:
    """A look for each quantised variant: to the usual names their own, in every sweep; to others what is left.

    >>> looks(["baq", "static"])["static"] == looks(["fp32", "mine", "static"])["static"]
    True
    """
    named = (v for v in variants if v.split(" (")[0] != REFERENCE_VARIANT)  # joined sweeps: "fp32 (name)"
    quantised = sorted(named, key=variant_rank, reverse=True)
    taken = {USUAL.index(variant) for variant in quantised if variant in USUAL}
    left = (place for place in itertools.count() if place not in taken)
    return {v: _look(USUAL.index(v) if v in USUAL else next(left)) for v in quantised}


def _look(place: int) -> Look:
    marker, symbol, path = SHAPES[place % len(SHAPES)]
    return Look(color=COLORS[place % len(COLORS)], marker=marker, symbol=symbol, path=path)


def marker_size(place: int, num: int) -> float:
    """Points across: what is drawn earlier is larger, so that equal values do not hide each other.

    >>> marker_size(0, 3), marker_size(2, 3)
    (7.6, 6.0)
    """
    return 6.0 + 0.8 * (num - 1 - place)


def bits_ticks(low: float, high: float) -> list[float]:
    """The ticks of a logarithmic axis of bits that cover the range, without those that would touch."""
    ticks = [t for t in BITS_TICKS if low / 1.3 <= t <= high * 1.3]
    return [t for t in ticks if t not in (3, 6)] if len(ticks) > 6 else ticks


def heat_color(share: float) -> tuple[str, str]:
    """Ground and text colour for a value from 0 (worst) to 1 (best) of a heat map.

    Light to dark blue, so that it also reads without colour; text is black or white, whichever contrasts more.

    >>> heat_color(0.0), heat_color(1.0)
    (('#eef3f8', '#000000'), ('#08428c', '#ffffff'))
    """
    share = min(max(share, 0.0), 1.0) if math.isfinite(share) else 0.0
    light, dark = (238, 243, 248), (8, 66, 140)
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(light, dark, strict=True))
    return f"#{red:02x}{green:02x}{blue:02x}", "#000000" if _luminance(red, green, blue) > 0.179 else "#ffffff"


def _luminance(*rgb: int) -> float:
    """Relative luminance as WCAG 2 defines it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in rgb)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
