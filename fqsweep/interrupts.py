"""Ctrl-C while libraries load: what they import in C may swallow the exception, so that it is asked for again."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def noting_ctrl_c() -> Iterator[Callable[[], None]]:
    """Note Ctrl-C or SIGTERM as well as raise ``KeyboardInterrupt``.

    A process that a shell made deaf to Ctrl-C stays so.

    Yields:
        what raises ``KeyboardInterrupt`` if one of them came within the block.
    """
    pressed = False

    def hear(*_given: Any) -> None:
        nonlocal pressed
        pressed = True
        raise KeyboardInterrupt

    def ask() -> None:
        if pressed:
            raise KeyboardInterrupt

    heard = [
        number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not signal.SIG_IGN
    ]
    before = {number: signal.signal(number, hear) for number in heard}
    try:
        yield ask
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
