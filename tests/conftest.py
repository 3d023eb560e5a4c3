"""Shared by all tests: where real images may lie, and quiet libraries."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("OMP_NUM_THREADS", "1")

PROJECT = Path(__file__).resolve().parents[1]
SHARED_DATA = PROJECT.parent / "shared" / "data"


# One after the other on one worker of pytest-xdist, and first: they start Ray, share clusters, or look at the clock.
SERIAL = ("test_engine.py", "test_sweep.py", "test_clusters.py")


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in its own hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of a file together; those that start Ray make one group, which begins before all others."""
    items.sort(key=lambda item: item.path.name not in SERIAL)
    for item in items:
        serial = item.path.name in SERIAL
        item.add_marker(pytest.mark.xdist_group("ray" if serial else item.path.relative_to(PROJECT).as_posix()))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real images beside the checkout, or a skip that says so."""
    if not (SHARED_DATA / "isic2019").is_dir():
        pytest.skip(f"real ISIC 2019 images are not here ({SHARED_DATA}/isic2019)")
    return SHARED_DATA
