"""What the scripts of this package share: where runs come from, and how they end."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from analysis.columns import check_selection_metric, listing
from analysis.mlflow_runs import load_runs, load_selection
from analysis.runs import join_sweeps, load_csv
from fqsweep.errors import EXIT_BAD_INPUT, EXIT_OK, InputError, stop_printing
from fqsweep.files import write_bytes
from fqsweep.names import DEFAULT_SELECTION


def source_parser(module: str, description: str) -> argparse.ArgumentParser:
    """A parser with the options that say which runs to read."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("--tracking-uri", help="MLflow tracking URI, for example sqlite:////data/out/mlflow.db")
    parser.add_argument(
        "--sweep", action="append", help="name of the sweep; again for more; a title with --csv"
    )
    parser.add_argument("--parent", help="run id of the sweep's parent run, where several sweeps have one name")
    parser.add_argument(
        "--csv",
        type=Path,
        action="append",
        help="read the runs from this CSV instead of MLflow; again for more (files of one name are called by their "
        "folders)",
    )
    return parser


def add_metric(parser: argparse.ArgumentParser) -> None:
    """Add the option that says which validation metric chooses; ``read_source`` settles it where it is left open."""
    parser.add_argument(
        "--metric",
        help="validation metric that chooses the run of each cell (default: that of the sweep's search space, "
        f"else {DEFAULT_SELECTION})",
    )


def read_source(arguments: argparse.Namespace, *, shows_notes: bool = False) -> pd.DataFrame:
    """The runs that the options name; a ``metric`` that was not given becomes the one that their sweeps choose by.

    Where the options have a metric, ``chosen_by`` becomes the line that names it, with what is not certain about it.
    What was left out of the runs or looks odd is printed to stderr: stdout may be read by a program.

    Args:
        shows_notes: the script shows the notes itself, so that they are not printed here.

    Raises:
        InputError: the options are incomplete, or the runs cannot be read.
    """
    if getattr(arguments, "metric", None) is not None:
        check_selection_metric(arguments.metric)
    runs = _runs_of(arguments)
    if not shows_notes:
        for note in runs.attrs.get("notes", []):
            print(f"Note: {note}", file=sys.stderr)
    if "metric" in arguments:
        unsure = [] if arguments.metric else _settle_metric(arguments, runs)
        arguments.chosen_by = "\n".join(
            [f"Chosen by {arguments.metric}.", *(f"Note: {note}" for note in unsure)]
        )
        runs.attrs["notes"] = [*runs.attrs.get("notes", []), *unsure]
    return runs


def _settle_metric(arguments: argparse.Namespace, runs: pd.DataFrame) -> list[str]:
    """Set the metric that was left open; returns what is not certain about it."""
    if not arguments.csv:
        arguments.metric, unsure = load_selection(arguments.tracking_uri, runs)
        return unsure
    arguments.metric = DEFAULT_SELECTION
    return [
        f"A CSV does not tell what its search chose by: {DEFAULT_SELECTION} chooses here, --metric names another."
    ]


def _runs_of(arguments: argparse.Namespace) -> pd.DataFrame:
    if arguments.csv:
        names = _names_of(arguments.csv)
        return join_sweeps({name: load_csv(path) for name, path in zip(names, arguments.csv, strict=True)})
    if not arguments.tracking_uri or not arguments.sweep:
        raise InputError("Give --tracking-uri and --sweep, or --csv.")
    if arguments.parent and len(arguments.sweep) > 1:
        raise InputError("--parent names one sweep: give one --sweep with it.")
    return join_sweeps(
        {name: load_runs(arguments.tracking_uri, name, parent_id=arguments.parent) for name in arguments.sweep}
    )


def _names_of(files: Sequence[Path]) -> list[str]:
    """What the sweeps in CSV files are called: by the files' stems, or by their folders where stems are the same.

    Raises:
        InputError: two files would still be called the same.
    """
    num_called = Counter(path.stem for path in files)
    folders = [Path(os.path.abspath(path)).parent.name for path in files]
    names = [
        path.stem if num_called[path.stem] == 1 else folder for path, folder in zip(files, folders, strict=True)
    ]
    name, num = Counter(names).most_common(1)[0]
    if num > 1:
        alike = [repr(str(path)) for path, called in zip(files, names, strict=True) if called == name]
        raise InputError(
            f"Each CSV must have a name of its own, or lie in a folder with one, but {listing(alike)} are called "
            f"{name!r}: rename a file or a folder, or give each file once."
        )
    return names


def title_of(arguments: argparse.Namespace) -> str:
    """What the pages are called: the sweeps' names, else those of the files."""
    return ", ".join(arguments.sweep or _names_of(arguments.csv))


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    write_bytes(path, text.encode())


def run(
    parser: argparse.ArgumentParser, act: Callable[[argparse.Namespace], None], argv: list[str] | None
) -> int:
    """Parse, act, and end with 0, or with 2 and one line where the input cannot be used."""
    arguments = parser.parse_args(argv)
    try:
        act(arguments)
        sys.stdout.flush()  # while somebody can still be told
    except InputError as error:
        print(f"Error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except BrokenPipeError:
        return stop_printing()
    except OSError as error:
        print(
            f"Error: {error.filename or 'a file'} cannot be read or written: {error.strerror}", file=sys.stderr
        )
        return EXIT_BAD_INPUT
    return EXIT_OK
