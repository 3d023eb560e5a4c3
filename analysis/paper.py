"""The main table and the main figure of a paper, from one command.

python -m analysis.paper --tracking-uri sqlite:////data/out/mlflow.db --sweep paper --out paper
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd

from analysis import cli
from analysis.columns import ABSENT, BITS, BYTES, PANEL, bytes_text, is_maximized, panel_title, panels
from analysis.figures import FORMATS, figure_bytes, front_figure
from analysis.pareto import aggregate, leaders, mark_front, more_runs_sentence, select_cells
from analysis.tables import PLUS_MINUS, latex_safe, markdown_safe, with_interval
from fqsweep.files import write_bytes
from fqsweep.names import metric_of

METRICS = ("acc_worst", "acc_avg", "balanced_acc_worst", "eopp0", "eopp1", "eodd")
NAMES = {
    "acc_worst": "worst",
    "acc_avg": "average",
    "balanced_acc_worst": "worst bal.",
    "eopp0": "EOpp0",
    "eopp1": "EOpp1",
    "eodd": "EOdd",
}
HEADINGS = ("variant", "budget", "bits", "size", *NAMES.values(), "seeds")


def table_rows(points: pd.DataFrame, *, metric: str) -> list[tuple[bool, list[str]]]:
    """The rows of one panel: whether a row leads its budget on validation, alone or level, and its texts."""
    first = {
        (variant, lead["budget"])
        for _, lead in leaders(points, metric=metric).iterrows()
        for variant in (lead["variant"], *lead["level_with"])
    }
    rows = []
    for _, row in points.iterrows():
        bits = f"{row[BITS]:.2f}" if pd.notna(row[BITS]) else ABSENT
        texts = [str(row["variant"]), str(row["budget"]), bits, bytes_text(row[BYTES])]
        texts += [with_interval(row, f"test/{key}") for key in METRICS]
        rows.append(((row["variant"], row["budget"]) in first, [*texts, str(row["num_seeds"])]))
    return rows


def as_latex(points: pd.DataFrame, *, metric: str) -> str:
    """A booktabs table over all panels; the leader of each budget is bold. Needs ``booktabs``."""
    lines = []
    for panel, part in panels(points):
        title = latex_safe(panel_title(panel))
        lines += [r"\midrule", rf"\multicolumn{{{len(HEADINGS)}}}{{l}}{{\emph{{{title}}}}} \\"]
        for leads, texts in table_rows(part, metric=metric):
            cells = [latex_safe(text) for text in texts]
            cells[0] = rf"\textbf{{{cells[0]}}}" if leads else cells[0]
            lines.append(" & ".join(cells) + r" \\")
    spec = "l" + "r" * (len(HEADINGS) - 1)
    head = [r"\begin{table*}", r"\centering", rf"\caption{{{latex_safe(caption(points, metric=metric))}}}"]
    head += [rf"\begin{{tabular}}{{{spec}}}", r"\toprule", " & ".join(map(latex_safe, HEADINGS)) + r" \\"]
    return "\n".join([*head, *lines, r"\bottomrule", r"\end{tabular}", r"\end{table*}"]) + "\n"


def as_markdown(points: pd.DataFrame, *, metric: str) -> str:
    """The same as pipe tables, one a panel."""
    parts = [caption(points, metric=metric)]
    rule = "|:--" + "|--:" * (len(HEADINGS) - 1) + "|"
    for panel, part in panels(points):
        lines = [f"### {markdown_safe(panel_title(panel))}", "", f"| {' | '.join(HEADINGS)} |", rule]
        for leads, texts in table_rows(part, metric=metric):
            cells = [markdown_safe(text) for text in texts]
            cells[0] = f"**{cells[0]}**" if leads else cells[0]
            lines.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def as_csv(points: pd.DataFrame) -> str:
    """The same unrounded: fractions with standard deviation and interval over seeds, bits, bytes."""
    keys = [f"test/{key}{part}" for key in METRICS for part in ("", ":std", ":low", ":high")]
    return points[[*PANEL, "variant", "budget", BITS, BYTES, *keys, "num_seeds"]].to_csv(index=False)


def caption(points: pd.DataFrame, *, metric: str) -> str:
    """What the table shows, for below or above it."""
    unequal = more_runs_sentence(points, metric=metric)
    word = "highest" if is_maximized(metric) else "lowest"
    return (
        f"Test data in %, mean over seeds; ± is {PLUS_MINUS}. Runs were chosen by {metric}; bold has the {word} mean "
        "of it at its budget, alone or level with others. EOpp0, EOpp1 and EOdd: less is better "
        f"({metric_of('eodd').meaning})."
    ) + (f" {unequal}" if unequal else "")


def main(argv: list[str] | None = None) -> int:
    """Write the main table (LaTeX, Markdown, CSV) and the main figure (PNG, SVG, PDF)."""
    parser = cli.source_parser("analysis.paper", "Write a paper's main table and main figure.")
    cli.add_metric(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")

    def act(arguments: Any) -> None:
        runs = cli.read_source(arguments)
        metric = arguments.metric
        print(arguments.chosen_by, file=sys.stderr)
        points = mark_front(aggregate(select_cells(runs, metric=metric)), metric=metric)
        figure = front_figure(points, metric=metric)
        files = {f"figure.{kind}": figure_bytes(figure, kind) for kind in FORMATS}
        files["table.tex"] = as_latex(points, metric=metric).encode()
        files["table.md"] = as_markdown(points, metric=metric).encode()
        files["table.csv"] = as_csv(points).encode()
        for name, content in files.items():
            write_bytes(arguments.out / name, content)
            print(arguments.out / name)

    return cli.run(parser, act, argv)


if __name__ == "__main__":
    raise SystemExit(main())
