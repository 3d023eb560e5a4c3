"""Real tracking stores for tests: a PostgreSQL cluster and an MLflow server, each on a private port of loopback."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

START_S = 240.0


class Missing(Exception):
    """What a store needs is not installed."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- PostgreSQL ----------------------------------------------------------------------------------


def _postgres_programs() -> Path | None:
    """The folder of ``initdb``: on the path, or where Debian keeps it."""
    found = shutil.which("initdb")
    places = [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((place for place in places if (place / "initdb").exists()), None)


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """The URI of an empty database in a cluster of its own.

    Raises:
        Missing: PostgreSQL or its driver is not installed.
    """
    programs = _postgres_programs()
    if programs is None:
        raise Missing("PostgreSQL is not installed (initdb; Debian: apt-get install postgresql)")
    if importlib.util.find_spec("psycopg") is None:
        raise Missing("psycopg is not installed (the extra `postgres`)")
    folder = Path(
        tempfile.mkdtemp(prefix="fqsweep-postgres-")
    )  # outside of pytest's, which no other user may enter
    user = _owner_of(folder)
    port = free_port()
    data, log = folder / "data", folder / "log"
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    try:
        _run_as(
            user, programs / "initdb", "-D", data, "-A", "trust", "-U", "fqsweep", "-E", "UTF8", "--no-sync"
        )
        _run_as(user, programs / "pg_ctl", "-D", data, "-l", log, "-w", "-o", options, "start")
        try:
            yield f"postgresql+psycopg://fqsweep@127.0.0.1:{port}/postgres"
        finally:
            _run_as(user, programs / "pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _owner_of(folder: Path) -> str | None:
    """Give the folder to a user that is not root, because PostgreSQL refuses root; None: we are not root."""
    if os.getuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    user = "postgres" if "postgres" in names else "nobody"
    os.chown(folder, pwd.getpwnam(user).pw_uid, -1)
    return user


def _run_as(user: str | None, *command: object) -> None:
    words = [str(word) for word in command]
    words = ["runuser", "-u", user, "--", *words] if user else words
    ended = subprocess.run(
        words, cwd="/", text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False
    )
    assert ended.returncode == 0, f"{' '.join(words)}:\n{ended.stderr}"


# --- an MLflow server ----------------------------------------------------------------------------


@contextlib.contextmanager
def mlflow_server(folder: Path, *more: str) -> Iterator[str]:
    """The address of a tracking server that also serves artifacts (``--serve-artifacts``)."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--workers", "1"]
    command += ["--serve-artifacts", "--artifacts-destination", str(folder / "served"), *more]
    with (folder / "server.log").open("w") as log:
        # Without the server's background jobs: seven processes that each load MLflow.
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=environment)
        try:
            wait_until_up(f"http://127.0.0.1:{port}", process, log=folder / "server.log")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(timeout=30)


def wait_until_up(address: str, process: subprocess.Popen[bytes], *, log: Path) -> None:
    end = time.monotonic() + START_S
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5):
            return
        assert process.poll() is None and time.monotonic() < end, log.read_text()[-2000:]
        time.sleep(0.2)
