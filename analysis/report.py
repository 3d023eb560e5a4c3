"""From a sweep's runs to its report: figures, tables, pages and the recommended runs.

python -m analysis.report --tracking-uri sqlite:////data/out/mlflow.db --sweep demo --out report
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from analysis import cli
from analysis.answers import headline_text, headlines, lead_counts, recommend, recommended_record
from analysis.columns import on_test
from analysis.figures import FORMATS, figure_bytes, front_figure
from analysis.page import Findings, front_html, report_html
from analysis.pareto import aggregate, leaders, mark_front, select_cells
from analysis.stats import compare_variants
from analysis.tables import as_csv, as_latex, as_markdown, as_text
from fqsweep.files import write_bytes


def find(runs: pd.DataFrame, *, sweep: str, metric: str) -> Findings:
    """Compute everything the report shows; validation chooses, test data is only read off.

    Args:
        runs: ``load.load_runs`` or ``load.load_csv``.
        sweep: the title.
        metric: the validation metric that chooses the run of each cell.

    Raises:
        InputError: the metric cannot choose, or no run has it.
    """
    cells = select_cells(runs, metric=metric)
    points = mark_front(aggregate(cells), metric=metric)
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
        notes=list(runs.attrs.get("notes", [])),
    )


def write_report(findings: Findings, out: Path) -> list[Path]:
    """Write every file of the report to ``out``; each is whole or absent.

    Returns:
        The paths, the page to open first.
    """
    figure = front_figure(findings.points, metric=findings.metric)
    images = {f"front.{kind}": figure_bytes(figure, kind) for kind in FORMATS}
    record = recommended_record(findings.recommendations, sweep=findings.sweep, metric=findings.metric)
    texts = {
        "report.html": report_html(findings, front_png=images["front.png"]),
        "front.html": front_html(findings),
        "front.csv": findings.points.to_csv(index=False),
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
    parts = [as_text(findings.points), "\n".join(notes), headline_text(findings.answers), leads]
    return "\n\n".join(part for part in parts if part)


def main(argv: list[str] | None = None) -> int:
    """Write the report and print the table and the headline."""
    parser = cli.source_parser("analysis.report", "Write the report of a sweep and print its headline.")
    cli.add_metric(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")

    def act(arguments: Any) -> None:
        runs = cli.read_source(arguments)
        sweep = arguments.sweep or arguments.csv.stem
        findings = find(runs, sweep=sweep, metric=arguments.metric)
        written = write_report(findings, arguments.out)
        print(summary_text(findings))
        print(f"report: {written[0]}", file=sys.stderr)

    return cli.run(parser, act, argv)


if __name__ == "__main__":
    raise SystemExit(main())
