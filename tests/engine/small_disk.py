"""A file system of a few MiB of its own, so that a full disk is a real one."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def mounted(place: Path, *, size_mib: int) -> Iterator[None]:
    """Mount memory at ``place``; skips the test where that cannot be done, or did nothing."""
    place.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        if not os.path.ismount(place) or shutil.disk_usage(place).total != size_mib * 2**20:
            pytest.skip(
                f"mounting {size_mib} MiB said that it worked and did not: the real disk must not be filled"
            )
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], capture_output=True, check=False)


def fill_up(file: Path) -> None:
    """Write to ``file`` until its disk is full; as much as 64 MiB, should it not be the small disk after all."""
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as stream:
        for size in (2**16, 2**12, 1):
            with contextlib.suppress(OSError):
                for _ in range(1024):
                    stream.write(bytes(size))
