"""The two HTML pages: each one file that opens offline, with plotly.js inside and no request to anywhere."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from analysis import interactive
from analysis.answers import Answer, Recommendation, lead_counts
from analysis.columns import (
    BITS,
    GROUP_ACCURACY,
    budget_phrase,
    budgets,
    bytes_text,
    duration_text,
    group_names,
    is_full_precision,
    is_maximized,
    on_test,
    panel_title,
    panels,
    percent,
    variants,
)
from analysis.pareto import REFERENCE_BITS, REFERENCE_VALUE, variant_hypervolumes
from analysis.style import heat_color
from analysis.tables import COLUMNS, cell_texts
from fqsweep.names import COST_METRICS, GROUP_METRICS, NO_VALUE, metric_of

TEMPLATES = Path(__file__).parent / "templates"
GROUP_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Everything a page shows, computed before anything is drawn."""

    sweep: str
    metric: str
    runs: pd.DataFrame
    cells: pd.DataFrame
    points: pd.DataFrame
    comparisons: pd.DataFrame
    answers: list[Answer]
    recommendations: list[Recommendation]
    notes: list[str]


def report_html(findings: Findings, *, front_png: bytes) -> str:
    """The whole report: answers, fronts, tables, groups, choice, cost, glossary."""
    points, cells = findings.points, findings.cells
    return _render(
        "report.html.j2",
        findings,
        views=[_panel_view(i, panel, part, findings) for i, (panel, part) in enumerate(panels(points))],
        leads=lead_counts(points, metric=findings.metric),
        png=base64.b64encode(front_png).decode(),
        chosen=[_chosen_row(row, findings.metric) for _, row in cells.iterrows()],
        num_searched=int((cells["num_runs"] > 1).sum()),
        costs=_cost_rows(findings.runs),
        total_time=duration_text(float(findings.runs["time/total_s"].sum())),
        glossary=(*GROUP_METRICS, *COST_METRICS),
    )


def front_html(findings: Findings) -> str:
    """The fronts alone."""
    views = [_panel_view(i, panel, part, findings) for i, (panel, part) in enumerate(panels(findings.points))]
    return _render("front.html.j2", findings, views=views)


