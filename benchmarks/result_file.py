"""What benchmarks do alike: the ``--out`` option, the dated file that it names, parts in processes of their own."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
CPU_INFO = Path("/proc/cpuinfo")
LIBRARIES = (
    *("torch", "torchvision", "timm", "onnxruntime", "numpy", "scipy", "pillow"),
    *("ray", "optuna", "mlflow"),
)


def result_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with ``--out``, described by the first line of the benchmark's text."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0] if doc else None)
    parser.add_argument("--out", type=Path, help="where the result is written; printed alone where not given")
    return parser


def measure_apart(module: str, *words: object, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What ``python -m module words...`` prints last, as JSON, from a process of its own.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    command = [sys.executable, "-m", module, *map(str, words)]
    ended = subprocess.run(
        command,
        cwd=PROJECT,
        env={**(os.environ if environment is None else environment), "PYTHONPATH": str(PROJECT)},
        text=True,
        capture_output=True,
        check=False,
    )
    if ended.returncode:
        raise RuntimeError(f"{shlex.join(command[1:])} ended with {ended.returncode}:\n{ended.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def write_result(out: Path | None, *, title: str, notes: Sequence[str], lines: Sequence[str]) -> None:
    """Write title and date, what was run on what, notes and tables; nothing without ``out``."""
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join([f"# {title}, {datetime.date.today()}", "", _ran_on(), *notes, "", *lines, ""]))


def _ran_on() -> str:
    """The command, the commit of the code and the machine, in a line."""
    name = Path(sys.argv[0]).stem
    given = [Path(word).name if word.startswith("/") else word for word in _without_out(sys.argv[1:])]
    command = shlex.join(["python", "-m", f"benchmarks.{name}", *given])
    machine = f"{_processor()}, {os.cpu_count()} cores"
    return f"`{command}`, commit {_commit()}, Python {platform.python_version()}, {_versions()}, {machine}."


def _versions() -> str:
    """Of the libraries that figures may depend on."""
    found = []
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


def _without_out(words: Sequence[str]) -> list[str]:
    kept = [word for word in words if not word.startswith("--out=")]
    if "--out" in kept:
        at = kept.index("--out")
        del kept[at : at + 2]
    return kept


def _commit() -> str:
    """The commit that is checked out; a plus where files differ from it; ``unknown`` outside of git."""
    try:
        said = [
            subprocess.run(
                ["git", *words], cwd=PROJECT, capture_output=True, text=True, check=True
            ).stdout.strip()
            for words in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "-uno"))
        ]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return said[0] + ("+" if said[1] else "")


def _processor() -> str:
    """The processor's model where Linux names it."""
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()
