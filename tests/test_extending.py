"""The walk through what can be added to fqsweep really runs, block by block, as a reader would run it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fqsweep.main import main

PAGE = Path(__file__).resolve().parents[1] / "docs" / "extending.md"


def blocks() -> list[str]:
    return re.findall(
        r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )


def test_every_block_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    assert len(blocks()) == 6
    for block in blocks():
        exec(compile(block, str(PAGE), "exec"), names)
    assert main(["plan", "ward3.yaml"]) == 0
    assert "ward3: 6 cells" in capsys.readouterr().out
