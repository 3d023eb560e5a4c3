"""The front as a printed figure (PNG, SVG, PDF): small multiples, one style, no display needed."""

from __future__ import annotations

import io
import math
import sys
import textwrap
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.textpath import TextPath
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from analysis import cli
from analysis.columns import BITS, is_full_precision, is_maximized, on_test, variants
from analysis.intervals import half_width
from analysis.pareto import aggregate, mark_front, select_cells
from analysis.style import FRONT_COLOR, REFERENCE_COLOR, Look, bits_ticks, looks, marker_size
from fqsweep.files import write_bytes
from fqsweep.names import metric_of

FORMATS = ("png", "svg", "pdf")
# The dots show a front of one point too.
FRONT_LINE: dict[str, Any] = {"linewidth": 4, "marker": "o", "markersize": 11, "markeredgewidth": 0}
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "svg.hashsalt": "fqsweep",  # the same figure gives the same file
    "pdf.fonttype": 42,
}
PANEL_INCHES = (3.6, 2.9)
LEAST_WIDTH_INCHES = 6.4
TITLE_LETTERS_PER_INCH = 12.5
LEGEND_KEY_INCHES = 0.6  # a key with the gaps around it
POINTS_AN_INCH = 72


def front_figure(points: pd.DataFrame, *, metric: str) -> Figure:
    """Test figures of the chosen runs against true mean bits: a row a (data set, groups), a column a network.

    Markers are means over seeds, bars their 95 % intervals; grey are the points, and the line between them, that are
    on the front of validation ``metric`` against bits; the dashed line is full precision.

    Args:
        points: ``pareto.mark_front``.
        metric: the validation metric that chose.
    """
    key = on_test(metric)
    quantised = points[~is_full_precision(points)]
    rows = sorted(set(zip(points["dataset"].astype(str), points["group_attribute"].astype(str), strict=True)))
    columns = sorted(points["architecture"].astype(str).unique())
    look = looks(variants(points))
    width, height = PANEL_INCHES
    with mpl.rc_context(STYLE):
        whole_width = max(width * len(columns) + 0.6, LEAST_WIDTH_INCHES)
        figure = Figure(figsize=(whole_width, height * len(rows) + 0.9), layout="constrained")
        axes = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True, sharey="row")
        for i, (dataset, attribute) in enumerate(rows):
            for j, architecture in enumerate(columns):
                here = points["dataset"].eq(dataset) & points["group_attribute"].eq(attribute)
                part = points[here & points["architecture"].eq(architecture)]
                _draw_panel(axes[i, j], part, key=key, look=look)
                axes[i, j].set_title(_plain(f"{architecture} · {dataset}, {attribute}"), fontsize=9)
            axes[i, 0].set_ylabel(f"{metric_of(key).key}, test (%)")
        for axis in axes[-1]:
            axis.set_xlabel("true mean bits per weight")
        if not quantised.empty:
            _log_axis(axes[0, 0], quantised)
        _add_legend(figure, look, has_reference=len(quantised) < len(points))
        direction = "higher" if is_maximized(metric) else "lower"
        title = f"{metric_of(key).meaning}, {direction} is better; chosen by {metric}"
        if half_width(quantised, key).notna().any():
            title += "; bars: 95 % intervals over seeds"
        lines = textwrap.wrap(title, int(whole_width * TITLE_LETTERS_PER_INCH))
        figure.suptitle(_plain("\n".join(lines)), fontsize=10)
    return figure


def _draw_panel(axis: Axes, part: pd.DataFrame, *, key: str, look: dict[str, Look]) -> None:
    quantised = part[~is_full_precision(part)]
    for value in part.loc[is_full_precision(part), key].dropna():
        axis.axhline(100 * value, color=REFERENCE_COLOR, linestyle="--", linewidth=1.1, zorder=1)
    front = quantised[quantised["on_front"]].sort_values(BITS)
    axis.plot(front[BITS], 100 * front[key], color=FRONT_COLOR, alpha=0.35, zorder=2, **FRONT_LINE)
    shown = variants(quantised)
    for place, variant in enumerate(shown):
        rows = quantised[quantised["variant"] == variant].sort_values(BITS)
        bars = (100 * half_width(rows, key)).fillna(0.0)
        axis.errorbar(
            rows[BITS],
            100 * rows[key],
            yerr=bars if bars.any() else None,
            color=look[variant].color,
            marker=look[variant].marker,
            markersize=marker_size(place, len(shown)),
            markeredgecolor="white",
            markeredgewidth=0.6,
            linewidth=1,
            elinewidth=0.9,
            capsize=2,
            zorder=3,
        )


def _log_axis(axis: Axes, quantised: pd.DataFrame) -> None:
    """A base-2 logarithmic axis of bits with plain numbers; shared by all panels."""
    low, high = float(quantised[BITS].min()), float(quantised[BITS].max())
    if not low > 0:
        return
    axis.set_xscale("log", base=2)
    axis.set_xlim(low / 1.25, high * 1.25)
    axis.xaxis.set_major_locator(FixedLocator(bits_ticks(low, high)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _add_legend(figure: Figure, look: dict[str, Look], *, has_reference: bool) -> None:
    handles = [
        Line2D([], [], color=one.color, marker=one.marker, label=_plain(name)) for name, one in look.items()
    ]
    handles.append(Line2D([], [], color=FRONT_COLOR, alpha=0.5, label="front on validation", **FRONT_LINE))
    if has_reference:
        handles.append(Line2D([], [], color=REFERENCE_COLOR, linestyle="--", label="full precision"))
    size = mpl.rcParams["font.size"]
    names = [TextPath((0, 0), str(handle.get_label()), size=size) for handle in handles]
    widest = max(name.get_extents().width for name in names) / POINTS_AN_INCH
    columns = math.floor(figure.get_size_inches()[0] / (LEGEND_KEY_INCHES + widest))
    figure.legend(handles=handles, loc="outside lower center", ncols=max(1, columns), frameon=False)


def _plain(text: str) -> str:
    """Names are text, never mathematics."""
    return text.replace("$", r"\$")


def figure_bytes(figure: Figure, kind: str) -> bytes:
    """The figure as a file of that kind; the same figure always gives the same bytes.

    >>> figure_bytes(Figure(), "png")[1:4]
    b'PNG'
    """
    buffer = io.BytesIO()
    metadata = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format=kind, dpi=160, metadata=metadata)
    return buffer.getvalue()


def main(argv: list[str] | None = None) -> int:
    """Write the front as PNG, SVG and PDF."""
    parser = cli.source_parser("analysis.figures", "Draw the front as front.png, front.svg and front.pdf.")
    cli.add_metric(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")

    def act(arguments: Any) -> None:
        cells = select_cells(cli.read_source(arguments), metric=arguments.metric)
        print(arguments.chosen_by, file=sys.stderr)
        figure = front_figure(mark_front(aggregate(cells), metric=arguments.metric), metric=arguments.metric)
        for kind in FORMATS:
            write_bytes(arguments.out / f"front.{kind}", figure_bytes(figure, kind))
            print(arguments.out / f"front.{kind}")

    return cli.run(parser, act, argv)


if __name__ == "__main__":
    raise SystemExit(main())
