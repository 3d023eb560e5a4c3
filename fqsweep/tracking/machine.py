"""What the driver's machine does while a sweep runs: load, memory, disk, GPUs, and the energy that it counts.

The names are those of MLflow's own monitor, which its UI shows as system metrics; that monitor ends for good when the
server is away once, and counts no energy. Workers on other machines are not measured.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from fqsweep.names import ENERGY_KWH

FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 60.0
PAUSE_FRAC = 0.005  # of the time so far: some hundreds of points, however long a sweep takes
POWERCAP = Path("/sys/class/powercap")
JOULES_A_KWH = 3.6e6
Send = Callable[[Mapping[str, float], int], None]


class EnergyCounters:
    """Counters that the hardware keeps: NVML's of each GPU, and RAPL's of each CPU package where it may be read."""

    def __init__(self, *, powercap: Path = POWERCAP) -> None:
        self.gpus = _gpu_handles()
        self.packages = [p for p in sorted(powercap.glob("intel-rapl:*")) if _is_package(p)]
        self._range = {str(package): _largest_joules(package) for package in self.packages}
        self._last: dict[str, float] = self._read()
        self.joules = 0.0

    @property
    def parts(self) -> str:
        """What is counted, in words; empty if nothing is."""
        counted = [
            f"{n} {word}" for n, word in ((len(self.gpus), "GPU"), (len(self.packages), "CPU package")) if n
        ]
        return " and ".join(word + ("" if word.startswith("1 ") else "s") for word in counted)

    def add(self) -> float:
        """Joules since the beginning, all counters together."""
        now = self._read()
        for name, value in now.items():
            before = self._last.get(name, value)
            if value < before:  # it wrapped around at its range, or its driver was loaded again
                before -= self._range.get(name) or before
            self.joules += value - before
        self._last = now
        return self.joules

    def _read(self) -> dict[str, float]:
        read = {str(package): _joules_of_package(package) for package in self.packages}
        read |= {f"gpu {i}": _joules_of_gpu(handle) for i, handle in enumerate(self.gpus)}
        return {name: value for name, value in read.items() if value is not None}


def _is_package(zone: Path) -> bool:
    """Whether a RAPL zone is a CPU package that may be read; others are parts of one, or the platform around it."""
    try:
        is_package = (zone / "name").read_text().startswith("package")
    except OSError:
        return False
    return is_package and _joules_of_package(zone) is not None


def _largest_joules(package: Path) -> float:
    """Where a package's counter begins again at 0; 0 where that is not said."""
    try:
        return int((package / "max_energy_range_uj").read_text()) / 1e6
    except (OSError, ValueError):
        return 0.0


def _joules_of_package(package: Path) -> float | None:
    try:
        return int((package / "energy_uj").read_text()) / 1e6
    except (OSError, ValueError):  # newer kernels let root alone read it
        return None


def _joules_of_gpu(handle: Any) -> float | None:
    import pynvml

    with contextlib.suppress(pynvml.NVMLError):
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
    return None


def _gpu_handles() -> list[Any]:
    """NVML's handles; none without an NVIDIA driver."""
    import pynvml

    with contextlib.suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    return []


def sample(gpus: list[Any], *, folder: Path) -> dict[str, float]:
    """Load and memory of this machine now.

    Args:
        gpus: NVML's handles.
        folder: whose disk is looked at.
    """
    memory, disk = psutil.virtual_memory(), psutil.disk_usage(str(folder))
    values = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / 1e6,
        "system_memory_usage_percentage": memory.percent,
        "disk_usage_percentage": disk.percent,
        "disk_available_megabytes": disk.free / 1e6,
        "driver_memory_megabytes": psutil.Process().memory_info().rss / 1e6,
    }
    for i, handle in enumerate(gpus):
        values |= {f"gpu_{i}_{name}": value for name, value in _sample_gpu(handle).items()}
    return {f"system/{name}": float(value) for name, value in values.items()}


def _sample_gpu(handle: Any) -> dict[str, float]:
    import pynvml

    values: dict[str, float] = {}
    with contextlib.suppress(pynvml.NVMLError):
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        values["memory_usage_percentage"] = 100 * memory.used / memory.total
        values["memory_usage_megabytes"] = memory.used / 1e6
    with contextlib.suppress(pynvml.NVMLError):
        values["utilization_percentage"] = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu
    with contextlib.suppress(pynvml.NVMLError):
        values["power_usage_watts"] = pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3
    return values


class MachineWatch:
    """A thread that samples the machine and sends what it saw; a server that is away costs samples, nothing else.

    Args:
        send: takes metrics and a step.
        folder: whose disk is looked at.
        first_step: the first sample's; an earlier start of the sweep sent those before.
        energy_kwh: what earlier starts counted.
    """

    def __init__(self, send: Send, *, folder: Path, first_step: int = 0, energy_kwh: float = 0.0) -> None:
        self.send = send
        self.folder = folder
        self.step = first_step
        self.energy_before_kwh = energy_kwh
        self.energy = EnergyCounters()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="machine")
        psutil.cpu_percent()  # the first call has nothing to compare with
        self._thread.start()

    def _run(self) -> None:
        begin = time.monotonic()
        pause_s = FIRST_PAUSE_S
        while not self._over.wait(pause_s):
            self._sample()
            pause_s = min(max(FIRST_PAUSE_S, PAUSE_FRAC * (time.monotonic() - begin)), LONGEST_PAUSE_S)
        self._sample()

    def _sample(self) -> None:
        # Whatever a tracking server raises, or a disk that does not answer.
        with contextlib.suppress(Exception):
            values = sample(self.energy.gpus, folder=self.folder)
            if self.energy.parts:
                values[ENERGY_KWH] = self.energy_before_kwh + self.energy.add() / JOULES_A_KWH
            self.send(values, self.step)
            self.step += 1

    def stop(self) -> None:
        """Send a last sample, and end."""
        self._over.set()
        self._thread.join(timeout=30.0)
