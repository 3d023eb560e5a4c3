"""Shared by all tests: where real images may lie, and quiet libraries."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("OMP_NUM_THREADS", "1")

PROJECT = Path(__file__).resolve().parents[1]
SHARED_DATA = PROJECT.parent / "shared" / "data"


# What takes longest, and waits more than it computes, begins before all else, side by side: each has a Ray of its own.
FIRST = ("test_engine.py", "test_sweep.py", "test_clusters.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """``FIRST``, in its order, before all else."""
    names = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: names.get(item.path.name, len(FIRST)))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real images beside the checkout, or a skip that says so."""
    if not (SHARED_DATA / "isic2019").is_dir():
        pytest.skip(f"real ISIC 2019 images are not here ({SHARED_DATA}/isic2019)")
    return SHARED_DATA
