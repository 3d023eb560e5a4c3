"""Training in progress on disk, so that what is stopped or killed goes on from an epoch that was saved."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fqsweep.files import write_whole

CHECKPOINT_VERSION = 1
# Saving takes at most this share of the time: of short epochs not each is saved.
MAX_TIME_FRAC = 0.02
# What a first save is expected to reach; later ones go by what the last one took.
EXPECTED_BYTES_A_SECOND = 4e8


class TrainingStopped(Exception):
    """The sweep was asked to stop; the state of this training run is saved."""


@dataclass
class Checkpoint:
    """One file that holds the newest state of one training run, whole or not at all.

    Attributes:
        path: the file; it belongs to this very run, as its folder's key says.
        stop_request: a file that is there once the sweep was asked to stop; None where nobody asks.
        max_time_frac: largest share of the time that is spent on saving; 1 saves after every epoch.
        earlier_s: once loaded, the seconds of earlier attempts until they saved it, each from when its ``Checkpoint``
            was made.
    """

    path: Path
    stop_request: Path | None = None
    max_time_frac: float = MAX_TIME_FRAC
    earlier_s: float = 0.0
    _begin: float = field(default_factory=time.perf_counter)
    _last_save_s: float | None = None
    _last_end: float = field(default_factory=time.perf_counter)

    def save(self, state: dict[str, Any]) -> None:
        """Store ``state`` (tensors, numbers, text and containers of them), if it is time to.

        Raises:
            TrainingStopped: the sweep was asked to stop; then it is always time to.
        """
        start = time.perf_counter()
        save_s = _num_bytes(state) / EXPECTED_BYTES_A_SECOND if self._last_save_s is None else self._last_save_s
        stops = self.stop_request is not None and self.stop_request.exists()
        if not stops and self.max_time_frac * (start - self._last_end + save_s) < save_s:
            return
        # Not synced: after a loss of power a damaged file is as good as none, training starts anew.
        versioned = {"version": CHECKPOINT_VERSION, "spent_s": self.spent_s, **state}
        write_whole(self.path, lambda stream: torch.save(versioned, stream), sync=False)
        self._last_end = time.perf_counter()
        self._last_save_s = self._last_end - start
        if stops:
            raise TrainingStopped

    @property
    def spent_s(self) -> float:
        """Seconds so far, those of earlier attempts among them."""
        return self.earlier_s + time.perf_counter() - self._begin

    def load(self) -> dict[str, Any] | None:
        """The stored state on the CPU; None where there is none, or none that can be used.

        Only tensors and plain values are read, never code (``weights_only``).
        """
        if not self.path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception:  # whatever a damaged file makes the reader raise: training starts anew
            return None
        if state.get("version") != CHECKPOINT_VERSION:
            return None
        self.earlier_s = float(state.get("spent_s", 0.0))
        return state

    def remove(self) -> None:
        """Delete the file; its run has a result."""
        self.path.unlink(missing_ok=True)


def _num_bytes(state: Any) -> int:
    """Bytes of the tensors in nested containers."""
    if isinstance(state, torch.Tensor):
        return state.nbytes
    if isinstance(state, Mapping):
        return sum(map(_num_bytes, state.values()))
    return sum(map(_num_bytes, state)) if isinstance(state, list | tuple) else 0


def random_state() -> dict[str, Any]:
    """The state of Python's, NumPy's and torch's generators, as tensors and plain values."""
    numpy_state: Any = np.random.get_state(legacy=False)
    keys, position = numpy_state["state"]["key"], int(numpy_state["state"]["pos"])
    gauss = [int(numpy_state["has_gauss"]), float(numpy_state["gauss"])]
    return {
        "python": random.getstate(),
        "numpy": [torch.from_numpy(keys.astype(np.int64)), position, *gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Put the generators back to where they were."""
    random.setstate(state["python"])
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
