"""Results on their way to MLflow: sent in order by a thread, kept and tried again while the server is away.

The results themselves lie on disk; what this process does not get rid of, the next start sends. The sweep never
waits for MLflow, and no result is recorded twice.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from fqsweep.disk import is_no_space, no_space
from fqsweep.errors import TrackingError
from fqsweep.results import TrialResult
from fqsweep.tracking.stores import first_line
from fqsweep.tracking.tracker import ALL_IS_KEPT, Tracker

PAUSE_S = 1.0
LONGEST_PAUSE_S = 20.0
# How long the end of a sweep waits for a server that is away.
PATIENCE_S = 120.0


RETIRING = "retiring"  # no trial's key


@dataclass(frozen=True)
class _Errand:
    """Something to be told to MLflow; ``run`` is told whether an earlier try failed."""

    name: str
    run: Callable[..., object]


class Spool:
    """A queue of results and the thread that empties it into a tracker."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self.waiting: deque[_Errand] = deque()
        self.trouble: Exception | None = None
        self._tried: set[str] = set()
        self._changed = threading.Condition()
        self._over = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="mlflow")
        self._thread.start()

    def put(self, key: str, read: Callable[[], tuple[TrialResult, list[Path]]]) -> None:
        """Hand a result over; returns at once.

        Args:
            read: the result and the files of its run; called when its turn comes, so that thousands that wait for a
                slow server are not in memory.
        """

        def send(*, again: bool) -> None:
            result, files = read()
            self.tracker.log_trial(result, files, again=again)

        self._add(_Errand(key, send))

    def retire_all_but(self, keys: Collection[str]) -> None:
        """Have the runs of all other trials that are logged now marked (``Tracker.retire``); returns at once.

        Of those logged now: what ends while a server is away is logged before this is tried again.
        """
        over = frozenset(self.tracker.logged) - frozenset(keys)
        self._add(_Errand(RETIRING, lambda again: self.tracker.retire(over)))

    def _add(self, errand: _Errand) -> None:
        with self._changed:
            self.waiting.append(errand)
            self._changed.notify_all()

    def _run(self) -> None:
        pause_s = PAUSE_S
        while not self._over:
            with self._changed:
                if not self.waiting:
                    self._changed.wait(timeout=PAUSE_S)
                    continue
                errand = self.waiting[0]
            try:
                errand.run(again=errand.name in self._tried)
            except Exception as error:
                self.trouble = error
                self._tried.add(errand.name)
                with self._changed:
                    self.waiting.rotate(-1)  # one result that is refused must not keep the others
                    self._changed.wait_for(lambda: self._over, timeout=pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                continue
            self.trouble, pause_s = None, PAUSE_S
            with self._changed:
                self.waiting.popleft()
                self._changed.notify_all()

    def finish(self, *, patience_s: float = PATIENCE_S) -> None:
        """Wait until everything is recorded, and end.

        Raises:
            TrackingError: MLflow was away for ``patience_s`` without taking anything.
            OSError: the disk of its database is full.
        """
        until = time.monotonic() + patience_s
        with self._changed:
            left = len(self.waiting)
            while left and time.monotonic() < until and not is_no_space(self.trouble):
                self._changed.wait(timeout=0.5)
                if len(self.waiting) < left:
                    left, until = len(self.waiting), time.monotonic() + patience_s
        self.stop()
        if left:
            if is_no_space(self.trouble):
                raise no_space(f"of MLflow's database, with {left} results to record") from self.trouble
            raise TrackingError(
                f"MLflow did not take {left} results: {first_line(self.trouble)}\n{ALL_IS_KEPT}"
            )

    def stop(self) -> None:
        """End now; what is not recorded is sent by the next start."""
        with self._changed:
            self._over = True
            self._changed.notify_all()
        self._thread.join(timeout=5.0)
