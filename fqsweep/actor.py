"""What runs in a worker process of Ray: one task after the other.

A module of its own, so that a worker does not load what only the driver needs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray import tune

from fqsweep.files import SweepPaths
from fqsweep.tasks import Task
from fqsweep.work import perform


class TaskActor(tune.Trainable):
    """Does tasks one after the other in one process: torch and the packs stay loaded between them."""

    def setup(self, config: dict[str, Any]) -> None:
        """Take the first task."""
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next task; nothing of the last one is kept."""
        self.request = new_config
        return True

    def step(self) -> dict[str, Any]:
        """Do the task."""
        request = self.request
        paths = SweepPaths(Path(request["out"]))
        outcome = perform(
            Task.model_validate_json(request["task"]),
            paths=paths,
            data_dir=None if request["data_dir"] is None else Path(request["data_dir"]),
            device="cuda" if request["gpus"] else "cpu",
            num_threads=max(1, int(request["cpus"])),
        )
        return {"outcome": outcome.model_dump_json(), "done": True}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Tasks write their own files."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """See ``save_checkpoint``."""
