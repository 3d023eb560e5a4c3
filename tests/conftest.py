"""Shared by all tests: where real images may lie, and quiet libraries."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("OMP_NUM_THREADS", "1")

PROJECT = Path(__file__).resolve().parents[1]
SHARED_DATA = PROJECT.parent / "shared" / "data"


# One after the other on one worker of pytest-xdist: they start Ray on this machine, or look at the clock.
SERIAL = ("test_engine.py", "test_sweep.py")
# What takes longest begins before all else; the cluster over ssh has namespaces of its own and may run beside it.
FIRST = (*SERIAL, "test_clusters.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """``FIRST``, in its order, before all else."""
    names = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: names.get(item.path.name, len(FIRST)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``-n``: the tests of a file on one worker, those of all ``SERIAL`` files on the same one."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "serial" if Path(file).name in SERIAL else file

    return ByFile(config, log)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real images beside the checkout, or a skip that says so."""
    if not (SHARED_DATA / "isic2019").is_dir():
        pytest.skip(f"real ISIC 2019 images are not here ({SHARED_DATA}/isic2019)")
    return SHARED_DATA
