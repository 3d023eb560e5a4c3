"""What goes wrong in a worker, and what that means for its task and its process. No torch."""

from __future__ import annotations

import contextlib
import faulthandler
from collections.abc import Iterator
from pathlib import Path

from fqsweep.disk import is_no_space
from fqsweep.engine.tasks import Ending, Outcome
from fqsweep.errors import InputError, StoreError, TrialError

# After such an error every later CUDA call of the process fails too.
STICKY_CUDA = ("cuda error", "device-side assert", "cublas_status", "cudnn_status", "illegal memory access")
# Memory that CUDA's own libraries did not get, past torch's allocator: where others fill the GPU.
NO_CUDA_MEMORY = ("cuda error: out of memory", "cublas_status_alloc_failed", "cudnn_status_alloc_failed")


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
    else:
        poisoned = any(mark in text.lower() for mark in STICKY_CUDA)
        if _is_out_of_gpu_memory(error):
            ending = "out_of_memory"
            text = "out of GPU memory"
    return Outcome(ending=ending, reason=f"{text} (log: {log})", seconds=seconds, poisoned=poisoned)


def _is_out_of_gpu_memory(error: Exception) -> bool:
    """``torch.cuda.OutOfMemoryError``, known by its name so that torch need not be loaded, or CUDA's own."""
    is_torchs = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
    return is_torchs or any(mark in str(error).lower() for mark in NO_CUDA_MEMORY)
