"""The two HTML pages: each one file that opens offline, with plotly.js inside and no request to anywhere.

A link to a run is followed only when it is clicked.
"""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from analysis import drawings, interactive
from analysis.answers import Answer, Recommendation, lead_counts
from analysis.columns import (
    ABSENT,
    BITS,
    GROUP_ACCURACY,
    GROUP_COUNT,
    budget_phrase,
    budgets,
    bytes_text,
    group_names,
    is_full_precision,
    is_maximized,
    of_panel,
    on_test,
    panel_title,
    panels,
    percent,
    variants,
)
from analysis.costs import cost_rows, cost_sentences
from analysis.effects import WEIGHTS, effect_words, slices
from analysis.intervals import share_interval
from analysis.pareto import REFERENCE_BITS, REFERENCE_VALUE
from analysis.ranks import Ranking, ranking_sentence
from analysis.rules import Choice
from analysis.style import heat_color
from analysis.tables import as_csv, as_latex, as_markdown, cell_texts, columns_of
from fqsweep.names import COST_METRICS, GROUP_METRICS, NO_VALUE, metric_of

TEMPLATES = Path(__file__).parent / "templates"
MAX_ROWS = 500  # of long tables; the files beside the page hold all
MAX_LAYER_RUNS = 8
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
    volumes: pd.DataFrame
    surfaces: pd.DataFrame
    ranking: Ranking
    choices: list[Choice]
    effects: pd.DataFrame
    layers: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=["run_id", "layer"]))
    ui_url: str | None = None


def report_html(findings: Findings, *, front_png: bytes) -> str:
    """The whole report: answers, fronts, tables, groups, choice, cost, glossary."""
    points, cells = findings.points, findings.cells
    return _render(
        "report.html.j2",
        findings,
        views=[_panel_view(i, panel, part, findings) for i, (panel, part) in enumerate(panels(points))],
        leads=lead_counts(points, metric=findings.metric),
        has_bytes=bool(points["budget_bytes"].notna().any()),
        png=base64.b64encode(front_png).decode(),
        chosen=[_chosen_row(row, findings.metric) for _, row in cells.head(MAX_ROWS).iterrows()],
        comparisons=findings.comparisons.head(MAX_ROWS).to_dict("records"),
        ranking=ranking_sentence(findings.ranking),
        test_key=on_test(findings.metric),
        test_values=_test_values(cells, on_test(findings.metric)),
        has_image_intervals=f"{on_test(findings.metric)}:images_low" in cells,
        num_searched=int((cells["num_runs"] > 1).sum()),
        costs=cost_rows(findings.runs),
        cost_sentences=cost_sentences(findings.runs),
        copies=[("Markdown", as_markdown(points)), ("CSV", as_csv(points)), ("LaTeX", as_latex(points))],
        glossary=(*GROUP_METRICS, *COST_METRICS),
    )


def _test_values(cells: pd.DataFrame, key: str) -> dict[str, dict[str, float]]:
    """Run id -> its ``key`` on test data and, where cells have them, the ends of its interval over images."""
    columns = {"value": key, "low": f"{key}:images_low", "high": f"{key}:images_high"}
    known = {k: c for k, c in columns.items() if c in cells}
    return {row["run_id"]: {k: float(row[c]) for k, c in known.items()} for row in cells.to_dict("records")}


def front_html(findings: Findings) -> str:
    """The fronts alone."""
    views = [_front_view(i, panel, part, findings) for i, (panel, part) in enumerate(panels(findings.points))]
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
        columns=columns_of(findings.points),
        panel_title=panel_title,
        percent=percent,
        bytes_text=bytes_text,
        run_link=run_links(findings),
        plotlyjs=Markup(get_plotlyjs()),
        style=Markup((TEMPLATES / "page.css").read_text(encoding="utf-8")),
        script=Markup((TEMPLATES / "page.js").read_text(encoding="utf-8")),
        **values,
    )


def _front_view(index: int, panel: tuple[str, ...], part: pd.DataFrame, findings: Findings) -> dict[str, Any]:
    """What the template needs of one panel's front."""
    figure = interactive.panel_figure(
        part,
        metric=findings.metric,
        all_variants=variants(findings.points),
        run_link=run_links(findings, part),
    )
    return {
        "id": f"setting-{index + 1}",
        "title": panel_title(panel),
        "plot_id": f"plot-{index + 1}",
        "figure": Markup(interactive.fragment(figure, element_id=f"plot-{index + 1}")),
        "legend": interactive.legend(figure, part, all_variants=variants(findings.points)),
        "figure_text": _figure_text(part, findings.metric),
    }


