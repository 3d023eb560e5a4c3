"""What the person sees while a sweep runs."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from fqsweep.progress import Display, Snapshot, format_duration


def snapshot(**changes: object) -> Snapshot:
    values: dict[str, object] = {
        "counts": {"done": 3, "failed": 0, "running": 2, "waiting": 7},
        "prepared": (1, 2),
        "running": ("full-precision parent of x",),
        "best": {"0.5 bit": (0.71234, "baq"), "fp32": (0.8, "fp32")},
        "seconds_left": 150.0,
    }
    return Snapshot(**{**values, **changes})  # type: ignore[arg-type]


def test_the_line_has_cells_shared_work_best_and_time_left() -> None:
    line = Display(snapshot).line()
    assert "cells: 3 done  2 running  7 waiting | shared: 1 of 2" in line
    assert "0.5 bit:0.712 fp32:0.800" in line
    assert line.endswith("about 2 min left")


def test_what_is_not_known_or_over_is_left_out() -> None:
    line = Display(lambda: snapshot(prepared=(2, 2), best={}, seconds_left=None)).line()
    assert "shared" not in line and "best" not in line and "left" not in line and "failed" not in line


def test_a_log_gets_a_line_now_and_then_and_no_escape_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with Display(snapshot, console=Console(file=io.StringIO(), force_terminal=False)) as display:
        for _ in range(50):
            display.tick()
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "\x1b" not in shown


def test_a_terminal_gets_a_table_of_the_best_by_budget() -> None:
    stream = io.StringIO()
    with Display(snapshot, console=Console(file=stream, force_terminal=True, width=100)) as display:
        display.tick()
    shown = stream.getvalue()
    assert "best worst-group accuracy so far (validation)" in shown
    assert "baq" in shown and "full-precision parent of x" in shown


@pytest.mark.parametrize(
    ("seconds", "text"), [(45, "45 s"), (99, "99 s"), (720, "12 min"), (12_600, "3.5 h"), (260_000, "3.0 days")]
)
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
