"""An output folder that was moved or copied: its database goes on with the files beside it.

MLflow notes the absolute place of the files of each experiment, run and model. Left alone, what is new would be
written where the folder was, or into the folder that it is a copy of.
"""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

from fqsweep.tracking.stores import ARTIFACTS

# Where MLflow's tables note a place (MLflow 3.17; what another version lacks is passed over).
PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
)


def follow_artifacts(database: Path, *, experiment: str) -> None:
    """Let the database's places name the folder of artifacts beside it, if that is there and they name another."""
    beside = database.resolve().parent / ARTIFACTS
    if not beside.is_dir():
        return
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        places = [(table, column) for table, column in PLACES if table in tables]
        noted = _noted(connection, experiment) if places else None
        here = beside.as_uri()
        if noted is None or noted == here:
            return
        for table, column in places:
            connection.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column} || '/', 1, ?) = ?",
                [here, len(noted) + 1, len(noted) + 1, f"{noted}/"],
            )


def _noted(connection: sqlite3.Connection, experiment: str) -> str | None:
    """The folder of artifacts that an experiment's files are said to lie in; None where that is none of ours."""
    row = connection.execute(
        "SELECT artifact_location FROM experiments WHERE name = ?", [experiment]
    ).fetchone()
    is_ours = row is not None and row[0].startswith("file:") and row[0].endswith(f"/{ARTIFACTS}")
    return row[0] if is_ours else None