def _panel_view(index: int, panel: tuple[str, ...], part: pd.DataFrame, findings: Findings) -> dict[str, Any]:
    """What the template needs of one panel."""
    looks_of = variants(findings.points)
    answer = next((a for a in findings.answers if a.panel == panel), None)
    return _front_view(index, panel, part, findings) | {
        "answer": answer,
        "rows": list(
            zip(cell_texts(part, columns_of(findings.points)), part["on_front"].tolist(), strict=True)
        ),
        "heat": _heat_map(part, key=on_test(findings.metric)),
        "groups": _group_view(part),
        "volumes": _volumes(of_panel(findings.volumes, panel), findings.metric),
        "surfaces": drawings.surfaces_drawing(
            of_panel(findings.surfaces, panel), metric=findings.metric, all_variants=looks_of
        ),
        "radar": _radar(part, answer, looks_of),
        "layers": layer_view(part, answer, findings.layers),
        "effects": _effect_view(panel, findings, looks_of),
        "choices": [c for c in findings.choices if c.panel == panel],
        "recommended": [r for r in findings.recommendations if r.panel == panel],
    }


def run_links(findings: Findings, points: pd.DataFrame | None = None) -> dict[str, str]:
    """Run id -> its page in the MLflow UI, of all chosen runs or of those behind ``points``."""
    if findings.ui_url is None or "experiment_id" not in findings.cells:
        return {}
    base, cells = findings.ui_url.rstrip("/"), findings.cells
    if points is not None:
        cells = cells[cells["run_id"].isin(points["run_ids"].str.split().explode())]
    known = cells[["run_id", "experiment_id"]].dropna().astype(str).itertuples(index=False)
    return {
        run: f"{base}/#/experiments/{quote(place, safe='')}/runs/{quote(run, safe='')}" for run, place in known
    }


def _radar(part: pd.DataFrame, answer: Answer | None, all_variants: list[str]) -> dict[str, Any] | None:
    if answer is None:
        return None
    rows = part[is_full_precision(part) | (part["budget"] == answer.budget)]
    return drawings.radar_drawing(rows, all_variants=all_variants)


def layer_runs(part: pd.DataFrame, answer: Answer | None) -> dict[str, str]:
    """Variant -> the run whose layers are shown: the first seed of each variant at the answer's budget."""
    if answer is None:
        return {}
    rows = part[~is_full_precision(part) & (part["budget"] == answer.budget)]
    first = rows.head(MAX_LAYER_RUNS)
    return {str(v): str(ids).split()[0] for v, ids in zip(first["variant"], first["run_ids"], strict=True)}


def layer_view(part: pd.DataFrame, answer: Answer | None, layers: pd.DataFrame) -> dict[str, Any]:
    """Mean bits of each layer by variant, as a heat map from few bits to many."""
    runs = {v: r for v, r in layer_runs(part, answer).items() if r in set(layers["run_id"])}
    if not runs:
        return {"rows": []}
    own = layers[layers["run_id"].isin(runs.values())].drop_duplicates(["layer", "run_id"])
    bits_lr = own.pivot(index="layer", columns="run_id", values="mean_bits").reindex(own["layer"].unique())
    rows = [(layer, [_bits_cell(line[run]) for run in runs.values()]) for layer, line in bits_lr.iterrows()]
    return {"columns": list(runs), "rows": rows}


def _bits_cell(bits: float) -> dict[str, str] | None:
    if math.isnan(bits):
        return None
    ground, text = heat_color(bits / REFERENCE_BITS)
    return {"text": f"{bits:.2f}", "ground": ground, "color": text}


def _effect_view(panel: tuple[str, ...], findings: Findings, all_variants: list[str]) -> dict[str, Any]:
    """How the searched weights moved validation metrics: words, numbers, and one drawing a weight."""
    effects, runs = of_panel(findings.effects, panel), of_panel(findings.runs, panel)
    metrics = [c for c in effects.columns if c.startswith("val/")]
    rows = [
        [row["variant"], row["weight"].replace("_", " "), str(row["num_runs"])]
        + [f"{effect_words(row[m])} ({row[m]:+.2f})" if math.isfinite(row[m]) else "not known" for m in metrics]
        for _, row in effects.iterrows()
    ]
    pictures = []
    for weight in WEIGHTS if rows else ():
        moved = slices(runs, weight=weight, metrics=(findings.metric,))
        drawing = drawings.slices_drawing(moved, metric=findings.metric, all_variants=all_variants)
        pictures += [(weight.replace("_", " "), drawing)] if drawing else []
    return {"headings": ["variant", "weight", "runs", *metrics], "rows": rows, "pictures": pictures}


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
    if value is None or math.isnan(value):
        return None
    share = (value - low) / (high - low) if high > low else 1.0
    ground, text = heat_color(share if is_maximized(key) else 1 - share)
    return {"text": percent(value), "ground": ground, "color": text}


