"""The exceptions a user can meet, each with what must be true, what was given and what to do; how a command ends."""

from __future__ import annotations

import os
import sys


class InputError(ValueError):
    """Something the user gave cannot be used: exit code 2 before a sweep starts, a failed cell after."""


class StoreError(InputError):
    """Storage elsewhere did not do what was asked: the address may be wrong, or it may do it later."""


class TrialError(RuntimeError):
    """A trial cannot go on (a loss that is not finite, a budget that cannot hold): its cell fails."""


class TrackingError(RuntimeError):
    """The tracking server failed in mid-sweep: the sweep stops, and goes on from the results on disk."""


class ClusterError(RuntimeError):
    """Ray itself died in mid-sweep: the sweep stops, and goes on from the results on disk."""


class SweepInterrupted(RuntimeError):
    """The sweep was asked to stop; what is finished is kept and the same command goes on."""


# What the command line ends with: all is done; some of it failed; bad input, nothing was started; the disk is full;
# stopped; whoever read its output along left.
EXIT_OK, EXIT_FAILED_CELLS, EXIT_BAD_INPUT, EXIT_NO_SPACE, EXIT_INTERRUPTED, EXIT_PIPE = 0, 1, 2, 4, 130, 141


def stop_printing() -> int:
    """After a ``BrokenPipeError``, the exit code: whoever read along (``| head``) has seen enough."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_PIPE
