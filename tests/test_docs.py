"""Every example in the documentation of fqsweep's modules runs and shows what it says."""

from __future__ import annotations

import ast
import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import fqsweep
from fqsweep.cells import expand_cells
from fqsweep.engine.search import trials_wanted
from fqsweep.space import load_space

PROJECT = Path(__file__).resolve().parents[1]
MODULES = sorted(info.name for info in pkgutil.walk_packages(fqsweep.__path__, "fqsweep."))
# The entry script and those that start Ray or MLflow hold no examples and cost seconds to import.
HEAVY = {"fqsweep.main", "fqsweep.engine.sweep", "fqsweep.tracking.tracker"}
PUBLIC_WITH_EXAMPLE = (
    ("fqsweep.allocation", "allocate_bits"),
    ("fqsweep.fairness", "fairness_report"),
    ("fqsweep.quant.grid", "fake_quantize"),
)


@pytest.mark.parametrize("name", [name for name in MODULES if name not in HEAVY])
def test_the_examples_of_a_module_show_what_it_does(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


@pytest.mark.parametrize("name", sorted(HEAVY))
def test_modules_that_are_not_imported_here_have_no_examples(name: str) -> None:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    with open(spec.origin, encoding="utf-8") as stream:
        assert ">>> " not in stream.read()


@pytest.mark.parametrize(("module", "name"), PUBLIC_WITH_EXAMPLE)
def test_the_functions_that_others_call_have_an_example(module: str, name: str) -> None:
    function = getattr(importlib.import_module(module), name)
    assert doctest.DocTestFinder().find(function, name)[0].examples
    assert "Raises:" in function.__doc__


PAGE = PROJECT / "docs" / "troubleshooting.md"


def texts_in_source() -> list[str]:
    """Every piece of literal text in the package's code."""
    found = []
    for path in (PROJECT / "fqsweep").rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        found += [
            node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
    return found


def test_every_message_that_the_documentation_explains_is_one_that_the_code_gives() -> None:
    texts = texts_in_source()
    rows = re.findall(r"^\| `(.*?)` \|", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(rows) > 10
    for message in rows:
        pieces = [piece.strip() for piece in message.split("...") if len(piece.strip()) >= 9]
        assert pieces, message
        for piece in pieces:
            assert any(piece in text for text in texts), f"no message of the code has {piece!r}"


def test_what_the_guide_for_contributors_names_is_there() -> None:
    rows = re.findall(
        r"^\| (?:a|an) .*? \| (.*) \|$", (PROJECT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE
    )
    assert len(rows) >= 7
    source = "\n".join(path.read_text(encoding="utf-8") for path in (PROJECT / "fqsweep").rglob("*.py"))
    for name in re.findall(r"`(.*?)`", " ".join(rows)):
        is_file = (PROJECT / name).exists() or (PROJECT / "fqsweep" / f"{name}.py").exists()
        assert is_file or re.search(rf"^(?:    )?(?:def |class )?{name}\b", source, flags=re.MULTILINE), name


SPACES = sorted((PROJECT / "search_spaces").glob("*.yaml"))


def counts_said(path: Path) -> list[tuple[str, str]]:
    """Every number of cells and trials in the comment that a search space begins with: (number, what)."""
    comment = re.match(r"(?:#.*\n)+", path.read_text(encoding="utf-8"))
    return re.findall(r"([\d,]*\d) (cells|trials)\b", comment[0] if comment else "")


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_a_space_expands_to_the_cells_and_trials_that_its_comment_says(path: Path) -> None:
    space = load_space(path)
    cells = expand_cells(space)
    counts = {"cells": len(cells), "trials": sum(trials_wanted(cell, space.search) for cell in cells)}
    for number, what in counts_said(path):
        assert int(number.replace(",", "")) == counts[what]


def test_every_space_but_the_largest_says_how_many_cells_and_trials_they_have() -> None:
    silent = {path.stem for path in SPACES if {what for _, what in counts_said(path)} != {"cells", "trials"}}
    assert silent == {"paper"}  # whose comment names ``plan``


DOCUMENTS = sorted(
    [
        *PROJECT.glob("*.md"),
        *PROJECT.glob("docs/**/*.md"),
        *PROJECT.glob("search_spaces/*.md"),
        *PROJECT.glob("benchmarks/results/*.md"),
    ]
)


def anchors_of(path: Path) -> set[str]:
    """What a link may name in a page, made of its headings as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(PROJECT)))
def test_every_link_leads_to_a_file_and_a_heading_that_are_there(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        to = (page.parent / name).resolve() if name else page
        assert to.exists(), target
        assert not anchor or anchor in anchors_of(to), target


def test_every_page_that_code_or_a_search_space_names_is_there() -> None:
    sources = [
        path for folder in ("fqsweep", "analysis", "benchmarks") for path in (PROJECT / folder).rglob("*.py")
    ]
    for path in [*sources, *SPACES]:
        for name in re.findall(r"\bdocs/[\w/]+\.md", path.read_text(encoding="utf-8")):
            assert (PROJECT / name).exists(), f"{path.name}: {name}"
