"""MLflow's tables for a new database, made in a process of its own: that takes seconds, and memory which would stay.

python -m fqsweep.tracking.new_database        # a sqlite file without a run, on stdout
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from fqsweep.processes import Beside
from fqsweep.tracking.stores import first_line, sqlite_file

SQLITE_HEADER = b"SQLite format 3\0"


@contextlib.contextmanager
def making_tables(uri: str) -> Iterator[Callable[[], bytes] | None]:
    """Make the tables of a sqlite database that is not there yet, beside what the block does.

    Nothing is written where the database will be: whoever holds the output folder puts it there.

    Yields:
        what waits for them and gives the file's contents; it raises ``RuntimeError`` with what MLflow said where they
        cannot be made. None where the store is there, or is no sqlite file.
    """
    file = sqlite_file(uri)
    if file is None or file.exists():
        yield None
        return
    with Beside("fqsweep.tracking.new_database") as process:

        def made() -> bytes:
            code, contents, complaints = process.wait()
            if code or not contents.startswith(SQLITE_HEADER):
                last = complaints.strip().splitlines()[-1:] or [f"it ended with {code}"]
                raise RuntimeError(f"MLflow's tables cannot be made: {first_line(RuntimeError(*last))}")
            return contents

        yield made


def empty_database() -> bytes:
    """MLflow's tables without a run, as it makes them for a client that meets a new file."""
    from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with tempfile.TemporaryDirectory(prefix="fqsweep-tables-") as folder:
        file = Path(folder) / "mlflow.db"
        store = SqlAlchemyStore(f"sqlite:///{file}", DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH)
        store._dispose_engine()
        return file.read_bytes()


def main() -> None:
    """Write a database to stdout; what anything prints meanwhile goes to stderr."""
    with os.fdopen(os.dup(sys.stdout.fileno()), "wb") as output:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        output.write(empty_database())


if __name__ == "__main__":
    main()
