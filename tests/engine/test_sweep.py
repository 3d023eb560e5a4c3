"""Whole sweeps through the command line: finished, killed, gone on with, failing in part."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import psutil
import pytest
from mlflow import MlflowClient

from fqsweep.files import SweepPaths
from fqsweep.names import RUN_PARAMS, TAG_PARENT, metric_keys
from fqsweep.results import read_result
from tests.whole_sweeps import (
    NUM_CELLS,
    NUM_TRIALS,
    TINY,
    child_keys,
    descendants,
    done_trials,
    events,
    finish,
    kill_worker_of,
    start,
    wait_for,
    write_tiny,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    folder = tmp_path_factory.mktemp("sweep")
    space = write_tiny(folder)
    code, output = finish(start(space, folder / "out", new_database=True))
    assert code == 0, output
    return space, folder / "out", output


def test_a_sweep_does_every_cell_once_and_mlflow_matches_one_to_one(finished: tuple[Path, Path, str]) -> None:
    _, out, output = finished
    keys = done_trials(out)
    assert len(keys) == NUM_TRIALS
    assert set(keys.values()) == {1}
    assert child_keys(out) == keys
    assert f"{NUM_CELLS} of {NUM_CELLS} cells done" in output


def test_mlflow_names_the_data_by_the_split_that_was_used(finished: tuple[Path, Path, str]) -> None:
    _, out, _ = finished
    client = MlflowClient(f"sqlite:///{out / 'mlflow.db'}")
    parent = client.get_run(SweepPaths(out).parent_run.read_text().split()[-1])
    (data,) = parent.inputs.dataset_inputs
    assert (out / "packs" / f"{data.dataset.digest}_splits.csv").exists()
    logged = [Path(file.path).name for file in client.list_artifacts(parent.info.run_id, "splits")]
    assert f"{data.dataset.digest}_splits.csv" in logged


def test_the_end_names_report_tracking_and_ui_command_and_shows_no_framework_noise(
    finished: tuple[Path, Path, str],
) -> None:
    _, out, output = finished
    last = output.strip().splitlines()[-3:]
    assert last[0].startswith("report:") and (out / "report" / "report.html").exists()
    assert last[1] == f"tracking: sqlite:///{out}/mlflow.db"
    assert last[2].startswith("open the MLflow UI with: ") and last[2].endswith(f"main.py ui --out {out}")
    for noise in ("Warning", "INFO", "(raylet", "alembic", "Traceback", "Trial status"):
        assert noise not in output


def test_parents_and_cost_tables_are_computed_once(finished: tuple[Path, Path, str]) -> None:
    _, out, _ = finished
    done = [line["kind"] for line in events(out, "done")]
    assert done.count("baseline") == 1
    assert done.count("importance") == 1
    assert len(list((out / "baselines").glob("*/meta.json"))) == 1


def test_every_run_has_the_same_params_and_all_metrics_and_keeps_its_budget(
    finished: tuple[Path, Path, str],
) -> None:
    _, out, _ = finished
    paths = SweepPaths(out)
    for key in done_trials(out):
        result = read_result(paths.result(key))
        assert set(result.params) == set(RUN_PARAMS)
        assert set(metric_keys()) <= set(result.metrics)
        if result.params["budget_bits"] != "none":
            assert result.metrics["bits/mean_weight"] <= float(result.params["budget_bits"])
        assert result.metrics["size/packed_bytes"] == (paths.trial(key) / "model.fqs").stat().st_size


def test_the_report_tags_the_recommended_runs(finished: tuple[Path, Path, str]) -> None:
    _, out, _ = finished
    front = pd.read_csv(out / "report" / "front.csv")
    assert len(front) and {"variant", "on_front"} <= set(front.columns)
    record = json.loads((out / "report" / "recommended.json").read_text())
    assert record["settings"][0]["budgets"]


def test_every_child_has_confusions_and_curves_and_the_parent_its_machine(
    finished: tuple[Path, Path, str],
) -> None:
    _, out, _ = finished
    client = MlflowClient(f"sqlite:///{out / 'mlflow.db'}")
    parent = client.get_run((out / "parent_run.txt").read_text().split()[-1])
    split, warnings = sorted(
        Path(file.path).name for file in client.list_artifacts(parent.info.run_id, "splits")
    )
    assert (out / "packs" / split).read_text().startswith("id,split,class,skin_tone\n")
    assert "(class, group) pairs have fewer than 10 test images" in (out / "packs" / warnings).read_text()
    assert parent.data.metrics["system/system_memory_usage_percentage"] > 0
    children = client.search_runs([parent.info.experiment_id], f"tags.`{TAG_PARENT}` = '{parent.info.run_id}'")
    for run in children:
        files = {file.path for file in client.list_artifacts(run.info.run_id)}
        assert {"model.fqs", "confusion.csv", "confusion.png"} <= files
        if run.data.metrics["time/train_s"] > 0:
            assert {"epoch/train/loss", "epoch/val/acc_worst", "epoch/bits/mean_weight"} <= set(
                run.data.metrics
            )


@pytest.fixture
def rays_folder() -> Iterator[str]:
    """Ray's temporary folder with the address of a cluster that is gone; a short path, because sockets lie below it."""
    with tempfile.TemporaryDirectory(prefix="rs", dir="/tmp", ignore_cleanup_errors=True) as folder:
        (Path(folder) / "ray").mkdir()
        (Path(folder) / "ray" / "ray_current_cluster").write_text("127.0.0.1:9")
        yield folder