def _render(template: str, findings: Findings, **values: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(
        findings=findings,
        metric=metric_of(findings.metric),
        columns=COLUMNS,
        panel_title=panel_title,
        plotlyjs=Markup(get_plotlyjs()),
        style=Markup((TEMPLATES / "page.css").read_text(encoding="utf-8")),
        script=Markup((TEMPLATES / "page.js").read_text(encoding="utf-8")),
        **values,
    )


def _panel_view(index: int, panel: tuple[str, ...], part: pd.DataFrame, findings: Findings) -> dict[str, Any]:
    """What the template needs of one panel."""
    figure = interactive.panel_figure(part, metric=findings.metric, all_variants=variants(findings.points))
    answer = next((a for a in findings.answers if a.panel == panel), None)
    return {
        "id": f"setting-{index + 1}",
        "title": panel_title(panel),
        "answer": answer,
        "figure": Markup(interactive.fragment(figure, element_id=f"plot-{index + 1}")),
        "figure_text": _figure_text(part, findings.metric),
        "rows": list(zip(cell_texts(part), part["on_front"].tolist(), strict=True)),
        "heat": _heat_map(part, key=on_test(findings.metric)),
        "groups": _group_view(part),
        "volumes": _volumes(part, findings.metric),
        "recommended": [r for r in findings.recommendations if _same_panel(r, panel)],
    }


def _same_panel(item: Recommendation, panel: tuple[str, ...]) -> bool:
    return (item.dataset, item.group_attribute, item.architecture) == panel


def _figure_text(part: pd.DataFrame, metric: str) -> str:
    """The figure in words, for those who do not see it."""
    front = part[part["on_front"]].sort_values(BITS)
    items = [
        f"{row['variant']} with {row[BITS]:.2f} bits: {percent(row[on_test(metric)])} %"
        for _, row in front.iterrows()
    ]
    return (
        f"{metric_of(metric).meaning} on test data against bits per weight. On the front: {'; '.join(items)}."
    )


def _heat_map(part: pd.DataFrame, *, key: str) -> dict[str, Any]:
    """Variant x budget, each value with the ground and text colour of its place in the panel's range."""
    low, high = float(part[key].min()), float(part[key].max())
    columns = budgets(part)
    lookup = {(row["variant"], row["budget"]): float(row[key]) for _, row in part.iterrows()}
    rows = []
    for variant in variants(part):
        names = list(columns)
        if (variant, NO_VALUE) in lookup:
            names = [NO_VALUE] * len(columns)
        rows.append((variant, [_heat_cell(lookup.get((variant, n)), low, high, key) for n in names]))
    return {"columns": columns, "rows": rows, "meaning": metric_of(key).meaning}


def _heat_cell(value: float | None, low: float, high: float, key: str) -> dict[str, str] | None:
    if value is None or value != value:
        return None
    share = (value - low) / (high - low) if high > low else 1.0
    ground, text = heat_color(share if is_maximized(key) else 1 - share)
    return {"text": percent(value), "ground": ground, "color": text}


def _group_view(part: pd.DataFrame) -> dict[str, Any]:
    """Per-group test accuracy as dots on a common scale, one block a budget, full precision in each."""
    names = group_names(part, split="test")
    values = part[[f"test/{GROUP_ACCURACY}{n}" for n in names]]
    if not names or not values.notna().to_numpy().any():
        return {"names": [], "blocks": []}
    low = max(0.0, float(values.min().min()) - 0.01)
    high = min(1.0, float(values.max().max()) + 0.01)
    blocks = []
    for budget in budgets(part) or [NO_VALUE]:
        rows = part[is_full_precision(part) | (part["budget"] == budget)]
        dumbbells = [_dumbbell(row, names, low, high) for _, row in rows.iterrows()]
        title = budget_phrase(budget) if budget != NO_VALUE else "full precision"
        blocks.append({"budget": budget, "title": title, "rows": [d for d in dumbbells if d["dots"]]})
    legend = [(name, GROUP_COLORS[i % len(GROUP_COLORS)], i % 4) for i, name in enumerate(names)]
    return {"names": legend, "blocks": blocks, "low": percent(low), "high": percent(high)}


def _dumbbell(row: pd.Series, names: list[str], low: float, high: float) -> dict[str, Any]:
    dots = []
    for i, name in enumerate(names):
        value = float(row[f"test/{GROUP_ACCURACY}{name}"])
        if value == value:
            place = 100 * (value - low) / (high - low)
            color = GROUP_COLORS[i % len(GROUP_COLORS)]
            dots.append(
                {"name": name, "text": percent(value), "place": round(place, 2), "color": color, "shape": i % 4}
            )
    places = [float(str(d["place"])) for d in dots]
    start, width = (min(places), max(places) - min(places)) if places else (0, 0)
    return {"variant": row["variant"], "dots": dots, "start": start, "width": round(width, 2)}


def _volumes(part: pd.DataFrame, metric: str) -> dict[str, Any]:
    frame = variant_hypervolumes(part, metric=metric).sort_values("hypervolume_frac", ascending=False)
    rows = [(r.variant, f"{r.hypervolume_frac:.3f}") for r in frame.itertuples()]
    worst = percent(REFERENCE_VALUE[is_maximized(metric)], digits=0)
    return {"rows": rows, "reference": f"{REFERENCE_BITS:g} bits and {worst} %"}


def _chosen_row(row: pd.Series, metric: str) -> list[str]:
    place = " / ".join(str(row[c]) for c in ("dataset", "group_attribute", "architecture"))
    weights = [f"{row[c]:g}" if row[c] == row[c] else NO_VALUE for c in ("fairness_weight", "bitrate_weight")]
    chosen = [place, str(row["variant"]), str(row["budget"]), str(row["seed"]), *weights]
    return [*chosen, str(row["num_runs"]), percent(row[metric], digits=2), str(row["run_id"])]


def _cost_rows(runs: pd.DataFrame) -> list[list[str]]:
    """Per variant: runs, mean time, summed time, and the range of packed sizes."""
    rows = []
    for variant in variants(runs):
        part = runs[runs["variant"] == variant]
        time, size = part["time/total_s"], part["size/packed_bytes"]
        sizes = dict.fromkeys([bytes_text(float(size.min())), bytes_text(float(size.max()))])
        times = [duration_text(float(time.mean())), duration_text(float(time.sum(min_count=1)))]
        rows.append([variant, str(len(part)), *times, " to ".join(sizes)])
    return rows
