"""Small drawings as coordinates for inline SVG: they take the page's colours, print, and need no script.

All places are in the units of the drawing's own view box, y downwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from analysis.columns import (
    BITS,
    BYTES,
    bytes_text,
    is_full_precision,
    is_maximized,
    on_test,
    percent,
    variants,
)
from analysis.style import REFERENCE_COLOR, bits_ticks, looks
from fqsweep.names import metric_of

WIDTH, HEIGHT = 640.0, 300.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 12.0, 12.0, 40.0
DASHES = ("", "7 4", "2 3", "9 3 2 3", "4 2", "1 4")  # so that lines are told apart without colour
MAX_LINES = 6
MAX_DOTS = 400
RADAR_METRICS = (
    ("test/acc_worst", "worst group"),
    ("test/acc_avg", "mean of groups"),
    ("test/balanced_acc_worst", "worst balanced"),
    ("test/eodd", "EOdd"),
    ("test/eopp1", "EOpp1"),
    (BYTES, "size"),
)
RADAR_RADIUS, RADAR_INNER, RADAR_SIZE = 100.0, 0.15, 340.0


class _Axes:
    """Data to places: x logarithmic or linear, y linear."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], *, log_x: bool) -> None:
        self.log_x = log_x
        low, high = (math.log(v) for v in x) if log_x else x
        self.x = (low, high if high > low else low + 1)
        self.y = (y[0], y[1] if y[1] > y[0] else y[0] + 1e-3)

    def place(self, x: float, y: float) -> tuple[float, float]:
        return self.place_x(x), self.place_y(y)

    def place_x(self, x: float) -> float:
        share = ((math.log(x) if self.log_x else x) - self.x[0]) / (self.x[1] - self.x[0])
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def place_y(self, y: float) -> float:
        share = (y - self.y[0]) / (self.y[1] - self.y[0])
        return round(HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP), 1)

    def y_ticks(self) -> list[tuple[float, str]]:
        """Places and texts, in percent, of five ticks from end to end."""
        values = [self.y[0] + (self.y[1] - self.y[0]) * i / 4 for i in range(5)]
        return [(self.place_y(v), f"{100 * v:.1f}") for v in values]


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in places)


# --- attainment surfaces -------------------------------------------------------------------------


def surfaces_drawing(surfaces: pd.DataFrame, *, metric: str, all_variants: list[str]) -> dict[str, Any] | None:
    """Median attainment surfaces as stairs with the band between the quartiles; None where there are none.

    Args:
        surfaces: ``fronts.attainment_surfaces`` of one panel.
        all_variants: the variants of all panels, for their looks.
    """
    key = on_test(metric)
    if surfaces.empty:
        return None
    median = surfaces[surfaces["percent"] == 50].groupby("variant")[key]
    ends = (median.max() if is_maximized(metric) else -median.min()).sort_values(ascending=False, kind="stable")
    shown = [v for v in variants(surfaces) if v in set(ends.index[:MAX_LINES])]
    part = surfaces[surfaces["variant"].isin(shown)]
    x = float(part[BITS].min()) / 1.1, float(part[BITS].max()) * 1.3
    axes = _Axes(x, (float(part[key].min()), float(part[key].max())), log_x=True)
    look = looks(all_variants)
    lines = []
    for i, variant in enumerate(shown):
        own = part[part["variant"] == variant]
        stairs = {p: _stairs(own[own["percent"] == p], key, axes, x[1]) for p in (25, 50, 75)}
        floor = axes.place_y(axes.y[0] if is_maximized(metric) else axes.y[1])
        band = [*stairs[25], *reversed(stairs[75])]
        band += [(stairs[75][0][0], floor), (stairs[25][0][0], floor)]
        style = {"name": variant, "color": look[variant].color, "dash": DASHES[i % len(DASHES)]}
        lines.append(style | {"line": _points(stairs[50]), "band": _points(band)})
    ticks = [(axes.place_x(t), f"{t:g}") for t in bits_ticks(*x) if x[0] <= t <= x[1]]
    seeds = sorted(part["num_seeds"].unique())
    return {
        "lines": lines,
        "x_ticks": ticks,
        "y_ticks": axes.y_ticks(),
        "num_seeds": " to ".join(str(int(n)) for n in dict.fromkeys((seeds[0], seeds[-1]))),
        "num_left_out": surfaces["variant"].nunique() - len(shown),
    }


