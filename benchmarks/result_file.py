"""What every benchmark does alike: its ``--out`` option, and the dated file that it leaves there."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Sequence
from pathlib import Path


def result_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with ``--out``, described by the first line of the benchmark's text."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0] if doc else None)
    parser.add_argument("--out", type=Path, help="where the result is written; printed alone where not given")
    return parser


def write_result(out: Path | None, *, title: str, notes: Sequence[str], lines: Sequence[str]) -> None:
    """Write title and date, what was run on what, and the tables; nothing without ``out``."""
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join([f"# {title}, {datetime.date.today()}", "", *notes, "", *lines, ""]))
