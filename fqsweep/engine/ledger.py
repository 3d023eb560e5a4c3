"""The ledger of a sweep: what happened, one JSON line an event, written by the driver alone; and reading it back.

Events: ``begin`` and ``end`` of a driver (``how``: ``done`` or ``stopped``); of a task ``start`` (not synced: it
only shows what runs), ``done``, ``pruned``, ``lost`` (an attempt failed, the task comes again), ``failed`` (for
good), ``retry`` (a failure was cleared by ``fqsweep retry``). No torch, no Ray.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fqsweep.engine.tasks import Task
from fqsweep.files import SweepPaths, append_line, iterate_lines

Line = Mapping[str, Any]
ENDED = ("done", "pruned")


def note(paths: SweepPaths, task: Task, event: str, **more: Any) -> None:
    """Append an event of a task."""
    known = {
        "event": event,
        "key": task.key,
        "kind": task.kind,
        "title": task.title,
        "time": round(time.time(), 3),
    }
    more = {"cell": task.cell.key, "number": task.number, "attempt": task.attempt, **more}
    append_line(paths.ledger, {**known, **more}, sync=event != "start")


def note_driver(paths: SweepPaths, event: str, **more: Any) -> None:
    """Append an event of the driver itself."""
    append_line(paths.ledger, {"event": event, "time": round(time.time(), 3), **more})


@dataclass
class Ledger:
    """The last word on every task, by key.

    Attributes:
        done: lines of tasks that are done or were stopped early.
        failed: lines of tasks that failed for good and were not cleared.
        running: lines of tasks that started under the last driver and have not ended.
        begin: the last driver's first line; ``ending``: ``done``, ``stopped``, or ``killed`` where it wrote no last.
    """

    done: dict[str, Line] = field(default_factory=dict)
    failed: dict[str, Line] = field(default_factory=dict)
    running: dict[str, Line] = field(default_factory=dict)
    num_lost: int = 0
    begin: Line | None = None
    ending: str = "killed"


def replay(lines: Iterable[Line]) -> Ledger:
    """Read a ledger from its beginning; unknown events are passed over."""
    book = Ledger()
    for line in lines:
        event, key = line.get("event"), str(line.get("key", ""))
        if event in (*ENDED, "failed", "lost", "retry"):
            book.running.pop(key, None)
        if event in ENDED:
            book.done[key] = line
            book.failed.pop(key, None)
        elif event == "failed":
            book.failed[key] = line
        elif event == "retry":
            book.failed.pop(key, None)
        elif event == "start":
            book.running[key] = line
        elif event == "lost":
            book.num_lost += 1
        elif event == "begin":
            book.begin, book.ending, book.running = line, "killed", {}
        elif event == "end":
            book.ending, book.running = str(line.get("how", "done")), {}
    return book


def read_ledger(paths: SweepPaths) -> Ledger:
    """The ledger of a sweep; empty where it has not begun."""
    return replay(iterate_lines(paths.ledger))
