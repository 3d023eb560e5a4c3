"""A sweep seen from outside: its status, and failures that are cleared, through the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fqsweep.engine.control import look, only_driver
from fqsweep.files import SweepPaths, append_line, write_json
from fqsweep.main import main

PROJECT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("command", "message"),
    [("status", "holds no sweep"), ("cancel", "holds no sweep"), ("retry", "holds no sweep")],
)
def test_a_folder_without_a_sweep_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, message: str
) -> None:
    assert main([command, str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def begun_sweep(out: Path) -> SweepPaths:
    """A folder as a killed driver leaves it: a cell done, one running, one failed with what it blocked."""
    paths = SweepPaths(out)
    cells = [{"key": k, "title": f"cell {k}", "wanted": 1, "needs": ["p"], "cost": 2.0} for k in "abc"]
    cells += [{"key": "d", "title": "cell d", "wanted": 1, "needs": ["q"], "cost": 2.0}]
    shared = [{"key": key, "title": f"parent {key}", "cost": 4.0} for key in "pq"]
    write_json(paths.plan, {"name": "s", "cells": cells, "shared": shared})
    write_json(
        paths.driver_note, {"pid": 1, "host": "h", "since": 0.0, "command": ["fqsweep", "run", "my space"]}
    )
    trial = {"kind": "trial", "title": "t", "time": 1.0, "seconds": 2.0}
    for line in (
        {"event": "begin", "slots": 2, "time": 0.0},
        {"event": "done", "key": "p", "kind": "baseline", "title": "parent p", "seconds": 4.0, "cell": "a"},
        {"event": "failed", "key": "q", "kind": "baseline", "title": "parent q", "reason": "no", "cell": "d"},
        {**trial, "event": "done", "key": "ta", "cell": "a"},
        {**trial, "event": "start", "key": "tb", "cell": "b"},
        {**trial, "event": "failed", "key": "tc", "cell": "c", "reason": "loss is nan"},
        # Of cells that the search space no longer has.
        {**trial, "event": "failed", "key": "te", "cell": "e", "reason": "gone"},
        {"event": "failed", "key": "r", "kind": "baseline", "title": "parent r", "reason": "gone", "cell": "e"},
    ):
        append_line(paths.ledger, line)
    return paths


def test_status_of_a_killed_sweep_counts_from_the_ledger(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun_sweep(tmp_path)
    assert main(["status", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "1 done, 2 failed, 1 waiting of 4 cells; 1 of 4 trials" in shown
    assert "driver: none runs; the last one was killed" in shown
    assert (
        "gone" not in shown
        and "failed: t: loss is nan" in shown
        and "failed: parent q: no (blocks 1 cells)" in shown
    )
    assert main(["status", str(tmp_path), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["cells"] == {"done": 1, "failed": 2, "running": 0, "waiting": 1}
    assert (status["shared_done"], status["shared_wanted"], status["saved_runs"]) == (1, 2, 2)


def test_status_of_a_search_without_a_result_calls_what_would_repeat_it_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = begun_sweep(tmp_path)
    plan = json.loads(paths.plan.read_text())
    plan["cells"] += [
        {"key": f"repeat {key}", "title": "r", "wanted": 1, "needs": ["p"], "cost": 2.0, "repeats": key}
        for key in "abcd"
    ]
    write_json(paths.plan, plan)
    assert main(["status", str(tmp_path), "--json"]) == 0
    # Cell a has a result and b may have one; c failed, and so has nothing to repeat, nor has d, whose parent failed.
    assert json.loads(capsys.readouterr().out)["cells"] == {"done": 1, "failed": 4, "running": 0, "waiting": 3}


def test_status_shows_as_running_what_there_are_slots_for(tmp_path: Path) -> None:
    paths = begun_sweep(tmp_path)
    for key in ("t1", "t2"):
        line = {"event": "start", "key": key, "kind": "trial", "title": key, "time": 1.0, "cell": "b"}
        append_line(paths.ledger, line)
    with only_driver(paths):
        assert [task["title"] for task in look(paths).running] == ["t", "t1"]
    assert look(paths).running == []


def test_status_takes_less_than_two_seconds_of_a_core(tmp_path: Path) -> None:
    begun_sweep(tmp_path)
    command = [sys.executable, str(PROJECT / "fqsweep" / "main.py"), "status", str(tmp_path)]
    before = os.times().children_user + os.times().children_system
    subprocess.run(command, check=True, capture_output=True)
    assert os.times().children_user + os.times().children_system - before < 2


def test_retry_clears_failures_once_and_says_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun_sweep(tmp_path)
    assert main(["retry", "--failed", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "cleared: parent q" in shown and "cleared: t\n" in shown
    assert "To try them again: fqsweep run 'my space'" in shown
    assert main(["status", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cells"]["failed"] == 0
    assert main(["retry", str(tmp_path)]) == 0
    assert "has no failures" in capsys.readouterr().out