def _group_view(part: pd.DataFrame) -> dict[str, Any]:
    """Per-group test accuracy as dots with intervals on a common scale, one block a budget, fp32 in each."""
    names = group_names(part, split="test")
    rows_of = {index: _group_rates(row, names) for index, row in part.iterrows()}
    known = [end for rates in rows_of.values() for rate in rates for end in rate[1:]]
    if not known:
        return {"names": [], "blocks": [], "has_intervals": False}
    low, high = max(0.0, min(known) - 0.01), min(1.0, max(known) + 0.01)
    blocks = []
    for budget in budgets(part) or [NO_VALUE]:
        rows = part[is_full_precision(part) | (part["budget"] == budget)]
        dumbbells = [_dumbbell(row["variant"], rows_of[i], names, low, high) for i, row in rows.iterrows()]
        title = budget_phrase(budget) if budget != NO_VALUE else "full precision"
        blocks.append({"budget": budget, "title": title, "rows": [d for d in dumbbells if d["dots"]]})
    legend = [(name, GROUP_COLORS[i % len(GROUP_COLORS)], i % 4) for i, name in enumerate(names)]
    has_intervals = any(start < end for rates in rows_of.values() for _, _, start, end in rates)
    ends = {"low": percent(low), "high": percent(high), "has_intervals": has_intervals}
    return {"names": legend, "blocks": blocks} | ends


def _group_rates(row: pd.Series, names: list[str]) -> list[tuple[str, float, float, float]]:
    """Name, accuracy and Wilson's interval of each group that is known; without a count the interval is a point."""
    rates = []
    for name in names:
        value, count = float(row[f"test/{GROUP_ACCURACY}{name}"]), row.get(f"test/{GROUP_COUNT}{name}", 0)
        if math.isfinite(value):
            low, high = share_interval(value, int(count)) if count and count >= 1 else (value, value)
            rates.append((name, value, min(low, value), max(high, value)))
    return rates


def _dumbbell(
    variant: str, rates: list[tuple[str, float, float, float]], names: list[str], low: float, high: float
) -> dict[str, Any]:
    def place(value: float) -> float:
        return round(100 * (value - low) / (high - low), 2)

    dots = []
    for name, value, start, end in rates:
        i = names.index(name)
        look = {"name": name, "color": GROUP_COLORS[i % len(GROUP_COLORS)], "shape": i % 4}
        interval = f" (95 % {percent(start)} to {percent(end)})" if start < end else ""
        ends = {"start": place(start), "width": round(place(end) - place(start), 2)}
        drop = 4 * (i - (len(names) - 1) / 2)
        dots.append(
            look | {"text": percent(value), "interval": interval, "place": place(value), "drop": drop} | ends
        )
    places = [place(value) for _, value, _, _ in rates]
    start, width = (min(places), max(places) - min(places)) if places else (0, 0)
    return {"variant": variant, "dots": dots, "start": start, "width": round(width, 2)}


def _volumes(volumes: pd.DataFrame, metric: str) -> dict[str, Any]:
    frame = volumes.sort_values("mean", ascending=False, na_position="last")
    rows = [_volume_row(row) for _, row in frame.iterrows()]
    worst = percent(REFERENCE_VALUE[is_maximized(metric)], digits=0)
    return {"rows": rows, "reference": f"{REFERENCE_BITS:g} bits and {worst} %"}


def _volume_row(row: pd.Series) -> list[str]:
    mean, std, low, high = (float(row[c]) for c in ("mean", "std", "low", "high"))
    texts = [f"{value:.3f}" if math.isfinite(value) else ABSENT for value in (mean, std)]
    interval = f"{low:.3f} to {high:.3f}" if math.isfinite(low) else ABSENT
    return [str(row["variant"]), *texts, interval, str(row["num_seeds"])]


def _chosen_row(row: pd.Series, metric: str) -> list[str]:
    place = " / ".join(str(row[c]) for c in ("dataset", "group_attribute", "architecture"))
    weights = [f"{row[c]:g}" if pd.notna(row[c]) else NO_VALUE for c in ("fairness_weight", "bitrate_weight")]
    chosen = [place, str(row["variant"]), str(row["budget"]), str(row["seed"]), *weights]
    return [*chosen, str(row["num_runs"]), percent(row[metric], digits=2), str(row["run_id"])]
