"""One driver an output folder: who holds it; looking at a sweep from outside, stopping it, clearing its failures.

Needs neither torch nor Ray, so that ``fqsweep status`` answers at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fqsweep.engine.ledger import Ledger, note_driver, read_ledger
from fqsweep.engine.search import SweepState, cell_stage
from fqsweep.errors import InputError
from fqsweep.files import SweepPaths, read_lines, write_json
from fqsweep.progress import format_duration

# A look at the lock takes it for a moment: a driver that starts waits that long for it.
LOCK_WAIT_S = 1.0
HOW_ENDED = {"done": "ended by itself", "stopped": "was stopped", "killed": "was killed"}


# --- one driver ----------------------------------------------------------------------------------


@contextlib.contextmanager
def only_driver(paths: SweepPaths, command: Sequence[str] = ()) -> Iterator[None]:
    """Hold the folder as its only driver.

    Args:
        command: how this sweep is gone on with, for ``fqsweep retry`` and the messages.

    Raises:
        InputError: another process holds it; names process, host and since when.
    """
    lock = FileLock(str(paths.driver_lock))
    try:
        lock.acquire(timeout=LOCK_WAIT_S, poll_interval=0.05)
    except Timeout as error:
        who = describe_holder(paths)
        raise InputError(
            f"{paths.out} is in use by {who}; wait for it, use another --out, or stop it with: "
            f"fqsweep cancel {shlex.quote(str(paths.out))}"
        ) from error
    try:
        known = {"pid": os.getpid(), "host": platform.node(), "since": time.time(), "command": list(command)}
        write_json(paths.driver_note, known)
        paths.cancel_request.unlink(missing_ok=True)
        yield
    finally:
        paths.cancel_request.unlink(missing_ok=True)
        lock.release()


def is_held(paths: SweepPaths) -> bool:
    """Whether a driver holds the folder now."""
    if not paths.driver_lock.exists():
        return False
    lock = FileLock(str(paths.driver_lock))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def read_holder(paths: SweepPaths) -> dict[str, Any]:
    """What the last driver noted of itself: ``pid, host, since, command``; empty if there was none."""
    try:
        noted = json.loads(paths.driver_note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return noted if isinstance(noted, dict) else {}


def describe_holder(paths: SweepPaths) -> str:
    """The driver in words."""
    noted = read_holder(paths)
    if not noted:
        return "another process"
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(noted.get("since", 0)))
    return f"process {noted.get('pid')} on {noted.get('host')} (since {since})"


# --- status --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Status:
    """A sweep seen from outside.

    Attributes:
        cells: number by state. ``trials``: ended, wanted, of them stopped early, attempts that were lost.
        driver: who holds the folder now; ``driver_ending``: how the last one ended (``HOW_ENDED``).
        failures: title and reason of each failure, and what could not run because of it.
        running: title, seconds since its start and newest epoch of each running task.
        saved_runs: parents and cost tables that would have been made without sharing, less those that are;
            ``saved_epochs``: epochs that early stopping saved.
        seconds_left: None where nothing can be said.
    """

    name: str
    driver: str | None
    driver_ending: str
    cells: dict[str, int]
    trials: dict[str, int]
    failures: list[dict[str, Any]]
    running: list[dict[str, Any]]
    shared_done: int
    shared_wanted: int
    saved_runs: int
    saved_epochs: int
    seconds_left: float | None


def write_plan(paths: SweepPaths, name: str, state: SweepState) -> None:
    """What ``look`` needs to know of the sweep that the ledger does not say."""
    cells = [
        {
            "key": c.key,
            "title": c.cell.title,
            "wanted": c.wanted,
            "needs": c.needs,
            "repeats": c.repeats,
            "cost": state.expected(c.key),
        }
        for c in state.cells
    ]
    shared = [{"key": key, "title": t.title, "cost": state.expected(key)} for key, t in state.shared.items()]
    write_json(paths.plan, {"name": name, "cells": cells, "shared": shared})


def _plan_of(paths: SweepPaths) -> Any:
    """What ``write_plan`` wrote.

    Raises:
        InputError: the folder holds no sweep.
    """
    try:
        return json.loads(paths.plan.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{paths.out} holds no sweep (no {paths.plan.name}): give the --out of a run"
        ) from error


def look(paths: SweepPaths) -> Status:
    """How the sweep in a folder stands, whether or not a driver runs.

    Raises:
        InputError: the folder holds no sweep.
    """
    plan = _plan_of(paths)
    book = read_ledger(paths)
    held = is_held(paths)
    # Tune asks for some tasks ahead, so that a worker that is free need not wait: those do not run yet.
    slots = int((book.begin or {}).get("slots", 1))
    book.running = dict(list(book.running.items())[:slots]) if held else {}
    cells = _count_cells(plan["cells"], book)
    known = {cell["key"] for cell in plan["cells"]} | {task["key"] for task in plan["shared"]}
    failures = _failures(plan["cells"], book, known)
    trials = _count_trials(plan["cells"], book)
    wanted_runs = sum(len(cell["needs"]) * cell["wanted"] for cell in plan["cells"])
    return Status(
        name=plan["name"],
        driver=describe_holder(paths) if held else None,
        driver_ending=book.ending,
        cells=cells,
        trials=trials,
        failures=failures,
        running=[_running(paths, line) for line in book.running.values()],
        shared_done=sum(task["key"] in book.done for task in plan["shared"]),
        shared_wanted=len(plan["shared"]),
        saved_runs=wanted_runs - len(plan["shared"]),
        saved_epochs=sum(
            int(line.get("saved_epochs", 0)) for line in book.done.values() if line.get("cell") in known
        ),
        seconds_left=_seconds_left(plan, book) if held else None,
    )


def _by_cell(lines: dict[str, Any]) -> Counter[str]:
    return Counter(str(line["cell"]) for line in lines.values() if line["kind"] == "trial")


def _count_cells(cells: list[dict[str, Any]], book: Ledger) -> dict[str, int]:
    done, failed, running = _by_cell(book.done), _by_cell(book.failed), _by_cell(book.running)
    whole = _by_cell({key: line for key, line in book.done.items() if line["event"] == "done"})
    # A parent or cost table failed; and of repeats, the search of the weights that they repeat found none.
    lacking = {cell["key"] for cell in cells if any(need in book.failed for need in cell["needs"])}
    ended = {cell["key"] for cell in cells if done[cell["key"]] + failed[cell["key"]] >= cell["wanted"]}
    fruitless = {key for key in lacking | ended if not whole[key]}
    counts = dict.fromkeys(("done", "failed", "running", "waiting"), 0)
    for cell in cells:
        key = cell["key"]
        blocked = done[key] < cell["wanted"] and (key in lacking or cell.get("repeats") in fruitless)
        stage = cell_stage(cell["wanted"], done[key], failed[key] + blocked, running=running[key] > 0)
        counts[stage] += 1
    return counts


def _count_trials(cells: list[dict[str, Any]], book: Ledger) -> dict[str, int]:
    known = {cell["key"] for cell in cells}
    ended = [line for line in book.done.values() if line["kind"] == "trial" and line["cell"] in known]
    return {
        "ended": len(ended),
        "wanted": sum(cell["wanted"] for cell in cells),
        "pruned": sum(line["event"] == "pruned" for line in ended),
        "lost": book.num_lost,
    }


def _failures(cells: list[dict[str, Any]], book: Ledger, known: set[str]) -> list[dict[str, Any]]:
    """What failed of the cells and shared tasks that are ``known``, by key."""
    waiting: dict[str, list[str]] = defaultdict(list)
    done = _by_cell(book.done)
    for cell in cells:
        for need in cell["needs"]:
            if need in book.failed and done[cell["key"]] < cell["wanted"]:
                waiting[need].append(cell["title"])
    return [
        {"key": key, "title": line["title"], "reason": line.get("reason", ""), "blocked": waiting[key]}
        for key, line in book.failed.items()
        if (line.get("cell") if line["kind"] == "trial" else key) in known
    ]


def _running(paths: SweepPaths, line: Any) -> dict[str, Any]:
    epochs = len({entry.get("epoch") for entry in read_lines(paths.epochs(line["key"]))})
    return {"title": line["title"], "seconds": max(0.0, time.time() - line["time"]), "epochs": epochs}


def _seconds_left(plan: dict[str, Any], book: Ledger) -> float | None:
    """The cost that is left, at the pace of what is done so far."""
    cost = {item["key"]: item["cost"] for item in (*plan["cells"], *plan["shared"])}
    spent_s = spent_cost = 0.0
    for line in book.done.values():
        own = cost.get(line["cell"] if line["kind"] == "trial" else line["key"])
        if own is not None and line.get("seconds"):
            spent_s += line["seconds"]
            spent_cost += own
    if not spent_cost or book.begin is None:
        return None
    ended = _by_cell(book.done) + _by_cell(book.failed)
    left = sum(max(0, cell["wanted"] - ended[cell["key"]]) * cell["cost"] for cell in plan["cells"])
    left += sum(t["cost"] for t in plan["shared"] if t["key"] not in book.done and t["key"] not in book.failed)
    return float(left * spent_s / spent_cost / max(1, book.begin.get("slots", 1)))


def as_json(status: Status) -> str:
    """The status for programs."""
    return json.dumps(asdict(status), indent=1)


def describe(status: Status) -> str:
    """The status for people."""
    counts = ", ".join(
        f"{number} {stage}" for stage, number in status.cells.items() if number or stage == "done"
    )
    trials = status.trials
    lines = [
        f"{status.name}: {counts} of {sum(status.cells.values())} cells; "
        f"{trials['ended']} of {trials['wanted']} trials",
        f"driver: {status.driver}"
        if status.driver
        else f"driver: none runs; the last one {HOW_ENDED.get(status.driver_ending, status.driver_ending)}",
        f"shared: {status.shared_done} of {status.shared_wanted} parents and cost tables made; "
        f"sharing saves {status.saved_runs} such runs",
    ]
    if trials["pruned"]:
        lines.append(f"stopped early: {trials['pruned']} trials, {status.saved_epochs} epochs saved")
    if trials["lost"]:
        lines.append(f"attempts lost and made again: {trials['lost']}")
    for task in status.running:
        epochs = f", {task['epochs']} epochs" if task["epochs"] else ""
        lines.append(f"running: {task['title']} ({format_duration(task['seconds'])}{epochs})")
    if status.seconds_left is not None:
        lines.append(f"time left: about {format_duration(status.seconds_left)}")
    for failure in status.failures:
        more = f" (blocks {len(failure['blocked'])} cells)" if failure["blocked"] else ""
        lines.append(f"failed: {failure['title']}: {failure['reason']}{more}")
    return "\n".join(lines)


# --- cancel and retry ----------------------------------------------------------------------------


def ask_to_stop(paths: SweepPaths) -> str:
    """Ask the driver of a folder to stop as Ctrl-C would; it looks once a second.

    Returns:
        who was asked.

    Raises:
        InputError: no driver runs, or the folder holds no sweep.
    """
    if not is_held(paths):
        _plan_of(paths)
        raise InputError(f"no driver runs on {paths.out}: nothing to cancel")
    paths.cancel_request.write_bytes(b"")
    return describe_holder(paths)


def is_asked_to_stop(paths: SweepPaths) -> bool:
    """Whether ``ask_to_stop`` was called since the driver began."""
    return paths.cancel_request.exists()


def clear_failures(paths: SweepPaths) -> list[str]:
    """Clear every failure, so that the next run of the same command tries those tasks again.

    Returns:
        the titles of the tasks.

    Raises:
        InputError: a driver holds the folder, or it holds no sweep.
    """
    _plan_of(paths)
    command = read_holder(paths).get("command", ())
    failed = read_ledger(paths).failed
    if failed:
        with only_driver(paths, command):
            for key in failed:
                note_driver(paths, "retry", key=key)
    return [str(line["title"]) for line in failed.values()]


def command_to_go_on(out: Path) -> str:
    """The command that the last driver of a folder was started with."""
    return shlex.join(read_holder(SweepPaths(out)).get("command", ()))
