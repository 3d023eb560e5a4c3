"""The pieces of work of a sweep, as records: what they are and what they need.

A sweep is a graph: a trial needs its parent (``baseline``) and, where it allocates bits, its cost table
(``importance``), which needs the parent too. Tasks travel as JSON.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fqsweep.cells import Cell, finetune_epochs
from fqsweep.config import Allocating, Record

TaskKind = Literal["baseline", "importance", "trial"]
# How an attempt ends. ``failed``: again would fail again; ``broken``: another attempt may do better; ``stopped``: the
# sweep was asked to stop.
Ending = Literal["done", "pruned", "stopped", "failed", "broken", "out_of_memory", "no_space"]


class Task(Record):
    """One piece of work.

    Attributes:
        key: hash of what determines the result.
        cell: the cell it is for; of a shared task, the first that needs it.
        number, weights: of a trial: its number in the cell's study and its values of the free weights.
        needs: keys of the tasks that must be done before.
        attempt: which try this is, from 1.
        bars: what the trial must have shown by which epoch (``fqsweep.engine.stopping``).
    """

    key: str
    kind: TaskKind
    cell: Cell
    number: int = 0
    weights: dict[str, float] = Field(default_factory=dict)
    needs: tuple[str, ...] = ()
    attempt: int = 1
    bars: dict[int, dict[str, float]] = Field(default_factory=dict)

    @property
    def title(self) -> str:
        """Short name for people."""
        if self.kind == "trial":
            chosen = ", ".join(f"{name}={value:.3g}" for name, value in self.weights.items())
            return f"{self.cell.title}{f' ({chosen})' if chosen else ''}"
        where = f"{self.cell.architecture.name} seed {self.cell.seed}"
        if self.kind == "baseline":
            return f"full-precision parent of {self.cell.dataset.name} {where}"
        settings = self.cell.point.settings
        assert isinstance(settings, Allocating)
        how = (
            f"{settings.importance} of whole tensors"
            if settings.granularity == "tensor"
            else settings.importance
        )
        return f"cost table ({how}) of {self.cell.dataset.name}/{self.cell.group_attribute} {where}"

    @property
    def shape(self) -> tuple[str, ...]:
        """Tasks of one shape need about the same memory: training takes several times what scoring alone takes."""
        trains = self.kind == "baseline" or (self.kind == "trial" and finetune_epochs(self.cell) > 0)
        what = f"{self.kind} with training" if trains else self.kind
        return (what, self.cell.dataset.name, self.cell.architecture.name)


class Outcome(Record):
    """How an attempt ended.

    Attributes:
        reason: why it failed, in a sentence; empty if it is done.
        poisoned: the worker's process cannot be used again.
        peak_gpu_frac: the most GPU memory it held, as a share of the GPU's; 0 without one.
    """

    ending: Ending
    reason: str = ""
    seconds: float = 0.0
    poisoned: bool = False
    peak_gpu_frac: float = 0.0

    @property
    def done(self) -> bool:
        return self.ending in ("done", "pruned")
