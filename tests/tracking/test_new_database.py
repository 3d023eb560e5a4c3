"""A new database's tables, made in a process of their own: whole, what MLflow wants, and nothing where it is not due."""

from __future__ import annotations

import sqlite3
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from fqsweep.errors import InputError
from fqsweep.files import SweepPaths
from fqsweep.tracking.new_database import begin_tables
from fqsweep.tracking.stores import default_uri
from fqsweep.tracking.tracker import open_tracker
from tests.small_spaces import SMALL, write_space
from tests.whole_sweeps import give_database


def test_tables_are_a_database_that_mlflow_takes_as_its_own(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    tables = begin_tables(f"sqlite:///{file}")
    assert tables is not None
    assert not file.exists(), "who holds the output folder puts it there"
    file.write_bytes(tables())
    with sqlite3.connect(file) as connection:
        (version,) = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        assert connection.execute("SELECT count(*) FROM runs").fetchone() == (0,)
    client = MlflowClient(f"sqlite:///{file}")
    run = client.create_run(client.create_experiment("one"))
    assert client.get_run(run.info.run_id).info.status == "RUNNING"
    with sqlite3.connect(file) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchone() == (version,)


@pytest.mark.parametrize(
    "uri", ["http://127.0.0.1:1", "postgresql://me@host/runs", "sqlite:///{}/mlflow.db", "runs"]
)
def test_nothing_is_made_where_a_store_is_or_is_no_file(uri: str, tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").touch()
    assert begin_tables(uri.format(tmp_path)) is None


def test_a_database_that_came_meanwhile_stays(tmp_path: Path) -> None:
    """Two sweeps may share it: the second one's tables are not put over the first one's runs."""
    space, paths = write_space(tmp_path, SMALL), SweepPaths(tmp_path / "out")
    tables = begin_tables(default_uri(paths))
    give_database(paths.out)
    first = open_tracker(default_uri(paths), paths=paths, sweep="t", space_file=space, facts={})
    second = open_tracker(default_uri(paths), paths=paths, sweep="t", space_file=space, facts={}, tables=tables)
    assert second.parent_id == first.parent_id


def test_tables_that_cannot_be_made_are_told_with_what_mlflow_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho Traceback >&2\necho 'ValueError: no tables today' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    space, paths = write_space(tmp_path, SMALL), SweepPaths(tmp_path / "out")
    with pytest.raises(
        InputError, match="cannot be used: MLflow's tables cannot be made: ValueError: no tables today"
    ):
        open_tracker(default_uri(paths), paths=paths, sweep="t", space_file=space, facts={})
    assert not paths.tracking_db.exists()
