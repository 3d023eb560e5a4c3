"""An output folder that was moved or copied: its database goes on with the files beside it.

MLflow notes the absolute place of the files of each experiment, run and model. Left alone, what is new would be
written where the folder was, or into the folder that it is a copy of.
"""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

from fqsweep.tracking.stores import ARTIFACTS

# Where MLflow's tables note a place (MLflow 3.17; a table that another version lacks is passed over).
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
        row = connection.execute(
            "SELECT artifact_location FROM experiments WHERE name = ?", [experiment]
        ).fetchone()
        noted, here = row[0] if row else None, beside.as_uri()
        if (
            noted is None
            or noted == here
            or not noted.startswith("file:")
            or not noted.endswith(f"/{ARTIFACTS}")
        ):
            return
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        for table, column in PLACES:
            if table in tables:
                connection.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column} || '/', 1, ?) = ?",
                    [here, len(noted) + 1, len(noted) + 1, f"{noted}/"],
                )
