"""What goes wrong in a worker, and what that means for its task and its process. No torch."""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import shutil
from collections.abc import Iterator
from pathlib import Path

from fqsweep.errors import InputError, StoreError, TrialError
from fqsweep.tasks import Ending, Outcome

FULL_BYTES = 2**16
# After such an error every later CUDA call of the process fails too.
STICKY_CUDA = ("cuda error", "device-side assert", "cublas_status", "cudnn_status", "illegal memory access")


@contextlib.contextmanager
def limit_time(log: Path, limit_s: float | None) -> Iterator[None]:
    """Kill this process when the block takes longer, even where Python itself hangs; the log says where it was."""
    if limit_s is None:
        yield
        return
    with log.open("a", encoding="utf-8") as stream:
        faulthandler.dump_traceback_later(limit_s, exit=True, file=stream)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()


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
    """Whether a full disk is behind an error, also one that a database or another process wrapped."""
    while error is not None:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return True
        if any(mark in str(error) for mark in ("database or disk is full", "No space left on device")):
            return True
        error = error.__cause__ or error.__context__
    return False


def outcome_of(error: Exception, *, seconds: float, log: Path) -> Outcome:
    """What an error means for the task: whether another attempt may help, and whether the process is spoiled."""
    text = f"{type(error).__name__}: {error}"
    ending: Ending = "broken"
    poisoned = False
    if is_no_space(error):
        where = (error.filename or "while writing") if isinstance(error, OSError) else error
        return Outcome(ending="no_space", reason=str(where), seconds=seconds)
    if isinstance(error, StoreError):
        text = str(error)
    elif isinstance(error, InputError | TrialError):
        text, ending = str(error), "failed"
    elif _is_out_of_gpu_memory(error):
        ending = "out_of_memory"
        text = "out of GPU memory; raise resources.gpus_per_trial or lower recipe.batch_size"
    elif any(mark in text.lower() for mark in STICKY_CUDA):
        poisoned = True
    return Outcome(ending=ending, reason=f"{text} (log: {log})", seconds=seconds, poisoned=poisoned)


def _is_out_of_gpu_memory(error: Exception) -> bool:
    """``torch.cuda.OutOfMemoryError``, known by its name so that torch need not be loaded."""
    return any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
