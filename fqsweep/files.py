"""Every path of one sweep, and writes that leave a whole file or none."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from filelock import FileLock

# Beside a pack: on which side of the split each image is, near-duplicates joined, and what to know of the set.
SPLITS_ENDING, WARNINGS_ENDING = "_splits.csv", "_warnings.txt"
# In a trial's folder, and in its MLflow run: the packed model, widths by layer, classes taken for which.
MODEL_FILE = "model.fqs"
BITS_TABLE, BITS_PICTURE = "bits.csv", "bits.png"
CONFUSION_TABLE, CONFUSION_PICTURE = "confusion.csv", "confusion.png"
RECORDED_FILES = (MODEL_FILE, BITS_TABLE, BITS_PICTURE, CONFUSION_TABLE, CONFUSION_PICTURE)


@dataclass(frozen=True)
class SweepPaths:
    """Where one sweep keeps what: the names of the files and folders directly below ``out`` stand here alone."""

    out: Path

    @property
    def ledger(self) -> Path:
        return self.out / "ledger.jsonl"

    @property
    def studies(self) -> Path:
        return self.out / "optuna.journal"

    @property
    def driver_lock(self) -> Path:
        return self.out / "driver.lock"

    @property
    def driver_note(self) -> Path:
        return self.out / "driver.json"

    @property
    def cancel_request(self) -> Path:
        return self.out / "cancel"

    @property
    def plan(self) -> Path:
        return self.out / "plan.json"

    @property
    def data_digests(self) -> Path:
        """Of the data and weights that the sweep began with."""
        return self.out / "data.json"

    @property
    def parent_run(self) -> Path:
        """The ids of the sweep's parent runs in MLflow, one a line, that of the last start at the end."""
        return self.out / "parent_run.txt"

    @property
    def tracking_db(self) -> Path:
        return self.out / "mlflow.db"

    @property
    def artifacts(self) -> Path:
        return self.out / "mlartifacts"

    @property
    def packs(self) -> Path:
        return self.out / "packs"

    @property
    def report(self) -> Path:
        return self.out / "report"

    def baseline(self, key: str) -> Path:
        return self.out / "baselines" / key

    def baseline_meta(self, key: str) -> Path:
        """Written last: where it is, the parent is whole."""
        return self.baseline(key) / "meta.json"

    def importance(self, key: str) -> Path:
        return self.out / "importance" / f"{key}.npz"

    @property
    def trials(self) -> Path:
        return self.out / "trials"

    def trial(self, key: str) -> Path:
        return self.trials / key

    def checkpoint(self, key: str) -> Path:
        """Training in progress: not in the trial's folder, so that the next attempt finds it."""
        return self.out / "checkpoints" / f"{key}.pt"

    def result(self, key: str) -> Path:
        return self.trial(key) / "result.json"

    def log(self, key: str) -> Path:
        return self.out / "logs" / f"{key}.log"

    def epochs(self, key: str) -> Path:
        return self.out / "logs" / f"{key}.epochs.jsonl"

    def last_words(self, key: str) -> Path:
        return self.out / "logs" / f"{key}.ending.json"


@dataclass(frozen=True)
class AttemptPaths(SweepPaths):
    """The paths of a sweep as one attempt at a trial sees them: its trial's folder is its own until it is whole."""

    attempt: str

    def trial(self, key: str) -> Path:
        return self.trials / f".{key}.{self.attempt}"


def cache_folder() -> Path:
    """What this user's processes may keep and make again: ``XDG_CACHE_HOME``, else ``~/.cache``.

    Raises:
        RuntimeError: there is no home folder.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fqsweep"


def publish(attempt: Path, final: Path, *, last: str) -> bool:
    """Move an attempt's whole folder to its place, if no other attempt was there first.

    Args:
        last: the file that makes a folder whole; a folder without it is a leftover and gives way.

    Returns:
        whether it is this attempt's folder that stands there now.
    """
    if final.exists() and not (final / last).exists():
        shutil.rmtree(final)
    try:
        os.rename(attempt, final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        shutil.rmtree(attempt, ignore_errors=True)
        return False
    return True


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` whole or not at all: beside it, synced, then moved into place."""
    write_whole(path, lambda stream: stream.write(content))


def write_whole(path: Path, write: Callable[[IO[bytes]], object], *, sync: bool = True) -> None:
    """Have ``write`` fill a file that then is at ``path`` whole, or not at all.

    Args:
        sync: wait until it is on the disk. Without, a machine that loses its power can lose the file or leave a
            damaged one; a process that dies cannot.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            write(stream)
            stream.flush()
            if sync:
                os.fsync(stream.fileno())
        os.chmod(beside, 0o644)
        os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a mapping as JSON, whole or not at all. NaN is refused: it is never recorded as a result."""
    write_bytes(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode())


def append_line(path: Path, value: Mapping[str, Any], *, sync: bool = True) -> None:
    """Append one JSON line and sync it, unless losing it in a crash does no harm.

    A line cut short by a crash is healed by starting a new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as stream:
        if stream.tell() > 0:
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":
                stream.write(b"\n")
        stream.write(json.dumps(value, sort_keys=True, allow_nan=False).encode() + b"\n")
        stream.flush()
        if sync:
            os.fsync(stream.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file; lines cut short by a crash are left out, a missing file is empty."""
    return list(iterate_lines(path))


def iterate_lines(path: Path) -> Iterator[dict[str, Any]]:
    """``read_lines`` without all of them in memory."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                value = json.loads(text)
            except json.JSONDecodeError:
                continue
            if isinstance(value, dict):
                yield value


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock that belongs to ``path``: of several processes one computes, the others wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        yield
