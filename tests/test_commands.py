"""Every command that a reader finds in the documentation is one that its program takes."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from fqsweep.main import _parser

PROJECT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [
        PROJECT / "README.md",
        PROJECT / "CONTRIBUTING.md",
        *PROJECT.glob("docs/**/*.md"),
        *PROJECT.glob("benchmarks/results/*.md"),
        *PROJECT.glob("search_spaces/*.*"),
    ]
)
# A command ends where its code, its comment or the sentence around it does.
COMMAND = re.compile(r"(?<![\w./-])(?:fqsweep [a-z]|python -m (?:analysis|benchmarks)\.[a-z])[^`#;)(|']*")


class Parsed(Exception):
    pass


def commands_of(text: str) -> list[list[str]]:
    """The commands in a page, as words: what stands in code, over line ends, without what may be left out."""
    found = []
    in_code = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    lines = [line for block in in_code for line in block.splitlines()]
    lines += [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
    lines += re.findall(r"^# +(fqsweep run .*)$", text, flags=re.MULTILINE)
    for line in lines:
        for command in COMMAND.findall(line):
            words = shlex.split(re.sub(r"\[.*?\]|\.\.\.", "", command.split("   ")[0]))
            if words[0] == "python" or len(words) > 2:  # ``fqsweep run`` alone is a name in a sentence
                found.append(words)
    return found


FOUND = sorted({tuple(words) for page in PAGES for words in commands_of(page.read_text(encoding="utf-8"))})


def test_the_pages_hold_commands() -> None:
    assert len(FOUND) > 30
    assert ("fqsweep", "run", "search_spaces/isic2019_cpu.yaml") in {words[:3] for words in FOUND}


@pytest.mark.parametrize("words", FOUND, ids=" ".join)
def test_a_command_of_the_documentation_is_taken(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if words[0] == "fqsweep":
        _parser().parse_args(words[1:])
        return
    module = importlib.import_module(words[2])
    parse = argparse.ArgumentParser.parse_args

    def parse_alone(self: argparse.ArgumentParser, *given: Any, **named: Any) -> None:
        parse(self, *given, **named)
        raise Parsed

    monkeypatch.setattr(sys, "argv", [words[2], *words[3:]])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_alone)
    with pytest.raises(Parsed):
        module.main()
