"""The engine with cheap work: real Ray, ledger, MLflow and Optuna; killed, hanging, out of memory, cut off."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from fqsweep.engine.control import ask_to_stop, clear_failures, look
from fqsweep.files import SweepPaths, read_lines
from fqsweep.names import TAG_KEY, TAG_RETIRED
from fqsweep.tracking.stores import default_uri, search_runs
from tests.engine.forked_drivers import (
    assert_books_agree,
    behave,
    ended_as,
    executed,
    fork_driver,
    run_driver,
    said,
    wait_driver,
    write_cheap,
)
from tests.engine.lossy_proxy import LossyProxy
from tests.engine.ray_cluster import ClusterProcess
from tests.engine.small_disk import fill_up, mounted
from tests.whole_sweeps import child_named, descendants, done_trials, events, parent_of, wait_for, write_tiny

pytestmark = pytest.mark.slow
# Two seeds: fp32, uniform, two budgets of static (two trials each) and of baq.
NUM_TRIALS = 2 * (1 + 1 + 4 + 2)
ON_TWO_NODES = """
name: nodes
datasets:
  - {kind: synthderm, group_attributes: [skin_tone], image_size: 32, num_images: 300, min_group_count: 5}
architectures: [test_resnet]
budgets_bits: [2]
seeds: [0, 1, 2]
methods: [{method: static}]
recipe: {epochs: EPOCHS, finetune_epochs: 16, batch_size: 32, calibration_images: 30}
search: {trials_per_cell: 1}
resources: {cpus_per_trial: 1}
"""
TITLE = "synthderm/skin_tone test_resnet uniform-4 seed 1"


@pytest.fixture(scope="module")
def cluster() -> Iterator[ClusterProcess]:
    """Ray with faked GPUs that outlives the drivers."""
    cluster = ClusterProcess()
    yield cluster
    cluster.shutdown()


def test_a_driver_killed_at_20_random_moments_does_every_cell_once(
    tmp_path: Path, cluster: ClusterProcess
) -> None:
    space, out = write_cheap(
        tmp_path,
        ("seeds: [0, 1]", f"seeds: {list(range(10))}"),
        ("trials_per_cell: 2}", "trials_per_cell: 2, repeat_seeds: [10, 11]}"),
        sleep_s=0.25,
    )
    generator = random.Random(0)
    kills = 0
    for turn in range(40):
        before = len(events(out, "begin"))
        pid = fork_driver(space, out, address=cluster.address, max_concurrent=1 + turn % 2)
        # The first start makes the database; later every second kill falls into a start, the others into the work.
        if turn % 2 == 0:
            wait_for(lambda n=before: len(events(out, "begin")) > n, what="a driver that begins")
        time.sleep(generator.uniform(0.0, 1.3))
        os.kill(pid, signal.SIGKILL)
        kills += wait_driver(pid) == -signal.SIGKILL
        if kills == 20:
            break
    assert kills == 20, said(out)
    assert run_driver(space, out, address=cluster.address) == 0, said(out)
    assert_books_agree(space, out, trials=10 * 8 + 2 * 6)


def test_one_task_at_a_time_runs_in_one_worker_on_its_threads_and_tune_keeps_none_that_ended(
    tmp_path: Path, cluster: ClusterProcess
) -> None:
    """Of a sweep of thousands the driver's memory would be full of them; see ``fqsweep.engine.forgetting``."""
    space, out = write_cheap(tmp_path, ("search:", "resources: {cpus_per_trial: 2}\nsearch:"), sleep_s=0.3)
    code = run_driver(space, out, address=cluster.address, max_concurrent=1, counts_objects=True)
    assert code == 0, said(out)
    runs = executed(out)
    starts = sorted(float(str(run["time"])) for run in runs)
    assert len(starts) > NUM_TRIALS
    assert min(b - a for a, b in pairwise(starts)) >= 0.3
    assert len({run["pid"] for run in runs}) == 1
    assert {run["threads"] for run in runs} == {2}
    assert {run["tunables"] for run in runs} == {"glibc.malloc.hugetlb=1"}
    counts = [json.loads(line.split("alive: ")[1]) for line in said(out).splitlines() if "alive: " in line]
    assert len(counts) >= NUM_TRIALS + 4, "once a task"
    # One runs, one is asked for ahead, and one ends.
    assert max(count["Trial"] for count in counts) <= 4
    assert max(count["TrackedActorTask"] for count in counts) <= 4


