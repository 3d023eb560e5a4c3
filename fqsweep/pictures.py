"""Where the bits went: one picture a trial, layers against bit-widths."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

MAX_LABELLED_LAYERS = 30


def draw_bits(layers: Sequence[dict[str, Any]], *, title: str) -> bytes:
    """A PNG: for each layer (in the order of the model) the share of its units at each width.

    Args:
        layers: rows with ``layer``, ``units``, ``mean_bits`` and ``units_at_0`` to ``units_at_8``.
        title: what the picture is of.
    """
    count_lb = np.array([[row[f"units_at_{b}"] for b in range(9)] for row in layers], dtype=float)
    share_lb = count_lb / np.maximum(count_lb.sum(axis=1, keepdims=True), 1)
    mean_l = np.array([row["mean_bits"] for row in layers])
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(share_lb.T, origin="lower", aspect="auto", cmap="cividis", vmin=0, vmax=1)
    axes.plot(mean_l, color="white", linewidth=3)
    axes.plot(mean_l, color="#d55e00", linewidth=1.5, label="mean of the layer")
    axes.set_ylabel("bits")
    axes.set_yticks(range(9))
    axes.set_ylim(-0.5, 8.5)
    every = max(1, -(-len(layers) // MAX_LABELLED_LAYERS))
    places = range(0, len(layers), every)
    axes.set_xticks(list(places), [layers[i]["layer"] for i in places], rotation=90, fontsize=7)
    axes.set_title(title, fontsize=9, loc="left")
    axes.legend(fontsize=7, loc="upper right")
    figure.colorbar(image, ax=axes, label="share of units")
    stream = BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()
