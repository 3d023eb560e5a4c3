"""The end table, variant x budget for each panel: for the terminal, Markdown, CSV and LaTeX."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd

from analysis import cli
from analysis.columns import ABSENT, BITS, BYTES, POINT, bytes_text, panel_title, panels, percent
from analysis.intervals import half_width
from analysis.pareto import aggregate, mark_front, select_cells
from fqsweep.names import metric_of

MAX_WIDTH = 110
PLUS_MINUS = "half of the 95 % t interval over seeds"


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of the table: heading, whether text is aligned right, and a cell's text."""

    heading: str
    right: bool
    text: Callable[[pd.Series], str]
    meaning: str = ""


def with_interval(row: pd.Series, key: str) -> str:
    """A mean over seeds in percent, and half of its interval (``PLUS_MINUS``) where it has one."""
    half = half_width(row, key)
    return percent(row[key]) + (f" ±{100 * half:.1f}" if pd.notna(half) else "")


def _share(key: str, heading: str) -> Column:
    return Column(
        heading=heading, right=True, text=lambda row: percent(row[key]), meaning=metric_of(key).meaning
    )


RUNS = Column(
    heading="runs",
    right=True,
    text=lambda row: str(row["num_runs"]),
    meaning="runs that each seed's was chosen from on validation; the most of any seed",
)
COLUMNS: tuple[Column, ...] = (
    Column(heading="variant", right=False, text=lambda row: str(row["variant"])),
    Column(
        heading="budget",
        right=True,
        text=lambda row: str(row["budget"]),
        meaning="bits per weight, or size on disk, that was allowed",
    ),
    Column(
        heading="bits",
        right=True,
        text=lambda row: f"{row[BITS]:.2f}" if pd.notna(row[BITS]) else ABSENT,
        meaning=metric_of(BITS).meaning,
    ),
    Column(
        heading="size", right=True, text=lambda row: bytes_text(row[BYTES]), meaning=metric_of(BYTES).meaning
    ),
    Column(
        heading="worst %",
        right=True,
        text=partial(with_interval, key="test/acc_worst"),
        meaning=f"{metric_of('test/acc_worst').meaning}; ± {PLUS_MINUS}",
    ),
    _share("test/acc_avg", "average %"),
    _share("test/acc_gap", "gap %"),
    _share("test/balanced_acc_worst", "worst bal. %"),
    RUNS,
    Column(heading="seeds", right=True, text=lambda row: str(row["num_seeds"]), meaning="seeds averaged over"),
    Column(
        heading="front",
        right=False,
        text=lambda row: "*" if row["on_front"] else "",
        meaning="on the front of validation against true bits",
    ),
)


def columns_of(points: pd.DataFrame) -> tuple[Column, ...]:
    """The columns that say something: that of runs only where rows were chosen from unequal numbers of them."""
    return tuple(c for c in COLUMNS if c is not RUNS or points["num_runs"].nunique() > 1)


def cell_texts(points: pd.DataFrame, columns: tuple[Column, ...]) -> list[list[str]]:
    """The table's cells as text, one list a row."""
    return [[column.text(row) for column in columns] for _, row in points.iterrows()]


def _has_intervals(points: pd.DataFrame) -> bool:
    """Whether any row has a ±: one seed has none."""
    return bool(points["test/acc_worst:high"].notna().any())


def _legend(points: pd.DataFrame) -> list[str]:
    return [f"± is {PLUS_MINUS}."] if _has_intervals(points) else []


def as_text(points: pd.DataFrame) -> str:
    """Aligned lines of at most ``MAX_WIDTH`` characters; long variant names are cut."""
    parts, columns = [], columns_of(points)
    for panel, part in panels(points):
        rows = [[c.heading for c in columns], *cell_texts(part, columns)]
        widths = [max(map(len, texts)) for texts in zip(*rows, strict=True)]
        widths[0] -= max(0, sum(widths) + 2 * (len(widths) - 1) - MAX_WIDTH)
        lines = ["  ".join(_aligned(row, widths, columns)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * w for w in widths))
        parts.append("\n".join([f"{panel_title(panel)} (test data)"[:MAX_WIDTH], *lines]))
    return "\n\n".join(parts + _legend(points))