def _stairs(corners: pd.DataFrame, key: str, axes: _Axes, end: float) -> list[tuple[float, float]]:
    """From corner to corner: right at the level reached, then up where the next one begins."""
    rows = corners.sort_values(BITS)
    places: list[tuple[float, float]] = []
    for bits, value in zip(rows[BITS], rows[key], strict=True):
        if places:
            places.append((axes.place_x(bits), places[-1][1]))
        places.append(axes.place(bits, value))
    return [*places, (axes.place_x(end), places[-1][1])]


# --- radar ---------------------------------------------------------------------------------------


def radar_drawing(rows: pd.DataFrame, *, all_variants: list[str]) -> dict[str, Any] | None:
    """The variants at one budget on axes from the worst of them (inside) to the best (rim); None below two.

    Args:
        rows: points of one panel: those at one budget, and full precision.
    """
    quantised = rows[~is_full_precision(rows)].sort_values("test/acc_worst", ascending=False).head(MAX_LINES)
    rows = pd.concat([quantised, rows[is_full_precision(rows)]])
    axes = [(key, label) for key, label in RADAR_METRICS if rows[key].notna().all()]
    if len(rows) < 2 or len(axes) < 3:
        return None
    look, center = looks(all_variants), RADAR_SIZE / 2
    lines = []
    for i, (_, row) in enumerate(rows.iterrows()):
        places = [
            _spoke(j, len(axes), _reach(rows[key], row[key], maximize=is_maximized(key)), center)
            for j, (key, _) in enumerate(axes)
        ]
        color = look[row["variant"]].color if row["variant"] in look else REFERENCE_COLOR
        texts = [bytes_text(row[k]) if k == BYTES else percent(row[k]) for k, _ in axes]
        style = {"name": str(row["variant"]), "color": color, "dash": DASHES[i % len(DASHES)]}
        lines.append(style | {"points": _points(places), "texts": texts})
    rim = [_spoke(j, len(axes), 1.0, center) for j in range(len(axes))]
    labels = [(*_spoke(j, len(axes), 1.15, center), label) for j, (_, label) in enumerate(axes)]
    return {
        "lines": lines,
        "rim": _points(rim),
        "spokes": rim,
        "labels": labels,
        "center": center,
        "headings": [label if key == BYTES else f"{label} %" for key, label in axes],
        "meanings": "; ".join(f"{label}: {metric_of(key).meaning}" for key, label in axes),
    }


def _reach(values: pd.Series, value: float, *, maximize: bool) -> float:
    """How far out a value lies: ``RADAR_INNER`` for the worst of ``values``, 1 for the best, or if all are equal."""
    worst, best = (values.min(), values.max()) if maximize else (values.max(), values.min())
    share = float((value - worst) / (best - worst)) if best != worst else 1.0
    return RADAR_INNER + (1 - RADAR_INNER) * share


def _spoke(index: int, num: int, share: float, center: float) -> tuple[float, float]:
    angle = 2 * math.pi * index / num - math.pi / 2
    reach = RADAR_RADIUS * share
    return round(center + reach * math.cos(angle), 1), round(center + reach * math.sin(angle), 1)


# --- slices of the searched weights --------------------------------------------------------------


def slices_drawing(moved: pd.DataFrame, *, metric: str, all_variants: list[str]) -> dict[str, Any] | None:
    """A weight against what it moved, each run a mark; None where nothing was searched.

    Args:
        moved: ``effects.slices``.
    """
    known = moved[moved[metric].notna()]
    if known.empty:
        return None
    shown = known.iloc[:: max(1, math.ceil(len(known) / MAX_DOTS))]
    reach = max(float(shown[metric].abs().max()), 1e-3)
    low, high = float(shown["weight"].min()), float(shown["weight"].max())
    axes = _Axes((low, high), (-reach, reach), log_x=False)
    look, names = looks(all_variants), variants(shown)
    dots = [
        {"x": x, "y": y, "color": look[v].color, "shape": names.index(v) % 4, "name": v}
        for (x, y), v in zip(
            (axes.place(w, m) for w, m in zip(shown["weight"], shown[metric], strict=True)),
            shown["variant"],
            strict=True,
        )
    ]
    x_ticks = [
        (axes.place_x(low + (high - low) * i / 4), f"{low + (high - low) * i / 4:.3g}") for i in range(5)
    ]
    keys = [(name, look[name].color, i % 4) for i, name in enumerate(names)]
    return {"dots": dots, "x_ticks": x_ticks, "y_ticks": axes.y_ticks(), "legend": keys, "num": len(known)}
