"""What Ray Tune and the C library keep of trials that ended, and let go of here: thousands would fill the driver.

Ledger and results are the truth, so nothing of an ended trial is read again. Tune has no option for it; what is
reached into is named below, was looked up in Ray 2.60, and is passed over where another version has it no longer.
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any

from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.schedulers import FIFOScheduler

NEEDED_OF_A_RESULT = {"outcome", "done", "trial_id", "training_iteration", "node_ip", "pid"}


class ForgetfulProgress(TrialProgressCallback):
    """In place of Tune's own report of progress, which keeps every trial and prints nothing here."""

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_named: Any
    ) -> None:
        """Before Tune keeps a copy of a result: only what is read from here on."""
        for name in result.keys() - NEEDED_OF_A_RESULT:
            del result[name]

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_named: Any) -> None:
        """Nothing is kept."""

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_named: Any) -> None:
        """Nothing is kept."""


class ForgetfulScheduler(FIFOScheduler):
    """First in, first out, and when a trial ends, those that ended before it leave Tune's books.

    One that is just ending is still in use; the last are Tune's to the end, which reads its files again if it finds
    no trial.
    """

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """A trial is about to end."""
        _forget_ended(tune_controller)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """The worker of a trial died."""
        _forget_ended(tune_controller)


def _forget_ended(controller: Any) -> None:
    """Drop the trials that ended from the books of a ``TuneController``."""
    trials = controller.get_trials()  # its own list, which it goes through in every step
    ended = {trial for trial in trials if trial.is_finished()}
    trials[:] = [trial for trial in trials if trial not in ended]
    for name in ("_stopped_trials", "_failed_trials", "_trials_to_cache"):
        getattr(controller, name, set()).difference_update(ended)
    states = getattr(controller, "_trial_metadata", {})
    for trial in ended:
        states.pop(trial.trial_id, None)
    # An actor that was asked for ahead, and not needed because another came free, leaves its last call behind.
    actors = getattr(controller, "_actor_manager", None)
    calls = getattr(actors, "_pending_actors_to_enqueued_actor_tasks", {})
    for actor in calls.keys() - getattr(actors, "_pending_actors_to_attrs", calls).keys():
        del calls[actor]


def give_back_memory() -> None:
    """Let the C library hand free pages of the heap back to the system, where it is glibc, which keeps them."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
