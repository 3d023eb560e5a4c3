"""What the person sees while a sweep runs: one small live table, or a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

LINE_EVERY_S = 15.0


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The state of a sweep at one moment.

    Attributes:
        counts: cells by state.
        prepared: shared parents and cost tables that are made, and how many there are.
        running: titles of running tasks.
        best: row label -> (best worst-group validation accuracy so far, variant), in the order of budgets.
        seconds_left: None where nothing can be said yet.
        unsent: results that wait for an MLflow server that is away.
    """

    counts: dict[str, int]
    prepared: tuple[int, int]
    running: tuple[str, ...]
    best: dict[str, tuple[float, str]]
    seconds_left: float | None
    unsent: int = 0


@dataclass
class Display:
    """Shows snapshots: a live table on a terminal, lines elsewhere."""

    look: Callable[[], Snapshot]
    console: Console = field(default_factory=lambda: Console(stderr=True))
    _live: Live | None = None
    _last_line: float = 0.0
    _started: float = field(default_factory=time.monotonic)

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self._live = Live(self._table(), console=self.console, refresh_per_second=2, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_details: object) -> None:
        if self._live is not None:
            self._live.stop()

    def tick(self) -> None:
        """Show the present state; off a terminal at most every 15 s."""
        if self._live is not None:
            self._live.update(self._table())
            return
        if time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._last_line = time.monotonic()
            print(self.line(), file=sys.stderr, flush=True)

    def line(self) -> str:
        """The state on one line, with the best accuracies."""
        seen = self.look()
        best = " ".join(f"{label}:{value:.3f}" for label, (value, _) in seen.best.items())
        return self._head(seen, f" | best worst group, val: {best}" if best else "")

    def _head(self, seen: Snapshot, middle: str = "") -> str:
        counts = "  ".join(
            f"{number} {name}" for name, number in seen.counts.items() if number or name == "done"
        )
        left = "" if seen.seconds_left is None else f" | about {format_duration(seen.seconds_left)} left"
        made, wanted = seen.prepared
        shared = f" | shared: {made} of {wanted}" if made < wanted else ""
        elapsed = format_duration(time.monotonic() - self._started)
        unsent = f" | MLflow is away: {seen.unsent} results wait" if seen.unsent else ""
        return f"[{elapsed}] cells: {counts}{shared}{unsent}{middle}{left}"

    def _table(self) -> Group:
        seen = self.look()
        head = Text(self._head(seen))
        now = Text("\n".join(f"  running: {title}" for title in seen.running), style="dim")
        if not seen.best:
            return Group(head, now)
        title = Text("best worst-group accuracy so far (validation)", style="bold")
        table = Table()
        table.add_column("budget")
        table.add_column("accuracy", justify="right")
        table.add_column("method")
        for label, (value, variant) in seen.best.items():
            table.add_row(label, f"{value:.3f}", variant)
        return Group(head, now, title, table)


def format_duration(seconds: float) -> str:
    """Seconds as people say them: 45 s, 12 min, 3.5 h, 2.1 days."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"
