"""Two pictures a trial: where the bits went (layers against bit-widths), and each group's confusions."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

MAX_LABELLED_LAYERS = 30
MAX_LABELLED_CLASSES = 12
SMALLEST_SHARE = 0.005  # what would be written as 0 is not
# Margins are set, in inches, rather than found by matplotlib's layout engine, which takes as long as the drawing.
INCHES_A_LETTER = 0.075  # of a 7 point label, generously
BAR_WIDTH, BAR_MARGIN = 0.12, 0.65


def draw_bits(layers: Sequence[dict[str, Any]], *, title: str) -> bytes:
    """A PNG: for each layer (in the order of the model) the share of its units at each width.

    Args:
        layers: rows with ``layer``, ``units``, ``mean_bits`` and ``units_at_0`` to ``units_at_8``.
        title: what the picture is of.
    """
    count_lb = np.array([[row[f"units_at_{b}"] for b in range(9)] for row in layers], dtype=float)
    share_lb = count_lb / np.maximum(count_lb.sum(axis=1, keepdims=True), 1)
    mean_l = np.array([row["mean_bits"] for row in layers])
    names = [row["layer"] for row in layers]
    below = 0.15 + INCHES_A_LETTER * _longest(names)
    figure, (axes,), bar = _framed(1, width=7.5, height=2.6, left=0.5, below=below, above=0.3)
    image = axes.imshow(share_lb.T, origin="lower", aspect="auto", cmap="cividis", vmin=0, vmax=1)
    axes.plot(mean_l, color="white", linewidth=3)
    axes.plot(mean_l, color="#d55e00", linewidth=1.5, label="mean of the layer")
    axes.set_ylabel("bits")
    axes.set_yticks(range(9))
    axes.set_ylim(-0.5, 8.5)
    every = max(1, -(-len(layers) // MAX_LABELLED_LAYERS))
    places = range(0, len(layers), every)
    axes.set_xticks(list(places), [names[i] for i in places], rotation=90, fontsize=7)
    axes.set_title(title, fontsize=9, loc="left")
    axes.legend(fontsize=7, loc="upper right")
    figure.colorbar(image, cax=bar, label="share of units")
    return _as_png(figure)


def draw_confusion(
    confusion_gtp: np.ndarray, *, groups: Sequence[str], classes: Sequence[str], title: str
) -> bytes:
    """A PNG: one square a group, rows the true classes, columns what they were taken for, as shares of a row.

    Args:
        confusion_gtp: counts, (groups, true class, predicted class).
        groups, classes: their names; classes are named up to ``MAX_LABELLED_CLASSES``, with shares of 1 % and more.
        title: what the picture is of.
    """
    share_gtp = confusion_gtp / np.maximum(confusion_gtp.sum(axis=2, keepdims=True), 1)
    named = len(classes) <= MAX_LABELLED_CLASSES
    margin = 0.35 + (INCHES_A_LETTER * _longest(classes) if named else 0.0)
    figure, axes_g, bar = _framed(
        len(groups), width=2.4, height=2.4, left=margin, between=0.15, below=margin, above=0.6
    )
    for axes, name, share_tp, count_tp in zip(axes_g, groups, share_gtp, confusion_gtp, strict=True):
        image = axes.imshow(share_tp, cmap="cividis", vmin=0, vmax=1)
        axes.set_title(f"{name}: {int(count_tp.sum())} images".replace("$", r"\$"), fontsize=8)
        axes.set_xlabel("predicted", fontsize=8)
        _name_classes(axes, share_tp, classes if named else (), at_the_left=axes is axes_g[0])
    axes_g[0].set_ylabel("true", fontsize=8)
    figure.colorbar(image, cax=bar, label="share of the true class")
    figure.suptitle(title.replace("$", r"\$"), fontsize=9, x=0.01, ha="left")
    return _as_png(figure)


def _longest(names: Sequence[str]) -> int:
    """Letters of the longest name."""
    return max(map(len, names), default=0)


def _framed(
    num_plots: int,
    *,
    width: float,
    height: float,
    left: float,
    below: float,
    above: float,
    between: float = 0.0,
) -> tuple[Figure, list[Axes], Axes]:
    """A figure of plots side by side and a colour bar at the right; sizes of one plot and margins in inches."""
    plots_width = left + num_plots * (width + between) - between
    whole_width = plots_width + BAR_MARGIN + 0.1
    whole_height = below + height + above
    figure = Figure(figsize=(whole_width, whole_height))
    FigureCanvasAgg(figure)

    def place(from_left: float, wide: float) -> Axes:
        shares = (from_left / whole_width, below / whole_height, wide / whole_width, height / whole_height)
        return figure.add_axes(shares)

    plots = [place(left + i * (width + between), width) for i in range(num_plots)]
    return figure, plots, place(plots_width + 0.1, BAR_WIDTH)


def _name_classes(axes: Any, share_tp: np.ndarray, classes: Sequence[str], *, at_the_left: bool) -> None:
    """Names below and at the left, and percentages in the squares; neither where no class is named."""
    labels = [name.replace("$", r"\$") for name in classes]
    axes.set_xticks(range(len(classes)), labels, rotation=90, fontsize=7)
    axes.set_yticks(range(len(classes)) if at_the_left else (), labels if at_the_left else (), fontsize=7)
    for (t, p), share in np.ndenumerate(share_tp) if labels else ():
        if share < SMALLEST_SHARE:
            continue
        color = "black" if share > 0.6 else "white"
        axes.text(p, t, f"{100 * share:.0f}", ha="center", va="center", fontsize=6, color=color)


def _as_png(figure: Figure) -> bytes:
    stream = BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()
