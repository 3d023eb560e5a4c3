"""MLflow's tables for a new database, made in a process of its own: that takes seconds, and memory which would stay.

python -m fqsweep.tracking.new_database        # a sqlite file without a run, on stdout
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from fqsweep.import_path import python_path
from fqsweep.tracking.stores import first_line, sqlite_file


def begin_tables(uri: str) -> Callable[[], bytes] | None:
    """Begin to make the tables of a sqlite database that is not there yet.

    Nothing is written where the database will be: whoever holds the output folder puts it there.

    Returns:
        what waits for them and gives the file's contents; it raises ``RuntimeError`` with what MLflow said where they
        cannot be made. None where the store is there, or is no sqlite file.
    """
    file = sqlite_file(uri)
    if file is None or file.exists():
        return None
    process = subprocess.Popen(
        [sys.executable, "-m", "fqsweep.tracking.new_database"],
        env={**os.environ, "PYTHONPATH": python_path()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )

    def made() -> bytes:
        contents, complaints = process.communicate()
        if process.returncode:
            last = complaints.decode(errors="replace").strip().splitlines()[-1:]
            raise RuntimeError(f"MLflow's tables cannot be made: {first_line(RuntimeError(*last))}")
        return contents

    return made


def _empty_database() -> bytes:
    """MLflow's tables without a run, as it makes them for a client that meets a new file."""
    from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with tempfile.TemporaryDirectory(prefix="fqsweep-tables-") as folder:
        file = Path(folder) / "mlflow.db"
        store = SqlAlchemyStore(f"sqlite:///{file}", DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH)
        store._dispose_engine()
        return file.read_bytes()


if __name__ == "__main__":
    sys.stdout.buffer.write(_empty_database())
