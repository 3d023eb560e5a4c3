"""Where processes that this one starts find the package."""

from __future__ import annotations

import os
from pathlib import Path


def python_path() -> str:
    """``PYTHONPATH`` for a process that imports ``fqsweep`` or ``analysis``, installed or not."""
    own = str(Path(__file__).resolve().parents[1])
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join([own, *(part for part in given if part and part != own)])
