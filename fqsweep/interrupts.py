"""Ctrl-C while libraries load: what they import in C may swallow the exception, so that it is asked for again."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def noting_ctrl_c() -> Iterator[Callable[[], None]]:
    """Note Ctrl-C as well as raise ``KeyboardInterrupt``; a process that a shell made deaf to it stays so.

    Yields:
        what raises ``KeyboardInterrupt`` if Ctrl-C was pressed within the block.
    """
    before = signal.getsignal(signal.SIGINT)
    pressed = False

    def hear(*_given: Any) -> None:
        nonlocal pressed
        pressed = True
        raise KeyboardInterrupt

    def ask() -> None:
        if pressed:
            raise KeyboardInterrupt

    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, hear)
    try:
        yield ask
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)
