"""Imports point one way only, and heavy libraries stay where they belong: read from the source."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
# A module imports from its own line and the lines before it; packages count as one.
ORDER = (
    ("fqsweep", "errors", "names", "config"),
    ("cells", "space", "files", "disk", "results", "processes", "interrupts", "reference"),
    ("data", "models", "allocation", "cost_table", "fairness", "checkpoints", "progress", "pictures"),
    ("quant",),
    ("predictors", "importance", "training"),
    ("setting", "assignment", "baseline"),
    ("finetuning", "trial"),
    ("tracking", "served_model"),
    ("engine", "data_commands", "export"),
    ("main",),
    ("__main__",),
)
ONLY_IN = {
    "ray": {f"fqsweep.engine.{name}" for name in ("sweep", "forgetting", "actor", "handover")},
    "optuna": {"fqsweep.engine.studies"},
    "mlflow": {
        *(f"fqsweep.tracking.{name}" for name in ("tracker", "publishing", "new_database")),
        "analysis.mlflow_runs",
    },
    "timm": {"fqsweep.models"},
    "onnx": {"fqsweep.quant.onnx_export", "fqsweep.quant.onnx_decoding"},
    "onnxruntime": {"fqsweep.quant.onnx_export"},
}
WITHOUT_TORCH = (
    *("errors", "names", "config", "cells", "space", "files", "disk", "results", "progress", "pictures"),
    *("allocation", "cost_table", "fairness"),
    *("tracking.machine", "tracking.stores"),
    *(f"engine.{name}" for name in ("tasks", "search", "stopping", "studies", "ledger", "gpus", "faults")),
    *("engine.control", "engine.handover"),
)


def module_name(path: Path) -> str:
    parts = path.relative_to(PROJECT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    module_name(path): path for package in ("fqsweep", "analysis") for path in (PROJECT / package).rglob("*.py")
}


@lru_cache
def imported_by(module: str) -> set[str]:
    """Full names of all modules that the source imports, at its top or within functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(SOURCES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            base = node.module or ""
            found |= {name if (name := f"{base}.{alias.name}") in SOURCES else base for alias in node.names}
    return found


def part_of(module: str) -> str:
    """The module or package directly below ``fqsweep``."""
    return module.split(".")[1] if "." in module else module


def rank(module: str) -> int:
    return next(number for number, row in enumerate(ORDER) if part_of(module) in row)


def reaches(module: str) -> set[str]:
    """Everything of this project that the module imports, directly or not."""
    seen: set[str] = set()
    open_ = [module]
    while open_:
        for other in imported_by(open_.pop()) & set(SOURCES):
            if other not in seen:
                seen.add(other)
                open_.append(other)
    return seen


PRODUCT = sorted(module for module in SOURCES if module.startswith("fqsweep"))
ANALYSIS = sorted(module for module in SOURCES if module.startswith("analysis"))


def test_the_sources_are_found() -> None:
    assert {"fqsweep.allocation", "fqsweep.quant.grid", "fqsweep.data", "analysis.load"} <= set(SOURCES)
    assert "fqsweep.errors" in imported_by("fqsweep.space")
    assert "fqsweep.files" in reaches("fqsweep.engine.sweep")


@pytest.mark.parametrize("module", PRODUCT)
def test_every_module_has_a_place_in_the_order_and_imports_only_from_before_it(module: str) -> None:
    own = rank(module)
    for other in imported_by(module):
        if other.split(".")[0] == "fqsweep":
            assert rank(other) <= own, f"{module} imports {other}, which comes after it"


@pytest.mark.parametrize("module", [*PRODUCT, *ANALYSIS])
def test_no_module_imports_itself_in_a_circle(module: str) -> None:
    assert module not in reaches(module)


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_is_imported_where_it_belongs_and_nowhere_else(library: str) -> None:
    users = {m for m in SOURCES if any(name.split(".")[0] == library for name in imported_by(m))}
    assert users <= ONLY_IN[library]
    assert users


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_the_numerical_and_plain_modules_need_no_torch(name: str) -> None:
    module = f"fqsweep.{name}"
    for other in {module, *reaches(module)}:
        assert not any(n.split(".")[0] in ("torch", "torchvision", "timm") for n in imported_by(other)), other


@pytest.mark.parametrize("module", ANALYSIS)
def test_the_analysis_reads_only_the_light_modules(module: str) -> None:
    used = {name for name in imported_by(module) if name.split(".")[0] == "fqsweep"}
    assert used <= {"fqsweep", "fqsweep.errors", "fqsweep.files", "fqsweep.names", "fqsweep.tracking.stores"}
    heavy = {"torch", "torchvision", "ray", "timm", "optuna"}
    assert not {name.split(".")[0] for name in imported_by(module)} & heavy


def test_nothing_imports_the_analysis() -> None:
    for module in PRODUCT:
        assert not any(name.split(".")[0] == "analysis" for name in imported_by(module)), module


@pytest.mark.parametrize(
    ("modules", "forbidden"),
    [
        ("fqsweep.allocation, fqsweep.fairness, fqsweep.space, fqsweep.files", "torch, ray, mlflow, timm"),
        ("analysis.report, analysis.page, analysis.load", "torch, ray, timm, optuna"),
        ("fqsweep.main, fqsweep.engine.control", "torch, ray, mlflow, timm, optuna"),
        ("fqsweep.engine.sweep", "torch, timm, torchvision"),
    ],
)
def test_importing_it_really_loads_none_of(modules: str, forbidden: str) -> None:
    code = f"import sys, {modules}; print([n for n in {forbidden.split(', ')} if n in sys.modules])"
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.stdout.strip() == "[]", ended.stdout + ended.stderr


def test_the_picture_of_the_architecture_shows_the_order_that_is_kept() -> None:
    page = (PROJECT / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawn = [tuple(row.split(", ")) for row in re.findall(r'^    r\d+\["(.*)"\]$', page, flags=re.MULTILINE)]
    assert drawn == list(ORDER)
    assert " --> ".join(f"r{number}" for number in range(len(ORDER))) in page
    for library in ONLY_IN.keys() & {"ray", "optuna", "mlflow", "timm"}:
        row = next(line for line in page.splitlines() if line.lower().startswith(f"| {library} |"))
        assert set(re.findall(r"`([\w.]+)`", row)) == {m.removeprefix("fqsweep.") for m in ONLY_IN[library]}
