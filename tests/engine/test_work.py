"""A task in its worker: what its errors mean, and trials that are stopped early."""

from __future__ import annotations

import errno
import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fqsweep.cells import Cell, expand_cells
from fqsweep.checkpoints import TrainingStopped
from fqsweep.engine import work
from fqsweep.engine.actor import TaskActor
from fqsweep.engine.faults import outcome_of
from fqsweep.engine.gpus import GpuShares, share_of, usable_frac
from fqsweep.engine.search import shared_tasks
from fqsweep.engine.tasks import Task
from fqsweep.errors import InputError, StoreError, TrialError
from fqsweep.files import SweepPaths, write_bytes, write_json
from fqsweep.quant.convert import attach_quantisers
from fqsweep.quant.units import list_units
from fqsweep.results import read_result
from tests.engine.small_disk import fill_up, mounted
from tests.small_spaces import small_space

ACC = "val/acc_worst"


@pytest.mark.parametrize(
    ("error", "ending", "poisoned"),
    [
        (TrialError("loss is nan"), "failed", False),
        (StoreError("s3://bucket: connection reset"), "broken", False),
        (InputError("no such column"), "failed", False),
        (OSError(5, "Input/output error"), "broken", False),
        (OSError(errno.ENOSPC, "No space left", "model.fqs"), "no_space", False),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "model.fqs"), "no_space", False),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), "out_of_memory", False),
        (RuntimeError("CUDA error: out of memory"), "out_of_memory", True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "out_of_memory", True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "out_of_memory", True),
        (RuntimeError("CUDA error: device-side assert triggered"), "broken", True),
        (RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED when calling"), "broken", True),
        (ZeroDivisionError("division by zero"), "broken", False),
    ],
)
def test_an_error_says_whether_to_try_again_and_whether_the_process_is_spoiled(
    error: Exception, ending: str, poisoned: bool
) -> None:
    outcome = outcome_of(error, seconds=1.0, log=Path("x.log"))
    assert (outcome.ending, outcome.poisoned, outcome.done) == (ending, poisoned, False)


@pytest.fixture
def trial(tmp_path: Path) -> tuple[SweepPaths, Task]:
    """A trial of three epochs whose second must show 0.5."""
    space = small_space(tmp_path, ("finetune_epochs: 1", "finetune_epochs: 3"))
    cell: Cell = next(cell for cell in expand_cells(space) if cell.point.free_weights)
    bars = {1: {ACC: 0.5}, 2: {ACC: 0.9}}
    task = Task(key="k", kind="trial", cell=cell, weights={"fairness_weight": 0.5}, bars=bars)
    paths = SweepPaths(tmp_path / "out")
    write_json(paths.baseline(cell.baseline_key) / "meta.json", {})
    return paths, task


def train_like(monkeypatch: pytest.MonkeyPatch, *accuracies: float) -> None:
    """Epochs with these accuracies in place of training; a trial that gets to its end writes a result."""

    def run_trial(_cell: Cell, *, key: str, paths: SweepPaths, recorder: Any, **_more: Any) -> None:
        for epoch, accuracy in enumerate(accuracies):
            recorder.log_metrics({ACC: accuracy}, epoch=epoch)
        write_bytes(paths.trial(key) / "model.fqs", b"packed")
        write_json(paths.result(key), {"whole": True})

    monkeypatch.setattr(work, "run_trial", run_trial)
    monkeypatch.setattr(work, "open_setting", lambda *_given, **_named: None)


def do(paths: SweepPaths, task: Task) -> str:
    return work.perform(task, paths=paths, data_dir=None, gpus=0, num_threads=1).ending