def _aligned(row: list[str], widths: list[int], columns: tuple[Column, ...]) -> list[str]:
    out = []
    for text, width, column in zip(row, widths, columns, strict=True):
        fitted = text if len(text) <= width else text[: width - 1] + "…"
        out.append(fitted.rjust(width) if column.right else fitted.ljust(width))
    return out


def as_markdown(points: pd.DataFrame) -> str:
    """A heading and a pipe table for each panel."""
    columns = columns_of(points)
    rule = "|" + "|".join("--:" if c.right else ":--" for c in columns) + "|"
    parts = []
    for panel, part in panels(points):
        rows = [[c.heading for c in columns], *cell_texts(part, columns)]
        lines = ["| " + " | ".join(map(markdown_safe, row)) + " |" for row in rows]
        parts.append("\n".join([f"### {markdown_safe(panel_title(panel))}", "", lines[0], rule, *lines[1:]]))
    return "\n\n".join(parts + _legend(points)) + "\n"


def markdown_safe(text: str) -> str:
    """The text as Markdown that shows it and nothing else."""
    return re.sub(r"([\\|*_`<>\[\]])", r"\\\1", text).replace("\n", " ")


def as_csv(points: pd.DataFrame) -> str:
    """The same rows unrounded: fractions, bits, bytes; intervals over seeds in columns of their own."""
    keys = ["test/acc_worst", "test/acc_avg", "test/acc_gap", "test/balanced_acc_worst"]
    spread = [f"test/acc_worst:{what}" for what in ("std", "low", "high")]
    columns = [
        *POINT,
        "budget_bits",
        "budget_bytes",
        BITS,
        BYTES,
        *keys,
        *spread,
        "num_runs",
        "num_seeds",
        "on_front",
        "seeds",
        "run_ids",
    ]
    return points[columns].to_csv(index=False)


def as_latex(points: pd.DataFrame) -> str:
    """A booktabs table for each panel; needs ``\\usepackage{booktabs}``."""
    columns = columns_of(points)
    spec = "".join("r" if c.right else "l" for c in columns)
    parts = []
    for panel, part in panels(points):
        rows = [[c.heading for c in columns], *cell_texts(part, columns)]
        lines = [" & ".join(map(latex_safe, row)) + r" \\" for row in rows]
        body = [r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
        legend = f"; ± {PLUS_MINUS}" if _has_intervals(part) else ""
        caption = rf"\caption{{{latex_safe(f'{panel_title(panel)}; test data{legend}.')}}}"
        table = [r"\begin{table}", r"\centering", caption, rf"\begin{{tabular}}{{{spec}}}", *body]
        parts.append("\n".join([*table, r"\end{tabular}", r"\end{table}"]))
    return "\n\n".join(parts) + "\n"


_LATEX = {
    **{c: rf"\{c}" for c in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "–": "--",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}


def latex_safe(text: str) -> str:
    """The text as LaTeX that shows it and nothing else."""
    return "".join(_LATEX.get(character, character) for character in text)


FORMATS: dict[str, Callable[[pd.DataFrame], str]] = {
    "text": as_text,
    "markdown": as_markdown,
    "csv": as_csv,
    "latex": as_latex,
}


def main(argv: list[str] | None = None) -> int:
    """Print the end table."""
    parser = cli.source_parser("analysis.tables", "Print the end table, variant x budget on test data.")
    cli.add_metric(parser)
    parser.add_argument("--format", choices=sorted(FORMATS), default="text", help="default: %(default)s")

    def act(arguments: Any) -> None:
        cells = select_cells(cli.read_source(arguments), metric=arguments.metric)
        points = mark_front(aggregate(cells), metric=arguments.metric)
        # What programs read has nothing else in it.
        beside = sys.stderr if arguments.format in ("csv", "latex") else sys.stdout
        print(arguments.chosen_by, end="\n\n", file=beside)
        print(FORMATS[arguments.format](points).rstrip())

    return cli.run(parser, act, argv)


if __name__ == "__main__":
    raise SystemExit(main())
