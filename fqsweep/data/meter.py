"""How far a long piece of work on data is: a line that renews itself on a terminal, now and then one in a log."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from fqsweep.progress import LINE_EVERY_S, format_duration

REDRAW_EVERY_S = 0.2


class Meter:
    """Call it with (done, in all); 0 in all where that is not known.

    >>> meter = Meter("decoding", unit="images", stream=sys.stdout)
    >>> meter(100, 100)
    decoding: 100 of 100 images (100 %)
    """

    def __init__(self, title: str, *, unit: str, stream: TextIO | None = None) -> None:
        self.title, self.unit = title, unit
        self.stream = stream or sys.stderr
        self._started = self._shown = time.monotonic()
        self._first: int | None = None

    def __call__(self, done: int, total: int) -> None:
        now, live = time.monotonic(), self.stream.isatty()
        self._first = done if self._first is None else self._first
        every_s = REDRAW_EVERY_S if live else LINE_EVERY_S
        if done != total and now - self._shown < every_s:
            return
        self._shown = now
        end = "\n" if done == total or not live else ""
        print(f"{chr(13) if live else ''}{self._line(done, total, now)}", end=end, file=self.stream, flush=True)

    def _line(self, done: int, total: int, now: float) -> str:
        if not total:
            return f"{self.title}: {self._amount(done)}"
        left = ""
        gained = done - (self._first or 0)
        if done < total and gained > 0 and now - self._started > 2:
            left = f", about {format_duration((now - self._started) / gained * (total - done))} left"
        return f"{self.title}: {self._amount(done, total)} ({100 * done / total:.0f} %{left})"

    def _amount(self, done: int, total: int | None = None) -> str:
        if self.unit == "bytes":
            shown = f"{done / 1e6:,.1f}" + (f" of {total / 1e6:,.1f}" if total else "")
            return f"{shown} MB"
        return f"{done:,}" + (f" of {total:,}" if total else "") + f" {self.unit}"
