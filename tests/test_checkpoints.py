"""Training that is broken off goes on from its last epoch, with the same results to the last digit."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fqsweep.checkpoints import Checkpoint, TrainingStopped, random_state, restore_random_state
from fqsweep.files import SweepPaths
from fqsweep.quant.baq import LearnedBits
from fqsweep.quant.convert import attach_quantisers, freeze_bits
from fqsweep.quant.units import list_units
from fqsweep.training import TrainingLog, TrainingPlan, train
from tests.test_training import Silent, loader, loss_of, network, plan
from tests.test_trial import cell_of, trial

PROJECT = Path(__file__).resolve().parents[1]
EPOCHS = 6


class Broken(Exception):
    pass


class Breaking(Silent):
    """Breaks off when it hears of epoch ``at``, before that epoch is stored."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.notes = at, list[str]()

    def log_metrics(self, metrics: dict[str, float], *, epoch: int) -> None:
        super().log_metrics(metrics, epoch=epoch)
        if epoch == self.at:
            raise Broken

    def note(self, text: str) -> None:
        self.notes.append(text)


class Noisy(nn.Module):
    """A network whose training draws from torch's global generator."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.dropout = network(), nn.Dropout(0.2)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.inner(self.dropout(image))


def plain(**changes: object) -> tuple[nn.Module, TrainingPlan]:
    torch.manual_seed(7)
    model = Noisy()
    changes = {"regulariser": "gap", "fairness_weight": 0.3, "num_groups": 2, **changes}
    return model, plan(epochs=EPOCHS, **changes)


def with_learned_bits(settle_epoch: float) -> tuple[nn.Module, TrainingPlan]:
    model, settings = plain(bitrate_weight=0.1, settle_epoch=settle_epoch)
    units = list_units(model, granularity="channel")
    step_u9 = {layer.name: torch.full((layer.num_units, 9), 0.05) for layer in units.layers}
    attach_quantisers(model, units, step_u9, np.full(units.num_units, 4), learn_bits="fracbits", smallest=1)
    limits = {"lowest_u": np.full(units.num_units, 1), "highest_u": np.full(units.num_units, 8)}
    learned = LearnedBits(
        model, units, counted_u=units.num_weights_u, **limits, budget_bits=4.0, learning_rate=0.1
    )
    settings.learned_bits = learned
    settings.freeze = lambda: freeze_bits(model, units, learned.round_under_budget())
    return model, settings


MAKERS: dict[str, Callable[[], tuple[nn.Module, TrainingPlan]]] = {
    "plain": plain,
    "patience": lambda: plain(patience=2),
    "step schedule, running mean": lambda: plain(schedule="step", ema_decay=0.9),
    "running mean and patience": lambda: plain(ema_decay=0.9, patience=3),
    "bits settle before the break": lambda: with_learned_bits(1.5),
    "bits settle after the break": lambda: with_learned_bits(4.5),
    "bits never settle": lambda: with_learned_bits(6.0),
}


def finish(
    maker: Callable[[], tuple[nn.Module, TrainingPlan]], checkpoint: Checkpoint | None, recorder: Silent
) -> tuple[TrainingLog, dict[str, torch.Tensor]]:
    model, settings = maker()
    log = train(model, loader(seed=2), settings, evaluate=loss_of, recorder=recorder, checkpoint=checkpoint)
    return log, model.state_dict()


@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("name", MAKERS)
def test_a_broken_run_ends_like_an_unbroken_one_to_the_last_digit(name: str, at: int, tmp_path: Path) -> None:
    whole_log, whole_state = finish(MAKERS[name], None, Silent())
    with pytest.raises(Broken):
        finish(MAKERS[name], Checkpoint(tmp_path / "c.pt", max_time_frac=1), Breaking(at))
    torch.rand(5), np.random.rand(5), random.random()  # another task in the same process
    recorder = Breaking(-1)
    log, state = finish(MAKERS[name], Checkpoint(tmp_path / "c.pt", max_time_frac=1), recorder)
    assert recorder.notes == [f"training goes on after epoch {at} of {EPOCHS}"]
    assert len(recorder.epochs) == len(whole_log.epochs) - at
    assert (log.epochs, log.best_epoch) == (whole_log.epochs, whole_log.best_epoch)
    assert state.keys() == whole_state.keys()
    assert all(torch.equal(state[key], whole_state[key]) for key in state)


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = finish(MAKERS["patience"], Checkpoint(tmp_path / "c.pt", max_time_frac=1), Silent())
    recorder = Breaking(-1)
    again = finish(MAKERS["patience"], Checkpoint(tmp_path / "c.pt", max_time_frac=1), recorder)
    assert recorder.epochs == []
    assert again[0].epochs == first[0].epochs
    assert all(torch.equal(again[1][key], first[1][key]) for key in first[1])


class Asking(Breaking):
    """Asks the sweep to stop when it hears of epoch ``at``."""

    def __init__(self, at: int, request: Path) -> None:
        super().__init__(-1)
        self.asks_at, self.request = at, request

    def log_metrics(self, metrics: dict[str, float], *, epoch: int) -> None:
        super().log_metrics(metrics, epoch=epoch)
        if epoch == self.asks_at:
            self.request.touch()


def test_who_is_asked_to_stop_saves_the_epoch_that_ends_however_short(tmp_path: Path) -> None:
    whole_log, whole_state = finish(MAKERS["plain"], None, Silent())
    checkpoint = Checkpoint(tmp_path / "c.pt", stop_request=tmp_path / "cancel", max_time_frac=1e-9)
    with pytest.raises(TrainingStopped):
        finish(MAKERS["plain"], checkpoint, Asking(2, tmp_path / "cancel"))
    (tmp_path / "cancel").unlink()
    recorder = Breaking(-1)
    log, state = finish(MAKERS["plain"], checkpoint, recorder)
    assert recorder.notes == [f"training goes on after epoch 3 of {EPOCHS}"]
    assert log.epochs == whole_log.epochs
    assert all(torch.equal(state[key], whole_state[key]) for key in state)


@pytest.mark.parametrize("damage", ["cut", "empty", "other plan", "foreign object", "other version"])
def test_a_checkpoint_that_cannot_be_used_is_left_alone(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    with pytest.raises(Broken):
        finish(MAKERS["plain"], Checkpoint(path, max_time_frac=1), Breaking(2))
    changes: dict[str, object] = {}
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "other plan":
        changes = {"epochs": EPOCHS - 1}
    elif damage == "foreign object":
        torch.save({"version": 1, "log": TrainingLog()}, path)
    else:
        torch.save({"version": 0}, path)
    model, settings = plain()
    settings.epochs = int(str(changes.get("epochs", EPOCHS)))
    recorder = Breaking(-1)
    train(model, loader(), settings, evaluate=loss_of, recorder=recorder, checkpoint=Checkpoint(path))
    assert recorder.notes == [] and len(recorder.epochs) == settings.epochs


def test_saving_takes_a_small_share_of_the_time(tmp_path: Path) -> None:
    short = Checkpoint(tmp_path / "short.pt")
    short.save({"weights": [torch.zeros(4_000_000)], "epoch": 0})  # 16 MB would take longer than what they hold
    assert short.load() is None
    checkpoint = Checkpoint(tmp_path / "c.pt", max_time_frac=0.001)
    for epoch in range(20):
        checkpoint.save({"epoch": epoch})
    state = checkpoint.load()
    assert state is not None and state["epoch"] == 0
    checkpoint.remove()
    assert checkpoint.load() is None


def test_what_goes_on_counts_the_time_of_the_attempts_before(tmp_path: Path) -> None:
    first = Checkpoint(tmp_path / "c.pt", max_time_frac=1)
    time.sleep(0.2)
    first.save({"epoch": 0})
    again = Checkpoint(tmp_path / "c.pt")
    assert again.spent_s < 0.15 and again.load() is not None
    assert 0.2 <= again.earlier_s <= again.spent_s


def test_the_generators_go_back_to_where_they_were() -> None:
    state = random_state()
    before = random.random(), np.random.randn(3).tolist(), torch.rand(3).tolist()
    restore_random_state(state)
    assert (random.random(), np.random.randn(3).tolist(), torch.rand(3).tolist()) == before


KILLED = """
import os, signal, sys
from pathlib import Path
import functools
import torch
from fqsweep import baseline, trial
from fqsweep.files import SweepPaths
from fqsweep.trial import run_trial
from tests.test_trial import cell_of
from tests.test_checkpoints import TRIAL_CELL

