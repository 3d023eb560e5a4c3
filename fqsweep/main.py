"""The command line. `python fqsweep/main.py ...` and `python -m fqsweep ...` are the same as `fqsweep ...`.

Without arguments it runs the paper's grid, because `ray submit CLUSTER.yaml fqsweep/main.py` gives none.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

if __name__ == "__main__":
    # Run as a script, Python puts this folder first, where packages are called `data` and `config`.
    _here = Path(__file__).resolve().parent
    sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != _here]
    if (_here / "names.py").exists():
        sys.path.insert(0, str(_here.parent))

from fqsweep import __version__
from fqsweep.config import SearchSpace
from fqsweep.disk import is_no_space
from fqsweep.engine.handover import hand_over, is_submitted_copy
from fqsweep.errors import (
    EXIT_BAD_INPUT,
    EXIT_FAILED_CELLS,
    EXIT_INTERRUPTED,
    EXIT_NO_SPACE,
    EXIT_OK,
    ClusterError,
    InputError,
    SweepInterrupted,
    TrackingError,
    stop_printing,
)
from fqsweep.files import SweepPaths
from fqsweep.interrupts import noting_ctrl_c
from fqsweep.names import DEFAULT_SELECTION, selection_of
from fqsweep.processes import python_path
from fqsweep.space import find_space, load_space
from fqsweep.tracking.stores import default_uri, is_server, sqlite_uri, without_password

DATA_DIR_VARIABLE = "FQSWEEP_DATA_DIR"
LAST_PORT = 65535


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 done, 1 some cells failed, 2 bad input, 4 disk full, 130 stopped).

    141: whoever read its output along left.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    script = Path(sys.argv[0])
    if not given and script.name != "main.py":
        _parser().print_help(sys.stderr)
        return EXIT_BAD_INPUT
    given = given or ["run", "paper"]  # what ``ray submit CLUSTER.yaml fqsweep/main.py`` means
    options = _parser().parse_args(given)
    try:
        if options.command is _run and is_submitted_copy(script):
            return hand_over(given)
        command: Callable[[argparse.Namespace], int] = options.command
        code = command(options)
        sys.stdout.flush()
        return code
    except InputError as error:
        print(f"fqsweep: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except (TrackingError, ClusterError) as error:
        print(f"fqsweep: {error}", file=sys.stderr)
        return EXIT_FAILED_CELLS
    except SweepInterrupted as error:
        print(f"\nfqsweep: {error}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        print("\nfqsweep: stopped", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return stop_printing()
    except OSError as error:
        if not is_no_space(error):
            raise
        where = f" ({error.filename})" if error.filename else ""
        with contextlib.suppress(OSError):  # the log may lie on the full disk too
            print(
                f"fqsweep: no space left on the disk{where}: what is finished is kept; free some, and the same "
                "command goes on",
                file=sys.stderr,
                flush=True,
            )
        return EXIT_NO_SPACE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fqsweep", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--version", action="version", version=f"fqsweep {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run a sweep, or go on with it")
    run.add_argument("space", metavar="SPACE.yaml", help="a file, or the name of one that comes with fqsweep")
    run.add_argument("--out", type=Path, help="output folder (default: out/<name of the space>)")
    _add_data_dir(run)
    run.add_argument("--tracking-uri", help="MLflow (default: a database in the output folder)")
    run.add_argument("--address", help="a Ray cluster (default: this machine, or RAY_ADDRESS)")
    run.add_argument("--max-concurrent", type=_positive, help="at most so many trials at a time")
    run.set_defaults(command=_run)

    status = commands.add_parser("status", help="how a sweep stands, whether or not it runs")
    status.add_argument("out", type=Path, metavar="OUT", help="output folder of the sweep")
    status.add_argument("--json", action="store_true", help="for programs")
    status.set_defaults(command=_status)

    cancel = commands.add_parser("cancel", help="stop a running sweep as Ctrl-C would")
    cancel.add_argument("out", type=Path, metavar="OUT", help="output folder of the sweep")
    cancel.set_defaults(command=_cancel)

    retry = commands.add_parser(
        "retry", help="clear a sweep's failures; says the command that tries them again"
    )
    retry.add_argument("out", type=Path, metavar="OUT", help="output folder of the sweep")
    retry.add_argument("--failed", action="store_true", help="what failed, which is all there is to try again")
    retry.set_defaults(command=_retry)

    plan = commands.add_parser("plan", help="cells, trials, shared work and expected cost; starts nothing")
    plan.add_argument("space", metavar="SPACE.yaml")
    plan.add_argument("--json", action="store_true", help="for programs")
    _add_data_dir(plan)
    plan.set_defaults(command=_plan)

    data = commands.add_parser("data", help="look at data sets and prepare them")
    data.add_argument("action", choices=("list", "fetch", "verify", "pack"))
    data.add_argument(
        "name", nargs="?", metavar="NAME", help="isic2019, fitzpatrick17k, synthderm, or a SPACE.yaml"
    )
    data.add_argument("--out", type=Path, help="output folder of the sweep that will use the packs")
    _add_data_dir(data)
    data.add_argument("--fast", action="store_true", help="verify: read only the headers of the images")
    data.add_argument("--mirror", metavar="URL", help="fetch: a folder on the web that holds the set's files")
    data.add_argument(
        "--accept-changed", action="store_true", help="fetch: keep images whose MD5 is not the published one"
    )
    data.add_argument(
        "--retry-gone", action="store_true", help="fetch: ask again for images that were gone or changed"
    )
    data.set_defaults(command=_data)

    analyze = commands.add_parser("analyze", help="fronts, tables and the report of a sweep")
    analyze.add_argument("--tracking-uri", required=True)
    analyze.add_argument("--sweep", required=True)
    analyze.add_argument(
        "--parent",
        metavar="RUN",
        help="id of the sweep's parent run, or its first letters, where several sweeps have one name (default: the "
        "latest)",
    )
    analyze.add_argument("--out", type=Path, required=True)
    analyze.add_argument(
        "--metric",
        help="chooses between runs (default: what the sweep's search space chooses by, else "
        f"{DEFAULT_SELECTION})",
    )
    analyze.set_defaults(command=_analyze)

    export = commands.add_parser("export", help="the model of a run, for use elsewhere")
    export.add_argument("run_id", help="id of the run, or its first letters")
    export.add_argument(
        "--format", choices=("packed", "onnx"), help="default: onnx where --out ends with .onnx, else packed"
    )
    export.add_argument("--out", type=Path, required=True, help="file to write")
    export.add_argument(
        "--sweep-out", type=Path, help="the sweep's output folder (default: the newest below out/)"
    )
    export.add_argument("--tracking-uri", help="MLflow, in place of --sweep-out")
    _add_data_dir(export)
    export.set_defaults(command=_export)

    show = commands.add_parser("show", help="one run: settings, metrics, groups, bits of each layer")
    show.add_argument("run_id", help="id of the run, or its first letters")
    show.add_argument("--out", type=Path, help="output folder (default: the newest below out/)")
    show.add_argument("--tracking-uri")
    show.set_defaults(command=_show)

    ui = commands.add_parser("ui", help="open the MLflow UI of a sweep")
    ui.add_argument("--out", type=Path, help="output folder (default: the newest below out/)")
    ui.add_argument("--tracking-uri")
    ui.add_argument("--port", type=_port, default=5000)
    ui.set_defaults(command=_ui)
    return parser


def _add_data_dir(parser: argparse.ArgumentParser) -> None:
    given = os.environ.get(DATA_DIR_VARIABLE)
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path(given) if given else None,
        help=f"folder that holds the data sets (default: the environment variable {DATA_DIR_VARIABLE})",
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _port(text: str) -> int:
    value = _positive(text)
    if value > LAST_PORT:
        raise argparse.ArgumentTypeError(f"must be at most {LAST_PORT}")
    return value


# --- run -----------------------------------------------------------------------------------------


def _run(options: argparse.Namespace) -> int:
    file = find_space(options.space)
    space = load_space(file)
    out = options.out or Path("out") / space.name
    try:
        return _run_and_report(options, file, space, out)
    except KeyboardInterrupt as error:
        again = f"{_own_command()} {shlex.join(_own_arguments())}"
        raise SweepInterrupted(f"stopped; what is finished is kept in {out}. To go on: {again}") from error


def _run_and_report(options: argparse.Namespace, file: Path, space: SearchSpace, out: Path) -> int:
    from fqsweep.engine.checks import preparing

    paths = SweepPaths(out.resolve())
    uri = options.tracking_uri or default_uri(paths)
    with noting_ctrl_c() as raise_if_stopped, preparing(file, paths, options.data_dir, uri) as prepared:
        from fqsweep.engine.sweep import SweepOptions, run_sweep  # takes seconds, while that goes on

        raise_if_stopped()
        summary = run_sweep(
            SweepOptions(
                space_file=file,
                out=out,
                data_dir=options.data_dir,
                tracking_uri=options.tracking_uri,
                address=options.address,
                max_concurrent=options.max_concurrent,
                prepared=prepared,
                raise_if_stopped=raise_if_stopped,
                command=(*shlex.split(_own_command()), *_own_arguments()),
            )
        )
    for failure in summary.failures:
        print(f"failed: {failure}", file=sys.stderr)
    if summary.failures:
        print(f"to try them again: {_own_command()} retry {shlex.quote(str(out))}", file=sys.stderr)
    if summary.counts["done"]:
        metric = selection_of(space.search.objectives)
        try:
            _report(
                summary.tracking_uri,
                space.name,
                SweepPaths(out).report,
                metric=metric,
                parent_id=summary.parent_id,
                publish=True,
            )
        except InputError as error:
            print(f"fqsweep: the sweep is done, but its report could not be made: {error}", file=sys.stderr)
            return EXIT_FAILED_CELLS
    _print_end(options, out, summary.tracking_uri, summary.counts)
    return EXIT_OK if summary.counts["done"] == sum(summary.counts.values()) else EXIT_FAILED_CELLS


def _print_end(options: argparse.Namespace, out: Path, uri: str, counts: dict[str, int]) -> None:
    total = sum(counts.values())
    print(
        f"\n{counts['done']} of {total} cells done"
        + (f", {counts['failed']} failed" if counts["failed"] else "")
    )
    if counts["done"]:
        print(f"report:   {(SweepPaths(out).report / 'report.html').resolve()}")
    uri = without_password(uri)
    print(f"tracking: {uri}")
    where = f"--tracking-uri {shlex.quote(uri)}" if options.tracking_uri else f"--out {shlex.quote(str(out))}"
    print(f"open the MLflow UI with: {_own_command()} ui {where}")


def _own_command() -> str:
    """How this program can be called from where the person is: by name, or by the path it was called with."""
    script = Path(sys.argv[0]).name
    if script == "main.py":
        return f"{shlex.quote(sys.executable)} {shlex.quote(sys.argv[0])}"
    if script == "__main__.py":
        return f"{shlex.quote(sys.executable)} -m fqsweep"
    return "fqsweep" if shutil.which("fqsweep") else shlex.quote(sys.argv[0])


def _own_arguments() -> list[str]:
    """What this program was called with, to be shown and kept: without the passwords of addresses."""
    return [without_password(word) for word in sys.argv[1:]]


def _report(
    uri: str, sweep: str, out: Path, *, metric: str | None, parent_id: str | None, publish: bool = False
) -> None:
    """Analyse in a process of its own: it needs neither torch nor Ray, and nothing here imports it.

    Args:
        metric: the validation metric that chooses between runs, None for that of the stored search space.
        parent_id: the parent run of the sweep, None for the latest of that name.
        publish: whether that run gets the files.
    """
    options = ["--tracking-uri", uri, "--sweep", sweep, "--out", str(out)]
    options += ["--metric", metric] if metric else []
    options += ["--parent", parent_id] if parent_id else []
    print(_run_analysis("report", options), end="")
    if publish:
        assert parent_id is not None
        from fqsweep.tracking.publishing import publish_report

        publish_report(uri, parent_id, out)


def _run_analysis(script: str, options: Sequence[str]) -> str:
    """What a script of the analysis prints, run in a process of its own."""
    command = [sys.executable, "-m", f"analysis.{script}", *options]
    environment = {**os.environ, "PYTHONPATH": python_path()}
    ended = subprocess.run(command, env=environment, text=True, capture_output=True, check=False)
    if ended.returncode == EXIT_BAD_INPUT:
        raise InputError(ended.stderr.strip().removeprefix("Error: "))
    if ended.returncode != 0:
        shown = without_password(f"{shlex.join(command)}\n{ended.stderr}")
        raise RuntimeError(f"the analysis failed; run it again with: {shown}")
    return ended.stdout


# --- the other commands --------------------------------------------------------------------------


def _status(options: argparse.Namespace) -> int:
    from fqsweep.engine.control import as_json, describe, look

    status = look(SweepPaths(options.out))
    print(as_json(status) if options.json else describe(status))
    return EXIT_OK


def _cancel(options: argparse.Namespace) -> int:
    from fqsweep.engine.control import ask_to_stop

    who = ask_to_stop(SweepPaths(options.out))
    print(f"asked {who} to stop; what is finished is kept, and the same command goes on")
    return EXIT_OK


def _retry(options: argparse.Namespace) -> int:
    from fqsweep.engine.control import clear_failures, command_to_go_on

    cleared = clear_failures(SweepPaths(options.out))
    for title in cleared:
        print(f"cleared: {title}")
    if cleared:
        print(f"To try them again: {command_to_go_on(options.out)}")
    else:
        print(f"{options.out} has no failures")
    return EXIT_OK


def _plan(options: argparse.Namespace) -> int:
    from fqsweep.cells import expand_cells
    from fqsweep.data_commands import print_data_warnings
    from fqsweep.engine.checks import check_networks
    from fqsweep.engine.estimate import describe_plan, estimate

    space = load_space(find_space(options.space))
    plan = estimate(space, data_dir=options.data_dir, num_cores=os.cpu_count() or 1)
    check_networks(space)
    if options.json:
        cells = [
            {"title": c.title, "key": c.key, "budget_bits": c.budget_bits, "budget_bytes": c.budget_bytes}
            for c in expand_cells(space)
        ]
        print(json.dumps({"name": space.name, **dataclasses.asdict(plan), "cells": cells}, indent=1))
    else:
        print(describe_plan(space, plan, data_dir=options.data_dir), flush=True)
    # A program that reads the plan finds nothing else on stdout.
    with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
        usable = [print_data_warnings(dataset, options.data_dir) for dataset in space.datasets]
    return EXIT_OK if all(usable) else EXIT_BAD_INPUT


def _data(options: argparse.Namespace) -> int:
    from fqsweep.data_commands import fetch, list_sets, pack, verify

    if options.action == "list":
        return list_sets(options)
    if options.name is None:
        raise InputError(
            f"data {options.action} needs a data set or a search space: fqsweep data {options.action} isic2019"
        )
    return {"fetch": fetch, "verify": verify, "pack": pack}[options.action](options)


def _analyze(options: argparse.Namespace) -> int:
    _report(options.tracking_uri, options.sweep, options.out, metric=options.metric, parent_id=options.parent)
    print(f"\nreport:   {(options.out / 'report.html').resolve()}")
    return EXIT_OK


def _export(options: argparse.Namespace) -> int:
    from fqsweep.export import export_kind, export_run

    if options.out.is_dir():
        raise InputError(
            f"--out {options.out} is a folder: give the file to write, such as {options.out}/model.fqs"
        )
    kind = export_kind(options.format, options.out)
    uri = options.tracking_uri or _uri_of(options.sweep_out or _newest_out("--sweep-out"))
    for line in export_run(
        uri,
        options.run_id,
        options.out,
        kind=kind,
        data_dir=options.data_dir,
    ):
        print(line, flush=True)
    return EXIT_OK


def _show(options: argparse.Namespace) -> int:
    uri = options.tracking_uri or _uri_of(options.out or _newest_out())
    print(_run_analysis("show", [options.run_id, "--tracking-uri", uri]), end="")
    return EXIT_OK


def _ui(options: argparse.Namespace) -> int:
    """Turn into the MLflow UI, so that whatever ends this process ends the UI."""
    uri = options.tracking_uri or _uri_of(options.out or _newest_out())
    if is_server(uri):
        print(f"MLflow UI: {without_password(uri)} (the tracking server shows it itself)")
        return EXIT_OK
    port = options.port
    while _is_taken(port) and port < LAST_PORT:
        port += 1
    # One reader needs one worker, none of the server's background jobs, and nothing sent to anybody.
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--host", "127.0.0.1"]
    print(f"MLflow UI: http://127.0.0.1:{port} (ready in some seconds; Ctrl-C ends it)", flush=True)
    os.execv(command[0], [*command, "--port", str(port), "--workers", "1"])


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def _newest_out(option: str = "--out") -> Path:
    databases = [SweepPaths(folder).tracking_db for folder in Path("out").glob("*")]
    found = [database for database in databases if database.exists()]
    if not found:
        raise InputError(f"no sweep below out/ here: give {option} DIR or --tracking-uri URI")
    return max(found, key=lambda database: database.stat().st_mtime).parent


def _uri_of(out: Path) -> str:
    database = SweepPaths(out).tracking_db.resolve()
    if not database.exists():
        raise InputError(
            f"{out} holds no MLflow database ({database.name}): give the output folder of a sweep, or --tracking-uri"
        )
    return sqlite_uri(database)


if __name__ == "__main__":
    sys.exit(main())
