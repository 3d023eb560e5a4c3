"""The finished trial runs of a sweep, from MLflow or from CSV files: counted, or written as one CSV."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from analysis import cli


def main(argv: list[str] | None = None) -> int:
    """Print what was loaded, or write it as CSV."""
    parser = cli.source_parser("analysis.load", "Read the finished runs of a sweep, or write them as CSV.")
    parser.add_argument("--out", type=Path, help="CSV file to write, readable with --csv")

    def act(arguments: Any) -> None:
        frame = cli.read_source(arguments, shows_notes=True)
        for note in frame.attrs["notes"]:
            print(f"Note: {note}")
        if arguments.out:
            cli.write_text(arguments.out, frame.to_csv(index=False))
        print(f"{len(frame)} finished runs" + (f" -> {arguments.out}" if arguments.out else ""))

    return cli.run(parser, act, argv)


if __name__ == "__main__":
    raise SystemExit(main())
