"""What the driver sends of its own machine: samples under MLflow's names, and energy where it is counted."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from fqsweep.names import ENERGY_KWH
from fqsweep.tracking import machine
from fqsweep.tracking.machine import EnergyCounters, MachineWatch, sample


def count(powercap: Path, package: int, joules: float) -> None:
    folder = powercap / f"intel-rapl:{package}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "energy_uj").write_text(f"{round(joules * 1e6)}\n")
    (folder / "name").write_text(f"package-{package}\n")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_gpu_handles", list)


def test_a_sample_has_load_and_memory_as_mlflow_names_them(tmp_path: Path) -> None:
    values = sample([], folder=tmp_path)
    assert 0 < values["system/system_memory_usage_percentage"] <= 100
    assert values["system/cpu_utilization_percentage"] >= 0
    assert values["system/driver_memory_megabytes"] > 10


def test_energy_adds_up_over_packages_and_over_a_counter_that_wraps(tmp_path: Path) -> None:
    count(tmp_path, 0, 100.0)
    count(tmp_path, 1, 50.0)
    counters = EnergyCounters(powercap=tmp_path)
    assert counters.parts == "2 CPU packages"
    count(tmp_path, 0, 130.0)
    assert counters.add() == pytest.approx(30.0)
    count(tmp_path, 0, 5.0)  # wrapped around: at least these 5 are new
    count(tmp_path, 1, 60.0)
    assert counters.add() == pytest.approx(45.0)


def test_a_counter_that_wraps_adds_what_was_left_to_its_end(tmp_path: Path) -> None:
    count(tmp_path, 0, 130.0)
    (tmp_path / "intel-rapl:0" / "max_energy_range_uj").write_text("140000000\n")
    counters = EnergyCounters(powercap=tmp_path)
    count(tmp_path, 0, 5.0)
    assert counters.add() == pytest.approx(15.0)


def test_the_platform_and_the_parts_of_a_package_are_not_counted_beside_it(tmp_path: Path) -> None:
    for package in (0, 10):
        count(tmp_path, package, 1.0)
    for zone, name in (("intel-rapl:1", "psys"), ("intel-rapl:0:0", "core")):
        folder = tmp_path / zone
        folder.mkdir()
        (folder / "energy_uj").write_text("1\n")
        (folder / "name").write_text(f"{name}\n")
    assert EnergyCounters(powercap=tmp_path).parts == "2 CPU packages"


def test_a_counter_that_may_not_be_read_is_not_counted(tmp_path: Path) -> None:
    (tmp_path / "intel-rapl:0" / "energy_uj").mkdir(parents=True)  # reading it is an OSError
    assert EnergyCounters(powercap=tmp_path).parts == ""


class Sent:
    """Takes samples, after refusing some."""

    def __init__(self, refusals: int = 0) -> None:
        self.refusals = refusals
        self.taken: list[tuple[int, dict[str, float]]] = []

    def __call__(self, values: Mapping[str, float], step: int) -> None:
        if self.refusals:
            self.refusals -= 1
            raise ConnectionError("the server is away")
        self.taken.append((step, dict(values)))


def watched(sent: Sent, folder: Path, monkeypatch: pytest.MonkeyPatch, **more: float) -> None:
    monkeypatch.setattr(machine, "FIRST_PAUSE_S", 0.01)
    watch = MachineWatch(sent, folder=folder, first_step=7, **more)
    end = time.monotonic() + 20
    while not sent.taken and time.monotonic() < end:
        time.sleep(0.01)
    watch.stop()


def test_steps_go_on_and_a_server_that_is_away_costs_only_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = Sent(refusals=2)
    watched(sent, tmp_path, monkeypatch)
    assert [step for step, _ in sent.taken] == list(range(7, 7 + len(sent.taken)))
    assert len(sent.taken) >= 2  # the last one at the end


def test_energy_goes_on_from_what_earlier_starts_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count(tmp_path, 0, 1.0)
    monkeypatch.setattr(machine, "EnergyCounters", lambda: EnergyCounters(powercap=tmp_path))
    sent = Sent()
    watched(sent, tmp_path, monkeypatch, energy_kwh=2.5)
    assert sent.taken[-1][1][ENERGY_KWH] == pytest.approx(2.5)


def test_no_counter_is_no_energy_and_not_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "EnergyCounters", lambda: EnergyCounters(powercap=tmp_path / "none"))
    sent = Sent()
    watched(sent, tmp_path, monkeypatch)
    assert ENERGY_KWH not in sent.taken[-1][1]
