"""Disks that are full or take nothing: how that is told from other errors, and said. No torch."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from fqsweep.errors import InputError

FULL_BYTES = 2**16
# A disk that is full, and a user's or a group's share of one.
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
SAYS_NO_SPACE = ("database or disk is full", "No space left on device", "Disk quota exceeded")


def no_space(where: Path | str) -> OSError:
    """The error of a full disk; ``where`` is the file or folder that had no room."""
    return OSError(errno.ENOSPC, "No space left on device", str(where))


@contextlib.contextmanager
def writing(what: str, *, instead: str) -> Iterator[None]:
    """What cannot be written in the block is bad input: another place may do. Of a full disk another may not.

    Raises:
        InputError: ``what`` cannot be written, and what to give ``instead``.
    """
    try:
        yield
    except OSError as error:
        if is_no_space(error):
            raise
        raise InputError(f"{what} cannot be written: {error.strerror}; give {instead}") from error


def is_full(folder: Path) -> bool:
    """Whether next to nothing can be written to the disk of a folder."""
    return shutil.disk_usage(folder).free < FULL_BYTES


def is_no_space(error: BaseException | None) -> bool:
    """Whether a full disk, or quota, is behind an error, also one that a database or another process wrapped."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            return True
        if any(mark in str(error) for mark in SAYS_NO_SPACE):
            return True
        error = error.__cause__ or error.__context__
    return False
