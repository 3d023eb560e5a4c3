"""From a sweep's runs to its report: figures, tables, pages and the recommended runs.

python -m analysis.report --tracking-uri sqlite:////data/out/mlflow.db --sweep demo --out report
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pandas as pd

from analysis import cli
from analysis.answers import (
    headline_markdown,
    headline_text,
    headlines,
    lead_counts,
    recommend,
    recommended_record,
)
from analysis.columns import BITS, on_test, panels, with_budget
from analysis.effects import weight_effects
from analysis.figures import FORMATS, figure_bytes, front_figure
from analysis.fronts import attainment_surfaces, seed_hypervolumes
from analysis.intervals import image_intervals
from analysis.mlflow_runs import load_layers
from analysis.page import Findings, front_html, layer_runs, report_html
from analysis.pareto import aggregate, leaders, mark_front, select_cells
from analysis.ranks import rank_variants, ranking_sentence
from analysis.rules import choose_by_rules
from analysis.stats import compare_variants
from analysis.tables import as_csv, as_latex, as_markdown, as_text
from fqsweep.errors import InputError
from fqsweep.files import write_bytes

LOCAL_UI = "http://127.0.0.1:5000"
MAX_LAYER_FILES = 64


def find(runs: pd.DataFrame, *, sweep: str, metric: str) -> Findings:
    """Compute everything the report shows; validation chooses, test data is only read off.

    Args:
        runs: ``mlflow_runs.load_runs`` or ``runs.load_csv``.
        sweep: the title.
        metric: the validation metric that chooses the run of each cell.

    Raises:
        InputError: the metric cannot choose, or no run has it.
    """
    notes = list(runs.attrs.get("notes", []))
    attrs, runs = dict(runs.attrs), with_budget(runs)
    runs.attrs = attrs
    cells = select_cells(runs, metric=metric)
    points = mark_front(aggregate(cells), metric=metric)
    cells = cells.join(image_intervals(cells))
    comparisons = compare_variants(cells, metric=on_test(metric), leaders=leaders(points, metric=metric))
    return Findings(
        sweep=sweep,
        metric=metric,
        runs=runs,
        cells=cells,
        points=points,
        comparisons=comparisons,
        answers=headlines(points, comparisons, metric=metric),
        recommendations=recommend(cells, metric=metric),
        notes=notes,
        volumes=seed_hypervolumes(cells, keys=(metric, BITS)),
        surfaces=attainment_surfaces(cells, metric=metric),
        ranking=rank_variants(cells, metric=on_test(metric)),
        choices=choose_by_rules(cells, metric=metric),
        effects=weight_effects(runs, metrics=tuple(dict.fromkeys((metric, "val/acc_overall", "val/acc_gap")))),
    )


def add_layers(findings: Findings, tracking_uri: str) -> Findings:
    """The same findings with the bits of layers of the runs that the page shows, read from the store."""
    by_panel = {answer.panel: answer for answer in findings.answers}
    wanted = [
        run for panel, part in panels(findings.points) for run in layer_runs(part, by_panel.get(panel)).values()
    ]
    return replace(findings, layers=load_layers(tracking_uri, wanted[:MAX_LAYER_FILES]))


def write_report(findings: Findings, out: Path) -> list[Path]:
    """Write every file of the report to ``out``; each is whole or absent.

    Returns:
        The paths, the page to open first.
    """
    figure = front_figure(findings.points, metric=findings.metric)
    images = {f"front.{kind}": figure_bytes(figure, kind) for kind in FORMATS}
    record = recommended_record(
        findings.recommendations, findings.choices, sweep=findings.sweep, metric=findings.metric
    )
    texts = {
        "report.html": report_html(findings, front_png=images["front.png"]),
        "front.html": front_html(findings),
        "answer.md": headline_markdown(findings.answers),
        "front.csv": findings.points.to_csv(index=False),
        "cells.csv": findings.cells.to_csv(index=False),
        "table.csv": as_csv(findings.points),
        "table.md": as_markdown(findings.points),
        "table.tex": as_latex(findings.points),
        "recommended.json": json.dumps(record, indent=1, allow_nan=False),
    }
    contents = {name: text.encode() for name, text in texts.items()} | images
    for name, content in contents.items():
        write_bytes(out / name, content)
    return [out / name for name in contents]


def summary_text(findings: Findings) -> str:
    """What the terminal shows: table, notes and the headline last, where the eye ends."""
    notes = [f"Note: {note}" for note in findings.notes]
    leads = lead_counts(findings.points, metric=findings.metric)
    ranks = "" if findings.ranking.mean_rank.empty else ranking_sentence(findings.ranking)
    parts = [as_text(findings.points), "\n".join(notes), headline_text(findings.answers), leads, ranks]
    return "\n\n".join(part for part in parts if part)


def _ui_url(arguments: Any) -> str | None:
    """The address that links start with; None where there is no store to look into."""
    given: str | None = arguments.ui_url
    if given is not None:
        if not given.startswith(("http://", "https://")):
            raise InputError(f"--ui-url must start with http:// or https://, but is {given!r}.")
        return given
    uri: str | None = None if arguments.csv else arguments.tracking_uri
    if uri is None:
        return None
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https"):
        return LOCAL_UI
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))  # no passwords


def main(argv: list[str] | None = None) -> int:
    """Write the report and print the table and the headline."""
    parser = cli.source_parser("analysis.report", "Write the report of a sweep and print its headline.")
    cli.add_metric(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--ui-url",
        help="where the MLflow UI answers, for links to runs (default: the tracking server, else where `fqsweep ui` "
        f"opens it, {LOCAL_UI})",
    )

    def act(arguments: Any) -> None:
        runs = cli.read_source(arguments, shows_notes=True)
        findings = find(runs, sweep=cli.title_of(arguments), metric=arguments.metric)
        if arguments.tracking_uri and not arguments.csv:
            findings = add_layers(findings, arguments.tracking_uri)
        findings = replace(findings, ui_url=_ui_url(arguments))
        written = write_report(findings, arguments.out)
        print(summary_text(findings))
        print(f"report: {written[0]}", file=sys.stderr)

    return cli.run(parser, act, argv)


if __name__ == "__main__":
    raise SystemExit(main())
