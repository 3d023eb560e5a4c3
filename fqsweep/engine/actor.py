"""What runs in a worker process of Ray: one task after the other.

A module of its own, so that a worker does not load what only the driver needs, nor the driver the work itself.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from ray import tune

from fqsweep.engine.tasks import Outcome, Task
from fqsweep.files import SweepPaths, write_bytes

EXIT_POISONED = 70


class TaskActor(tune.Trainable):
    """Does tasks one after the other in one process: torch and the data sets stay loaded between them."""

    def setup(self, config: dict[str, Any]) -> None:
        """Take the first task."""
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next task; nothing of the last one is kept."""
        self.request = new_config
        return True

    def step(self) -> dict[str, Any]:
        """Do the task; a process that cannot be used again ends with it, and Ray starts another."""
        request = self.request
        task = Task.model_validate_json(request["task"])
        paths = SweepPaths(Path(request["out"]))
        paths.last_words(task.key).unlink(missing_ok=True)  # of an attempt that nobody heard
        outcome: Outcome = importlib.import_module(request["work"]).perform(
            task,
            paths=paths,
            data_dir=None if request["data_dir"] is None else Path(request["data_dir"]),
            gpus=request["gpus"],
            num_threads=max(1, int(request["cpus"])),
            time_limit_s=request["time_limit_s"],
        )
        if outcome.poisoned:
            write_bytes(paths.last_words(task.key), outcome.model_dump_json().encode())
            os._exit(EXIT_POISONED)
        return {"outcome": outcome.model_dump_json(), "done": True}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Tasks write their own files."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """See ``save_checkpoint``."""
