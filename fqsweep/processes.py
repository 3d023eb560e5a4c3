"""Processes that this one starts: where they find the package, and work that goes on beside what is done here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType


def python_path() -> str:
    """``PYTHONPATH`` for a process that imports ``fqsweep`` or ``analysis``, installed or not."""
    own = str(Path(__file__).resolve().parents[1])
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join([own, *(part for part in given if part and part != own)])


class Beside:
    """A module that is run in a process of its own from now on; whoever leaves the block ends what still runs."""

    def __init__(self, module: str, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env={**os.environ, "PYTHONPATH": python_path()},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def __enter__(self) -> Beside:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.returncode is None:
            self._process.kill()
            self._process.communicate()

    def wait(self) -> tuple[int, bytes, str]:
        """Exit code, what it wrote, and what it complained of."""
        output, complaints = self._process.communicate()
        return self._process.returncode, output, complaints.decode(errors="replace")
