"""The front of one panel as a Plotly figure: hover shows the runs behind a marker; a page can switch splits."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from analysis.columns import (
    BITS,
    BYTES,
    budget_phrase,
    bytes_text,
    is_full_precision,
    on_test,
    percent,
    variants,
)
from analysis.intervals import half_width
from analysis.style import FRONT_COLOR, REFERENCE_COLOR, Look, bits_ticks, looks, marker_size
from fqsweep.names import metric_of

NUM_RUNS_SHOWN = 5  # run ids that a hover box lists
HOVER = (
    "<b>%{customdata[0]}</b>, budget %{customdata[1]}<br>true bits %{customdata[2]}, %{customdata[3]}<br>"
    "test %{customdata[4]} %, validation %{customdata[5]} %<br>worst group on test %{customdata[6]} %, "
    "gap %{customdata[7]} %<br>%{customdata[8]}<extra></extra>"
)


def panel_figure(
    part: pd.DataFrame, *, metric: str, all_variants: list[str], run_link: Mapping[str, str] | None = None
) -> go.Figure:
    """The front of one panel.

    Each trace carries ``meta`` = {split: {"y": ..., "error": ...}} with both splits, so that the page's switch
    needs no second copy of the figure; test data show first.

    Args:
        part: rows of ``pareto.mark_front`` of one panel.
        metric: the validation metric that chose.
        all_variants: the variants of all panels: each looks the same in every panel.
        run_link: run id -> its page; a click on a marker opens that of its first run.
    """
    look = looks(all_variants)
    quantised = part[~is_full_precision(part)]
    figure = go.Figure()
    figure.add_trace(_front_trace(quantised, metric=metric))
    shown = variants(quantised)
    for place, variant in enumerate(shown):
        rows = quantised[quantised["variant"] == variant].sort_values(BITS)
        size = 1.6 * marker_size(place, len(shown))
        figure.add_trace(_variant_trace(rows, look[variant], size=size, metric=metric, run_link=run_link or {}))
    for name, row in _references(part):
        figure.add_trace(_reference_trace(name, row, quantised, metric=metric, run_link=run_link or {}))
    _lay_out(figure, quantised, metric=metric)
    return figure


def _references(part: pd.DataFrame) -> list[tuple[str, pd.Series]]:
    """The full-precision points with their names, which are the variants' where there are several."""
    full = part[is_full_precision(part)]
    if len(full) == len(part):
        return []
    rows = [row for _, row in full.iterrows()]
    return [("full precision" if len(rows) == 1 else str(row["variant"]), row) for row in rows]


def _series(rows: pd.DataFrame, *, metric: str) -> dict[str, dict[str, list[float | None]]]:
    """Values and half of their 95 % intervals in percent for both splits; None where there is none."""
    keys = {"test": on_test(metric), "val": metric}
    return {
        split: {"y": _percents(rows[key]), "error": _percents(half_width(rows, key))}
        for split, key in keys.items()
    }


def _percents(values: pd.Series) -> list[float | None]:
    return [round(100 * float(v), 3) if math.isfinite(v) else None for v in values]


def _front_trace(quantised: pd.DataFrame, *, metric: str) -> go.Scatter:
    rows = quantised[quantised["on_front"]].sort_values(BITS)
    series = _series(rows, metric=metric)
    return go.Scatter(
        x=rows[BITS].tolist(),
        y=series["test"]["y"],
        meta=series,
        mode="lines+markers",  # a front may be one point
        name="front on validation",
        line={"color": FRONT_COLOR, "width": 7},
        marker={"color": FRONT_COLOR, "size": 20},
        opacity=0.4,
        hoverinfo="skip",
    )


def _variant_trace(
    rows: pd.DataFrame, look: Look, *, size: float, metric: str, run_link: Mapping[str, str]
) -> go.Scatter:
    series = _series(rows, metric=metric)
    name = html.escape(str(rows["variant"].iloc[0]))
    return go.Scatter(
        x=rows[BITS].tolist(),
        y=series["test"]["y"],
        meta=series,
        error_y={"type": "data", "array": series["test"]["error"], "thickness": 1.2, "width": 3},
        mode="lines+markers",
        name=name,
        line={"color": look.color, "width": 1.5},
        marker={"symbol": look.symbol, "size": size, "line": {"width": 1, "color": "#ffffff"}},
        customdata=[_hover(row, metric=metric, run_link=run_link) for _, row in rows.iterrows()],
        hovertemplate=HOVER,
    )