def test_a_killed_worker_and_a_killed_driver_cost_nothing_but_time_and_a_dead_cluster_is_not_joined(
    tmp_path: Path, rays_folder: str
) -> None:
    space, out = write_tiny(tmp_path, epochs=4), tmp_path / "out"
    process = start(space, out, "--max-concurrent", "1", RAY_TMPDIR=rays_folder)
    wait_for(lambda: kill_worker_of(process.pid), what="a worker with a task")
    wait_for(lambda: len(done_trials(out)) >= 3, what="three finished trials")
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert len(events(out, "lost")) == 1
    assert len(done_trials(out)) < NUM_TRIALS
    code, output = finish(start(space, out, "--max-concurrent", "1", RAY_TMPDIR=rays_folder))
    assert code == 0, output
    assert len(events(out, "lost")) == 1
    keys = done_trials(out)
    assert len(keys) == NUM_TRIALS
    assert set(keys.values()) == {1}
    assert child_keys(out) == keys


def test_cells_that_fail_are_named_and_the_others_go_on(tmp_path: Path) -> None:
    text = TINY.replace("calibration_images: 30", "calibration_images: 30, finetune_learning_rate: 1.0e+30")
    space, out = write_tiny(tmp_path, text=text.replace("[1, 3]", "[1]")), tmp_path / "out"
    code, output = finish(start(space, out, "--max-concurrent", "1"))
    assert code == 1, output
    assert "2 of 4 cells done, 2 failed" in output
    assert "loss is" in output or "output is not finite" in output
    assert "at epoch 1, step" in output
    failed = events(out, "failed")
    assert failed and all(Path(str(line["reason"]).split("log: ")[1].rstrip(")")).exists() for line in failed)
    assert len(child_keys(out)) == 2


@pytest.mark.parametrize("after_s", [0.0, 2.0, 5.0])
def test_ctrl_c_while_a_sweep_begins_ends_it_with_a_word(tmp_path: Path, after_s: float) -> None:
    """While it loads, checks or opens MLflow; what works beside it ends too."""
    process = start(write_tiny(tmp_path), tmp_path / "out", new_database=True)
    wait_for(lambda: len(descendants(process.pid)) >= 2, what="checks and tables in the making")
    time.sleep(after_s)
    begun = descendants(process.pid)
    os.kill(process.pid, signal.SIGINT)
    code, output = finish(process, timeout_s=60)
    assert code == 130, output
    assert "To go on: " in output
    # What C code swallows it says on stderr; no traceback is of ours.
    assert 'main.py", line' not in output
    wait_for(
        lambda: not any(psutil.pid_exists(pid) for pid in begun), what="the end of what it began", timeout_s=20
    )


def test_ctrl_c_saves_what_trains_and_says_how_to_go_on_and_it_goes_on_from_there(tmp_path: Path) -> None:
    space, out = write_tiny(tmp_path, epochs=400), tmp_path / "out"
    process = start(space, out, "--max-concurrent", "1")

    def logs_with(text: str) -> list[Path]:
        return [log for log in (out / "logs").glob("*.log") if text in log.read_text()]

    wait_for(lambda: bool(logs_with("epoch 2:")), what="a parent in training")
    (log,) = logs_with("epoch 2:")
    os.kill(process.pid, signal.SIGINT)
    code, output = finish(process, timeout_s=60)
    assert code == 130, output
    assert "stopping: what ends an epoch within 8 s is saved" in output
    assert f"main.py run {space} --out {out} --max-concurrent 1" in output.split("To go on: ")[1]
    assert "Traceback" not in output
    assert log.read_text().splitlines()[-1].endswith("stopped")
    last = log.read_text().rpartition("epoch ")[2].partition(":")[0]
    assert len(list((out / "checkpoints").glob("*.pt"))) == 1
    assert not events(out, "lost") and not events(out, "done")
    again = start(space, out, "--max-concurrent", "1")
    wait_for(lambda: bool(logs_with("goes on after")), what="the parent that goes on")
    os.kill(again.pid, signal.SIGINT)
    finish(again, timeout_s=60)
    assert f"training goes on after epoch {last} of 400" in log.read_text()