def test_each_fault_costs_what_it_must_and_retry_clears_what_failed(
    tmp_path: Path, cluster: ClusterProcess
) -> None:
    faults = [
        {"match": "fp32 seed 0", "attempts": [1], "do": "cuda"},
        {"match": "fp32 seed 1", "do": "raise"},
        {"match": "uniform-4 seed 0", "attempts": [1], "do": "oom"},
        {"match": "uniform-4 seed 1", "do": "oom"},
        {"match": "baq@1 seed 0", "attempts": [1], "do": "hang"},
        {"match": "baq@3 seed 0", "attempts": [1, 2], "do": "exit"},
    ]
    resources = "resources: {gpus_per_trial: 0.5, time_limit_s: 3}\nsearch:"
    space, out = write_cheap(tmp_path, ("search:", resources), faults=faults)
    assert run_driver(space, out, address=cluster.address, command=("fqsweep", "run", "it")) == 1, said(out)
    ended = ended_as(out)
    assert ended["counts"] == {"done": 10, "failed": 2, "running": 0, "waiting": 0}
    by_title = {failure.split(": ")[0].rsplit("resnet ")[1]: failure for failure in ended["failures"]}
    assert set(by_title) == {"fp32 seed 1", "uniform-4 seed 1"}
    assert "OSError: [Errno 5] Input/output error" in by_title["fp32 seed 1"]
    assert by_title["fp32 seed 1"].endswith("(3 attempts)")
    assert "out of GPU memory" in by_title["uniform-4 seed 1"]
    assert by_title["uniform-4 seed 1"].endswith("it had a whole GPU; lower recipe.batch_size")
    assert {run["device"] for run in executed(out)} == {"cuda"}

    def runs(match: str) -> list[dict[str, object]]:
        return [run for run in executed(out) if match in str(run["title"])]

    assert [run["gpus"] for run in runs("uniform-4 seed 0")] == [0.5, 1.0]
    assert [run["gpus"] for run in runs("uniform-4 seed 1")] == [0.5, 1.0]
    spoiled = runs("fp32 seed 0")[0]
    assert not [run for run in executed(out) if run["pid"] == spoiled["pid"] and run["time"] > spoiled["time"]]
    hung = runs("baq@1 seed 0")
    assert len(hung) == 2 and not Path(f"/proc/{hung[0]['pid']}").exists()
    reasons = {str(line["title"]).split("resnet ")[1]: str(line["reason"]) for line in events(out, "lost")}
    assert "longer than resources.time_limit_s" in reasons["baq@1 seed 0"]
    assert "File" in SweepPaths(out).log(str(hung[0]["key"])).read_text(), "the log says where it hung"
    assert "device-side assert" in reasons["fp32 seed 0"]
    assert "its worker process died" in reasons["baq@3 seed 0"]

    status = look(SweepPaths(out))
    assert status.cells == ended["counts"] and len(status.failures) == 2 and status.driver is None
    before = len(executed(out))
    assert run_driver(space, out, address=cluster.address) == 1
    assert len(executed(out)) == before, "a failure is not tried again until it is cleared"
    behave(out)
    assert len(clear_failures(SweepPaths(out))) == 2
    assert run_driver(space, out, address=cluster.address) == 0, said(out)
    assert_books_agree(space, out, trials=NUM_TRIALS)


def test_auto_gives_a_whole_gpu_first_and_then_what_was_measured(
    tmp_path: Path, cluster: ClusterProcess
) -> None:
    space, out = write_cheap(
        tmp_path, ("search:", "resources: {gpus_per_trial: auto}\nsearch:"), peak_gpu_frac=0.15, sleep_s=0.3
    )
    assert run_driver(space, out, address=cluster.address) == 0, said(out)
    trials = [run for run in executed(out) if run["kind"] == "trial"]
    scored = [run for run in trials if "fp32" in str(run["title"]) or "uniform" in str(run["title"])]
    for runs, num_last in ((scored, 2), ([run for run in trials if run not in scored], 6)):
        assert [run["gpus"] for run in runs[:2]] == [1.0, 1.0]
        assert {run["gpus"] for run in runs[-num_last:]} == {0.25}


def test_a_full_disk_stops_the_sweep_and_fails_no_cell(tmp_path: Path, cluster: ClusterProcess) -> None:
    space, out = write_cheap(tmp_path, faults=[{"match": "uniform-4", "do": "no_space"}])
    assert run_driver(space, out, address=cluster.address) == 4
    assert "No space left" in said(out) and not events(out, "failed")
    behave(out)
    assert run_driver(space, out, address=cluster.address) == 0, said(out)
    assert_books_agree(space, out, trials=NUM_TRIALS)