class Killing:
    def __init__(self, stage):
        self.stage, self.seen = stage, 0
    def note(self, text):
        pass
    def log_metrics(self, metrics, *, epoch):
        self.seen += 1
        if self.seen == self.stage:
            os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
# Epochs of a moment are not saved by themselves.
baseline.Checkpoint = trial.Checkpoint = functools.partial(trial.Checkpoint, max_time_frac=1)
name, recipe = TRIAL_CELL
for stage in (2, 4):  # in the second epoch of the parent, and of what is left of it, then of fine-tuning
    child = os.fork()
    if child == 0:
        run_trial(cell_of(name, **recipe), key="k", weights={}, paths=SweepPaths(Path(sys.argv[1])), data_dir=None,
                  device="cpu", recorder=Killing(stage))
        os._exit(0)
    print(os.WTERMSIG(os.waitpid(child, 0)[1]), flush=True)
"""
TRIAL_CELL = ("baq", {"epochs": 3, "finetune_epochs": 3})


@pytest.mark.slow
def test_a_trial_killed_while_its_parent_and_while_it_trains_gives_the_same_result(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    name, recipe = TRIAL_CELL
    whole = trial(cell_of(name, **recipe), tmp_path / "whole")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed")]
    ended = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=200, check=False)
    assert ended.stdout.split() == ["9", "9"], ended.stderr
    paths = SweepPaths(tmp_path / "killed")
    assert paths.checkpoint("k").exists()
    assert not paths.result("k").exists()
    resumed = trial(cell_of(name, **recipe), tmp_path / "killed")
    assert "training goes on after epoch" in paths.log("k").read_text()
    assert untimed(resumed.metrics) == untimed(whole.metrics)
    assert resumed.history == whole.history
    for file in ("model.fqs", "bits.csv"):
        same = [(SweepPaths(tmp_path / run).trial("k") / file).read_bytes() for run in ("whole", "killed")]
        assert same[0] == same[1], file
    assert list((tmp_path / "killed").rglob("*.pt")) == [paths.checkpoint("k")], "until the result is published"
    assert json.loads(paths.result("k").read_text())["key"] == "k"


def untimed(metrics: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metrics.items() if not key.startswith("time/")}
