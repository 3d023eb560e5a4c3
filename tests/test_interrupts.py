"""Ctrl-C that something swallowed is raised when it is asked for."""

from __future__ import annotations

import contextlib
import os
import signal

import pytest

from fqsweep.interrupts import noting_ctrl_c


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_got_lost_is_raised_when_asked(number: signal.Signals) -> None:
    before = signal.default_int_handler
    begun_with = signal.signal(number, before)  # a shell may have made this process deaf
    with noting_ctrl_c() as ask:
        ask()
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        with pytest.raises(KeyboardInterrupt):
            ask()
    assert signal.signal(number, begun_with) is before


def test_who_is_deaf_to_it_stays_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with noting_ctrl_c() as ask:
            os.kill(os.getpid(), signal.SIGINT)
            ask()
    finally:
        signal.signal(signal.SIGINT, before)