def test_a_running_sweep_is_seen_from_outside_and_stops_when_asked(
    tmp_path: Path, cluster: ClusterProcess
) -> None:
    space, out = write_cheap(tmp_path, faults=[{"match": "uniform-4 seed 1", "do": "wait"}])
    driver = fork_driver(space, out, address=cluster.address)
    wait_for(lambda: len(done_trials(out)) == NUM_TRIALS - 1, what="all but one trial")
    status = look(SweepPaths(out))
    assert status.cells == {"done": 11, "failed": 0, "running": 1, "waiting": 0}
    assert status.driver is not None and f"process {driver} on" in status.driver
    assert [task["title"] for task in status.running] == [TITLE]
    assert status.seconds_left is not None and status.saved_runs == 2 * (8 + 6) - 4
    assert run_driver(space, out, address=cluster.address) == 2
    assert f"is in use by process {driver}" in said(out)
    start = time.monotonic()
    assert f"process {driver}" in ask_to_stop(SweepPaths(out))
    assert wait_driver(driver) == 130, said(out)
    assert time.monotonic() - start < 15
    status = look(SweepPaths(out))
    assert status.driver is None and status.driver_ending == "stopped" and status.running == []
    (out / "go").touch()
    assert run_driver(space, out, address=cluster.address) == 0
    assert_books_agree(space, out, trials=NUM_TRIALS)
    assert look(SweepPaths(out)).driver_ending == "done"

    def work() -> list[dict[str, object]]:
        """The ledger without what a driver says of itself."""
        return [line for line in read_lines(SweepPaths(out).ledger) if "key" in line]

    before = work(), len(executed(out))
    assert run_driver(space, out, address=cluster.address) == 0
    assert (work(), len(executed(out))) == before, "the same command again runs nothing"
    assert_books_agree(space, out, trials=NUM_TRIALS)
    # Runs of cells that left the search space are marked, and are as they were when the cells are back.
    whole = space.read_text()
    for text, num_retired in ((whole.replace("seeds: [0, 1]", "seeds: [0]"), NUM_TRIALS // 2), (whole, 0)):
        space.write_text(text)
        assert run_driver(space, out, address=cluster.address) == 0
        client = MlflowClient(default_uri(SweepPaths(out)))
        assert len(list(search_runs(client, f"tags.{TAG_RETIRED} = 'true'"))) == num_retired


def test_a_node_that_dies_gives_its_trials_to_the_others(tmp_path: Path, cluster: ClusterProcess) -> None:
    raylet = cluster.add_node()
    # Three parents, all that can be done before a parent is there, for the three places of both nodes.
    three_seeds = ("seeds: [0, 1]", "seeds: [0, 1, 2]")
    space, out = write_cheap(tmp_path, three_seeds, faults=[{"match": "", "do": "wait"}])
    driver = fork_driver(space, out, address=cluster.address)
    wait_for(lambda: len({run["node"] for run in executed(out)}) == 2, what="work on both nodes")
    os.kill(raylet, signal.SIGKILL)
    wait_for(lambda: bool(events(out, "lost")), what="the end of the second node's worker")
    (out / "go").touch()
    assert wait_driver(driver) == 0, said(out)
    assert any("worker process died" in str(line["reason"]) for line in events(out, "lost"))
    assert_books_agree(space, out, trials=NUM_TRIALS // 2 * 3)


def test_training_on_a_node_that_dies_goes_on_elsewhere_from_its_last_epoch(
    tmp_path: Path, cluster: ClusterProcess
) -> None:
    """Real work on two nodes: packs, parents and results of one are found by the other."""
    raylet = cluster.add_node()
    space, out = write_tiny(tmp_path, epochs=2, text=ON_TWO_NODES), tmp_path / "out"
    paths = SweepPaths(out)
    driver = fork_driver(space, out, address=cluster.address, work="fqsweep.engine.work")
    found: dict[int, str] = {}

    def fine_tunes_on_the_second_node() -> bool:
        for key in {str(line["key"]) for line in events(out, "start") if line["kind"] == "trial"}:
            if paths.checkpoint(key).exists():
                text = paths.log(key).read_text()
                pid = int(text.partition("] start: ")[0].rpartition("[")[2])
                if "epoch 12:" not in text and parent_of(pid) == raylet:
                    found[pid] = key
        return bool(found)

    wait_for(fine_tunes_on_the_second_node, what="a trial that trains on the second node", timeout_s=240)
    for pid in (raylet, *found):  # a machine takes its processes along
        os.kill(pid, signal.SIGKILL)
    assert wait_driver(driver) == 0, said(out)
    lost = events(out, "lost")
    assert {line["key"] for line in lost if line["kind"] == "trial"} == set(found.values())
    assert any("worker process died" in str(line["reason"]) for line in lost)
    assert all("training goes on after epoch" in paths.log(key).read_text() for key in found.values())
    assert_books_agree(space, out, trials=3)


def test_a_sweep_whose_own_ray_is_killed_says_so_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_health_check_period_ms", "500")  # when Ray itself notices; 15 s else
    space, out = write_cheap(tmp_path, sleep_s=0.5)
    driver = fork_driver(space, out)
    wait_for(lambda: len(done_trials(out)) >= 3, what="three trials")
    raylet = child_named(driver, "raylet")
    for pid in (raylet, *descendants(raylet)):
        with contextlib.suppress(ProcessLookupError):  # it may have ended with the raylet
            os.kill(pid, signal.SIGKILL)
    assert wait_driver(driver, timeout_s=120) == 7, said(out)
    assert "the same command goes on" in said(out)
    assert not events(out, "failed")
    behave(out)
    assert run_driver(space, out) == 0, said(out)
    assert_books_agree(space, out, trials=NUM_TRIALS)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An output folder that is a file system of 24 MiB, or a skip where none can be mounted."""
    place = tmp_path / "out"
    with mounted(place, size_mib=24):
        yield tmp_path


def test_a_disk_that_really_is_full_stops_the_sweep_and_loses_nothing(
    small_disk: Path, cluster: ClusterProcess
) -> None:
    space, out = write_cheap(small_disk, ("seeds: [0, 1]", "seeds: [0, 1, 2, 3]"), sleep_s=0.3)
    driver = fork_driver(space, out, address=cluster.address, max_concurrent=2)
    wait_for(lambda: len(done_trials(out)) >= 3, what="three trials")
    filler = out / "filler"
    fill_up(filler)
    assert wait_driver(driver, timeout_s=60) == 4, said(out)
    assert "No space left" in said(out) and not events(out, "failed")
    filler.unlink()
    assert run_driver(space, out, address=cluster.address) == 0, said(out)
    assert_books_agree(space, out, trials=2 * NUM_TRIALS)


def test_a_ledger_that_cannot_be_written_stops_the_sweep_at_once_and_loses_nothing(
    tmp_path: Path, cluster: ClusterProcess
) -> None:
    # One of the two places: what ends in the other one has to be written.
    hangs = [{"match": "baq@3 seed 0", "attempts": [1], "do": "wait"}]
    space, out = write_cheap(tmp_path, faults=hangs, sleep_s=0.1)
    driver = fork_driver(space, out, address=cluster.address, max_concurrent=3)
    wait_for(
        lambda: len(events(out, "start")) > 5 and "baq@3 seed 0" in (out / "executed.jsonl").read_text(),
        what="work",
    )
    ledger = SweepPaths(out).ledger
    (out / "full").symlink_to("/dev/full")  # every write there fails for want of space
    ledger.rename(out / "kept")
    (out / "full").rename(ledger)
    assert wait_driver(driver, timeout_s=60) == 4, said(out)
    assert "No space left" in said(out)
    (out / "kept").replace(ledger)
    behave(out)
    assert run_driver(space, out, address=cluster.address) == 0, said(out)
    assert not events(out, "failed")
    assert_books_agree(space, out, trials=NUM_TRIALS)


def start_mlflow(out: Path, port: int) -> subprocess.Popen[bytes]:
    """An MLflow server on this machine, answering."""
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    command += ["--backend-store-uri", f"sqlite:///{out / 'mlflow.db'}"]
    server = subprocess.Popen(
        [*command, "--artifacts-destination", str(out / "mlartifacts")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
    )

    def answers() -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as page:
                return bool(page.status == 200)
        except OSError:
            return False

    wait_for(answers, what="the MLflow server")
    return server


def created_trial(path: str, body: dict[str, Any]) -> str | None:
    """The key of the trial whose run a request to MLflow creates."""
    if not path.endswith("/runs/create"):
        return None
    return next((tag["value"] for tag in body["tags"] if tag["key"] == TAG_KEY), None)


def test_a_tracking_server_that_is_away_for_a_while_gets_every_result_once(
    tmp_path: Path, cluster: ClusterProcess
) -> None:
    """It also does what is asked of it without getting to say so: MLflow's client asks for a second run by itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    space, out = write_cheap(tmp_path, sleep_s=0.5)
    server = start_mlflow(out, port)
    proxy = LossyProxy(f"http://127.0.0.1:{port}", loses=created_trial)
    try:
        driver = fork_driver(space, out, address=cluster.address, max_concurrent=2, tracking_uri=proxy.address)
        wait_for(lambda: len(done_trials(out)) >= 3, what="three trials")
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        wait_for(lambda: len(done_trials(out)) == NUM_TRIALS, what="the rest, with no server")
        server = start_mlflow(out, port)
        assert wait_driver(driver) == 0, said(out)
    finally:
        proxy.close()
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    assert proxy.lost == set(done_trials(out))
    assert_books_agree(space, out, trials=NUM_TRIALS)