def _hover(row: pd.Series, *, metric: str, run_link: Mapping[str, str]) -> list[str]:
    """The texts of a hover box and, last, the page that a click opens."""
    return [
        html.escape(str(row["variant"])),
        budget_phrase(str(row["budget"])),
        f"{row[BITS]:.3f}",
        bytes_text(row[BYTES]),
        percent(row[on_test(metric)], digits=2),
        percent(row[metric], digits=2),
        percent(row["test/acc_worst"], digits=2),
        percent(row["test/acc_gap"], digits=2),
        _run_lines(row),
        run_link.get(str(row["run_ids"]).split(" ")[0], ""),
    ]


def _run_lines(row: pd.Series) -> str:
    pairs = list(zip(str(row["seeds"]).split(), str(row["run_ids"]).split(), strict=False))
    lines = [f"seed {html.escape(seed)}: run {html.escape(run)}" for seed, run in pairs[:NUM_RUNS_SHOWN]]
    more = len(pairs) - NUM_RUNS_SHOWN
    return "<br>".join([*lines, f"and {more} more"] if more > 0 else lines)


def _reference_trace(
    name: str, row: pd.Series, quantised: pd.DataFrame, *, metric: str, run_link: Mapping[str, str]
) -> go.Scatter:
    ends = [float(quantised[BITS].min()) / 1.3, float(quantised[BITS].max()) * 1.3]
    series = _series(pd.DataFrame([row, row]), metric=metric)
    series = {split: {"y": values["y"], "error": []} for split, values in series.items()}
    return go.Scatter(
        x=ends,
        y=series["test"]["y"],
        meta=series,
        mode="lines",
        name=html.escape(name),
        line={"color": REFERENCE_COLOR, "width": 1.5, "dash": "dash"},
        customdata=[_hover(row, metric=metric, run_link=run_link)] * 2,
        hovertemplate=HOVER,
    )


def _lay_out(figure: go.Figure, quantised: pd.DataFrame, *, metric: str) -> None:
    figure.update_layout(
        template="plotly_white",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        height=430,
        margin={"l": 56, "r": 12, "t": 12, "b": 48},
        showlegend=False,  # the page has one that wraps on a phone and takes the keyboard
        font={"family": "system-ui, sans-serif", "size": 13},
        hoverlabel={"align": "left"},
        yaxis={"title": {"text": f"{metric_of(metric).key} (%)"}, "automargin": True},
        xaxis={"title": {"text": "true mean bits per weight"}},
    )
    if not quantised.empty and float(quantised[BITS].min()) > 0:
        low, high = float(quantised[BITS].min()), float(quantised[BITS].max())
        ticks = bits_ticks(low, high)
        limits = [math.log10(low / 1.3), math.log10(high * 1.3)]
        figure.update_xaxes(type="log", tickvals=ticks, ticktext=[f"{t:g}" for t in ticks], range=limits)


def legend(figure: go.Figure, part: pd.DataFrame, *, all_variants: list[str]) -> list[dict[str, Any]]:
    """The key of each trace of ``panel_figure``, in their order: name, colour, and its marker's path or its dash.

    Args:
        part, all_variants: what the figure was drawn from.
    """
    look = looks(all_variants)
    keys: list[dict[str, Any]] = [
        {"name": "front on validation", "color": FRONT_COLOR, "dash": "none", "width": 5}
    ]
    shown = variants(part[~is_full_precision(part)])
    keys += [{"name": name, "color": look[name].color, "path": look[name].path} for name in shown]
    dashed = {"color": REFERENCE_COLOR, "dash": "6 4", "width": 2}
    keys += [{"name": name} | dashed for name, _ in _references(part)]
    return [key | {"trace": i} for i, key in enumerate(keys)]


def fragment(figure: go.Figure, *, element_id: str) -> str:
    """The figure as HTML without plotly.js, which the page embeds once."""
    config: dict[str, Any] = {"displaylogo": False, "responsive": True, "displayModeBar": False}
    return str(figure.to_html(full_html=False, include_plotlyjs=False, div_id=element_id, config=config))
