"""Which share of a GPU each task takes: given, or measured from the first tasks of its shape. No CUDA, no Ray."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Literal

from fqsweep.engine.tasks import Task

# Room over the measured peak: fragments and a larger method in the same shape; the CUDA context is not in the peak.
HEADROOM = 1.25
CONTEXT_FRAC = 0.02
MOST_TASKS_A_GPU = 8


class GpuShares:
    """How many GPUs a task takes, and whether there is room for it now.

    With ``auto`` a task of a shape of which nothing is known has a GPU to itself; the largest peak of the ended
    tasks of its shape says how many of the next share one. A task that ran out of memory gets twice its share; where
    the share was measured, the others of its shape do so too, and if that is not enough, a GPU to itself.
    """

    def __init__(self, given: float | Literal["auto"], *, total: float) -> None:
        self.given = given
        self.total = total
        self.peak_frac: dict[tuple[str, ...], float] = defaultdict(float)
        self.enlarged: dict[str, float] = {}
        self.promised: dict[str, float] = {}

    def of(self, task: Task) -> float:
        """GPUs of a task."""
        if task.key in self.enlarged:
            return self.enlarged[task.key]
        if self.given != "auto":
            return self.given
        peak = self.peak_frac.get(task.shape, 0.0)
        return share_of(peak) if peak else 1.0

    def fits(self, task: Task) -> bool:
        """Whether the GPUs that are not promised are enough; fixed shares are Ray's to place."""
        return self.given != "auto" or sum(self.promised.values()) + self.of(task) <= self.total + 1e-9

    def start(self, task: Task) -> None:
        """Promise a task its GPUs."""
        self.promised[task.key] = self.of(task)

    def end(self, task: Task, *, peak_frac: float = 0.0) -> None:
        """Take a task's GPUs back, and learn from its peak."""
        self.promised.pop(task.key, None)
        self.peak_frac[task.shape] = max(self.peak_frac[task.shape], peak_frac)

    def enlarge(self, task: Task) -> bool:
        """Give a task that ran out of memory half the company: twice its share, at most a whole GPU.

        A share that was given is doubled once. One that was measured was our own guess: its shape has learnt from it,
        and a whole GPU is what the task gets last.

        Returns:
            whether it can have more than it had.
        """
        now, measured = self.of(task), self.given == "auto"
        again = task.key in self.enlarged
        if not 0 < now < 1 or (again and not measured):
            return False
        self.enlarged[task.key] = 1.0 if again else min(1.0, 2 * now)
        if measured:
            filled = (self.enlarged[task.key] - CONTEXT_FRAC) / HEADROOM
            self.peak_frac[task.shape] = max(self.peak_frac[task.shape], filled)
        return True

    def advice(self, task: Task) -> str:
        """What to change where a task has had all the memory that it can get."""
        if self.of(task) >= 1:
            return "it had a whole GPU; lower recipe.batch_size"
        return "raise resources.gpus_per_trial or lower recipe.batch_size"


def usable_frac(share: float) -> float:
    """How much of a GPU's memory torch may take for tensors, of a share of it."""
    return 1.0 if share >= 1 else max(share - CONTEXT_FRAC, share / 2)


def share_of(peak_frac: float) -> float:
    """The share of a GPU for a measured peak: 1, 1/2, 1/3 ... so that whole numbers of tasks fill it."""
    wanted = peak_frac * HEADROOM + CONTEXT_FRAC
    return 1.0 / max(1, min(MOST_TASKS_A_GPU, math.floor(1.0 / wanted)))