def test_an_attempt_whose_folder_was_taken_away_leaves_no_result(
    trial: tuple[SweepPaths, Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new driver removes the folders of attempts that were cut off; one that lives on makes its own again."""
    paths, task = trial
    train_like(monkeypatch)
    write = work.run_trial

    def run_trial(cell: Cell, *, key: str, paths: SweepPaths, **more: Any) -> None:
        write(cell, key=key, paths=paths, **more)
        (paths.trial(key) / "model.fqs").unlink()

    monkeypatch.setattr(work, "run_trial", run_trial)
    assert do(paths, task) == "broken"
    assert not paths.trial("k").exists()


def test_a_checkpoint_stays_until_the_result_is_at_its_place(
    trial: tuple[SweepPaths, Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, task = trial
    train_like(monkeypatch)
    write_bytes(paths.checkpoint("k"), b"epochs")

    def die(*_given: Any, **_named: Any) -> bool:
        assert paths.checkpoint("k").exists()
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(work, "publish", die)
        assert do(paths, task) == "broken"
    assert paths.checkpoint("k").exists()
    assert do(paths, task) == "done"
    assert paths.result("k").exists() and not paths.checkpoint("k").exists()


def test_a_trial_below_its_bar_stops_and_leaves_its_curve_without_test_data(
    trial: tuple[SweepPaths, Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, task = trial
    train_like(monkeypatch, 0.3, 0.4, 0.95)
    assert do(paths, task) == "pruned"
    result = read_result(paths.result("k"))
    assert result.pruned and result.history == [{ACC: 0.3}, {ACC: 0.4}]
    assert not any(key.startswith("test/") for key in result.metrics)
    assert [path.name for path in (paths.out / "trials").iterdir()] == ["k"]


@pytest.mark.parametrize("accuracies", [(0.6, 0.4, 0.3), (0.1, 0.5, 0.2)])
def test_a_trial_at_its_bar_goes_on_and_its_last_epoch_never_stops_it(
    trial: tuple[SweepPaths, Task], monkeypatch: pytest.MonkeyPatch, accuracies: tuple[float, ...]
) -> None:
    paths, task = trial
    train_like(monkeypatch, *accuracies)
    assert do(paths, task) == "done"


def test_the_epochs_of_an_attempt_that_was_cut_off_count(
    trial: tuple[SweepPaths, Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, task = trial
    work.TrialLog(paths, task).log_metrics({ACC: 0.6}, epoch=0)
    recorder = work.TrialLog(paths, task)
    recorder.log_metrics({ACC: 0.1}, epoch=1)
    assert recorder.epochs(until=1) == [{ACC: 0.6}, {ACC: 0.1}]


def test_epochs_of_an_attempt_that_left_no_checkpoint_are_not_those_of_one_that_was_stopped_early(
    trial: tuple[SweepPaths, Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, task = trial
    killed = work.TrialLog(paths, task.model_copy(update={"bars": {}}))
    for epoch in range(3):
        killed.log_metrics({ACC: 0.7}, epoch=epoch)
    train_like(monkeypatch, 0.1, 0.2, 0.3)
    assert do(paths, task) == "pruned"
    assert read_result(paths.result("k")).history == [{ACC: 0.1}, {ACC: 0.2}]


@pytest.mark.parametrize("how", ["pruned", "broken", "stopped"])
def test_a_trial_that_does_not_end_leaves_no_network_in_memory(
    trial: tuple[SweepPaths, Task], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """With its quantisers on, a network and they hold each other: without help it stays, in every process."""
    errors = {
        "pruned": work.TrialPruned("below its bar", epoch=0),
        "broken": RuntimeError("nan"),
        "stopped": TrainingStopped(),
    }

    def run_trial(*_given: Any, **_named: Any) -> None:
        network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4, 2))
        units = list_units(network, granularity="channel")
        steps = {layer.name: torch.ones(layer.num_units, 9) for layer in units.layers}
        attach_quantisers(network, units, steps, np.full(units.num_units, 2))
        alive.append(weakref.ref(network[0]))
        raise errors.pop(how)

    train_like(monkeypatch)
    monkeypatch.setattr(work, "run_trial", run_trial)
    alive: list[weakref.ref[torch.nn.Module]] = []
    gc.disable()
    try:
        assert do(*trial) == how
        assert alive[0]() is None
    finally:
        gc.enable()


# --- full disks ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_handed_out_after_a_wish_to_stop_does_nothing(
    trial: tuple[SweepPaths, Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, task = trial
    train_like(monkeypatch, 0.9, 0.9, 0.9)
    paths.cancel_request.touch()
    assert do(paths, task) == "stopped"
    assert not paths.trial("k").exists() and not paths.log("k").exists()
    paths.cancel_request.unlink()
    assert do(paths, task) == "done"


def test_a_task_computes_on_the_threads_that_it_was_given(
    trial: tuple[SweepPaths, Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the environment says: Ray tells its workers OMP_NUM_THREADS=1."""
    paths, task = trial
    used: list[int] = []
    monkeypatch.setattr(work, "_do", lambda *_given, **_named: used.append(torch.get_num_threads()) or "done")
    before = torch.get_num_threads()
    try:
        for num_threads in (3, 1):
            work.perform(task, paths=paths, data_dir=None, gpus=0, num_threads=num_threads)
    finally:
        torch.set_num_threads(before)
    assert used == [3, 1]


@pytest.mark.parametrize("folder", ["packs", "logs", "baselines"])
def test_a_disk_that_is_full_is_no_failure_of_the_task(tmp_path: Path, folder: str) -> None:
    """Memory mounted in place of one folder: too little for a pack of 1.5 MB, or no room at all."""
    space = small_space(tmp_path)
    (task,) = (
        t for t in shared_tasks(expand_cells(space)).values() if t.kind == "baseline" and t.cell.seed == 0
    )
    paths = SweepPaths(tmp_path / "out")
    with mounted(paths.out / folder, size_mib=1):
        if folder != "packs":
            fill_up(paths.out / folder / "filler")
        outcome = work.perform(task, paths=paths, data_dir=None, gpus=0, num_threads=1)
        assert outcome.ending == "no_space", outcome.reason
        assert folder in outcome.reason or outcome.reason == "while writing"
    again = work.perform(task, paths=paths, data_dir=None, gpus=0, num_threads=1)
    assert again.ending == "done", again.reason


# --- shares of GPUs ------------------------------------------------------------------------------


def test_a_measured_peak_gives_a_whole_number_of_tasks_a_gpu() -> None:
    assert [share_of(peak) for peak in (0.9, 0.45, 0.38, 0.15, 0.001)] == [1.0, 1.0, 1 / 2, 1 / 4, 1 / 8]


def test_auto_learns_by_shape_and_promises_no_more_than_there_is(trial: tuple[SweepPaths, Task]) -> None:
    _, task = trial
    tasks = [task.model_copy(update={"key": str(number)}) for number in range(4)]
    other = replace_architecture(task)
    shares = GpuShares("auto", total=2)
    for one in tasks[:2]:
        shares.start(one)
    assert list(shares.promised.values()) == [1.0, 1.0]
    assert not shares.fits(tasks[2])
    shares.end(tasks[0], peak_frac=0.38)
    assert shares.of(tasks[2]) == 0.5 and shares.fits(tasks[2])
    assert shares.of(other) == 1.0
    recipe = task.cell.recipe.model_copy(update={"finetune_epochs": 0})
    scored = task.model_copy(update={"cell": task.cell.model_copy(update={"recipe": recipe})})
    assert shares.of(scored) == 1.0, "training says nothing of what scoring alone takes, nor that of training"


def replace_architecture(task: Task) -> Task:
    architecture = task.cell.architecture.model_copy(update={"name": "resnet18"})
    return task.model_copy(update={"cell": task.cell.model_copy(update={"architecture": architecture})})


def test_out_of_memory_where_shares_are_measured_ends_with_a_whole_gpu_and_is_learnt(
    trial: tuple[SweepPaths, Task],
) -> None:
    _, task = trial
    later = task.model_copy(update={"key": "later"})
    shares = GpuShares("auto", total=1)
    shares.end(task, peak_frac=0.03)
    assert shares.of(task) == 1 / 8
    assert shares.enlarge(task) and shares.of(task) == shares.of(later) == 1 / 4
    assert shares.enlarge(task) and shares.of(task) == shares.of(later) == 1.0
    assert not shares.enlarge(task), "it had the GPU to itself"


def test_a_share_leaves_room_for_what_is_no_tensor_and_holds_what_was_measured() -> None:
    assert usable_frac(1.0) == usable_frac(2.0) == 1.0
    for peak in (0.01, 0.1, 0.2, 0.38):
        share = share_of(peak)
        assert peak < usable_frac(share) < share
    assert 0 < usable_frac(0.01) < 0.01


def test_out_of_memory_doubles_a_given_share_once(trial: tuple[SweepPaths, Task]) -> None:
    _, task = trial
    shares = GpuShares(0.3, total=1)
    assert shares.enlarge(task) and shares.of(task) == 0.6
    assert not shares.enlarge(task)
    assert not GpuShares(1.0, total=4).enlarge(task), "a whole GPU cannot be doubled"


def test_words_that_an_earlier_attempt_left_are_not_said_of_this_one(trial: tuple[SweepPaths, Task]) -> None:
    paths, task = trial[0], trial[1].model_copy(update={"key": "0123"})
    write_json(
        paths.last_words(task.key), {"ending": "out_of_memory", "reason": "an attempt that nobody heard"}
    )
    worker = TaskActor.__new__(TaskActor)
    worker.request = {
        "task": task.model_dump_json(),
        "out": str(paths.out),
        "data_dir": None,
        "work": "benchmarks.noop",
        "gpus": 0,
        "cpus": 1,
        "time_limit_s": None,
    }
    assert worker.step()["done"]
    assert not paths.last_words(task.key).exists()
