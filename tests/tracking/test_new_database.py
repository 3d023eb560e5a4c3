"""A new database's tables, made in a process of their own: whole, what MLflow wants, and nothing where it is not due."""

from __future__ import annotations

import sqlite3
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mlflow import MlflowClient

from fqsweep.errors import InputError
from fqsweep.files import SweepPaths
from fqsweep.tracking.new_database import making_tables
from fqsweep.tracking.stores import default_uri
from fqsweep.tracking.tracker import open_tracker
from tests.small_spaces import SMALL, write_space
from tests.whole_sweeps import give_database


def test_tables_are_a_database_that_mlflow_takes_as_its_own(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    with making_tables(f"sqlite:///{file}") as tables:
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
    with making_tables(uri.format(tmp_path)) as tables:
        assert tables is None


def test_a_database_that_came_meanwhile_stays(tmp_path: Path) -> None:
    """Two sweeps may share it: the second one's tables are not put over the first one's runs."""
    space, paths = write_space(tmp_path, SMALL), SweepPaths(tmp_path / "out")
    give_database(paths.out)
    empty = paths.tracking_db.read_bytes()
    paths.tracking_db.unlink()

    def meanwhile() -> bytes:
        paths.tracking_db.write_bytes(empty)
        open_tracker(default_uri(paths), paths=paths, sweep="t", space_file=space, facts={})
        return empty

    tracker = open_tracker(
        default_uri(paths), paths=paths, sweep="t", space_file=space, facts={}, tables=meanwhile
    )
    runs = MlflowClient(default_uri(paths)).search_runs([tracker.experiment_id])
    assert [run.info.run_id for run in runs] == [tracker.parent_id]
    assert not list(paths.out.glob(".mlflow.db*"))


def test_sweeps_that_open_one_new_database_at_once_share_it(tmp_path: Path) -> None:
    space, paths = write_space(tmp_path, SMALL), SweepPaths(tmp_path / "out")
    give_database(paths.out)
    uri, ready = default_uri(paths), threading.Barrier(4)

    def begin(number: int) -> str:
        own = SweepPaths(tmp_path / f"own{number}")
        own.out.mkdir()
        ready.wait()
        return open_tracker(uri, paths=own, sweep=f"t{number}", space_file=space, facts={}).experiment_id

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(begin, range(4)))) == 1


def test_what_is_printed_meanwhile_does_not_get_into_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import atexit\natexit.register(print, 'the end')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("MLFLOW_SQLALCHEMYSTORE_ECHO", "true")
    with making_tables(f"sqlite:///{tmp_path / 'a.db'}") as tables:
        assert tables is not None
        (tmp_path / "a.db").write_bytes(tables())
    with sqlite3.connect(tmp_path / "a.db") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


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
