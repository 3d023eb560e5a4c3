"""Decode every image once, into a memory-mapped array that all trials share.

A pack is a ``.npy`` file of uint8 (n, h, w, 3), named by a hash of what its pixels depend on, with a ``.json``
beside it that holds its size and checksums. Both are written beside and moved into place, data first: a pack
without its ``.json`` was cut short and is made again, and so is one whose checksum is wrong when a process opens
it for the first time.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from fqsweep.config import content_hash
from fqsweep.data.records import Samples
from fqsweep.data.store import COPY_BYTES, fetch_pack, put_pack
from fqsweep.disk import is_no_space, no_space
from fqsweep.errors import InputError
from fqsweep.files import locked, write_json, write_whole

PACK_VERSION = 3
OnProgress = Callable[[int, int], None]
_HEADER_BYTES = 4096
# Packs (path, time of change, size) whose checksum this process has compared.
_compared: set[tuple[str, int, int]] = set()


def open_pack(
    samples: Samples,
    *,
    size: int,
    pack_dir: Path,
    local_dir: Path | None = None,
    store: str | None = None,
    num_threads: int | None = None,
    on_progress: OnProgress | None = None,
) -> np.ndarray:
    """The samples' images, memory-mapped read-only, uint8 (n, size, size, 3); decoded if they are not yet.

    Of several processes that ask at once, one decodes and the others wait.

    Args:
        samples: whose images.
        size: side in pixels.
        pack_dir: folder of packs, made if needed.
        local_dir: folder on a disk of this machine to which the pack is copied once, where ``pack_dir`` is far
            away (a network file system); None uses it where it lies.
        store: address of a folder on object storage from which a pack is fetched in place of decoding, and where
            it is put by whoever had to decode; with ``local_dir`` it is fetched there, past ``pack_dir``.
        num_threads: decoding threads, None for one per usable core.
        on_progress: called with (images done, images in all).

    Raises:
        InputError: an image cannot be decoded, the disk has no room, or the store cannot be used; the message
            names the path.
    """
    folder = local_dir if store and local_dir else pack_dir
    path = pack_path(samples, size=size, pack_dir=folder)
    near = local_dir / path.name if local_dir is not None and local_dir != folder else None
    if near is not None and _is_copy(near, path):
        return _opened(near)
    if not _is_sound(path):
        with locked(path):
            if not _is_sound(path) and not (store and fetch_pack(store, path) and _is_sound(path)):
                _write_pack(path, samples, size=size, num_threads=num_threads, on_progress=on_progress)
                if store:
                    put_pack(store, path)
    if near is not None:
        _copy_to(near, path)
    return _opened(near or path)


def _opened(path: Path) -> np.ndarray:
    image_nhwc: np.ndarray = np.load(path, mmap_mode="r")
    return image_nhwc


def pack_path(samples: Samples, *, size: int, pack_dir: Path) -> Path:
    """Where the pack of these samples at this size lies."""
    key = content_hash([PACK_VERSION, samples.content, size, samples.id_n.tolist()])
    return pack_dir / f"{key}_{size}px.npy"


def _is_copy(local: Path, path: Path) -> bool:
    """Whether ``local`` is a whole copy of the pack at ``path``, which is far away: its record alone is read."""
    record = _read_record(path)
    return bool(record) and record == _read_record(local) and _is_sound(local)


def _copy_to(local: Path, path: Path) -> None:
    """Copy the pack to ``local`` if it is not there; of several processes one copies."""
    if not _is_sound(local):
        with locked(local):
            if not _is_sound(local):
                _require_room(local.parent, needed_bytes=path.stat().st_size)
                _copy_whole(local, path)
                _copy_whole(local.with_suffix(".json"), path.with_suffix(".json"))
    if not _is_sound(local):
        raise InputError(f"{local} is not the same as {path}; delete both, the next run makes them again")


def _is_sound(path: Path) -> bool:
    """Whether a pack is whole; a process compares the checksum of each pack once."""
    if not _is_whole(path):
        return False
    state = path.stat()
    seen = (str(path), state.st_mtime_ns, state.st_size)
    if seen not in _compared:
        if _read_record(path).get("sha256") != _checksum(path):
            return False
        _compared.add(seen)
    return True


def _read_record(path: Path) -> dict[str, object]:
    try:
        record = json.loads(path.with_suffix(".json").read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _is_whole(path: Path) -> bool:
    """The cheap check on opening: the size and the first bytes are those recorded."""
    record = _read_record(path)
    try:
        if path.stat().st_size != record.get("bytes"):
            return False
        with path.open("rb") as stream:
            return hashlib.sha256(stream.read(_HEADER_BYTES)).hexdigest() == record.get("head_sha256")
    except OSError:
        return False


def _checksum(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_pack(
    path: Path, samples: Samples, *, size: int, num_threads: int | None, on_progress: OnProgress | None
) -> None:
    shape = (len(samples), size, size, 3)
    for leftover in path.parent.glob(f".{path.stem}.*"):
        leftover.unlink(
            missing_ok=True
        )  # as large as a pack, of a process that was killed: this one holds the lock
    _require_room(path.parent, needed_bytes=math.prod(shape) + _HEADER_BYTES)
    path.with_suffix(".json").unlink(missing_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=".npy")
    beside = Path(name)
    try:
        _reserve(handle, path.parent, shape)
        start_byte = _write_header(handle, shape)
        _fill(handle, start_byte, samples, size=size, num_threads=num_threads, on_progress=on_progress)
        os.fsync(handle)
        os.chmod(beside, 0o644)
        record = _describe_pack(beside, shape)
        os.replace(beside, path)
        write_json(path.with_suffix(".json"), record)
        state = path.stat()
        _compared.add((str(path), state.st_mtime_ns, state.st_size))
    finally:
        os.close(handle)
        beside.unlink(missing_ok=True)


def _describe_pack(path: Path, shape: tuple[int, ...]) -> dict[str, object]:
    with path.open("rb") as stream:
        head_sha256 = hashlib.sha256(stream.read(_HEADER_BYTES)).hexdigest()
    return {
        "bytes": path.stat().st_size,
        "shape": list(shape),
        "head_sha256": head_sha256,
        "sha256": _checksum(path),
    }


def _copy_whole(target: Path, source: Path) -> None:
    """Copy a file whole or not at all; a damaged copy of a pack is found by its checksum and made again."""
    with source.open("rb") as stream:
        write_whole(target, partial(shutil.copyfileobj, stream, length=COPY_BYTES), sync=False)


def _require_room(folder: Path, *, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        # Its cause makes it a full disk to a sweep, which then stops, and no failure of a cell.
        raise InputError(_no_room(folder, needed_bytes, free_bytes)) from no_space(folder)


def _no_room(folder: Path, needed_bytes: int, free_bytes: int) -> str:
    return (
        f"{folder} needs {needed_bytes:,} bytes for decoded images but has {free_bytes:,} free; "
        "free some, choose another --out, or use a smaller image_size or max_images"
    )


def _reserve(handle: int, folder: Path, shape: tuple[int, ...]) -> None:
    """Claim the blocks now: a disk that is full is better found before an hour of decoding than after it."""
    needed_bytes = math.prod(shape) + _HEADER_BYTES
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(handle, 0, needed_bytes)
    except OSError as error:
        if not is_no_space(error):
            raise
        raise InputError(_no_room(folder, needed_bytes, shutil.disk_usage(folder).free)) from error


def _write_header(handle: int, shape: tuple[int, ...]) -> int:
    """Write the header of a ``.npy`` file and give the file its length; returns where the first image begins."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": shape})
    header = stream.getvalue()
    os.pwrite(handle, header, 0)
    os.ftruncate(handle, len(header) + math.prod(shape))
    return len(header)


def _fill(
    handle: int,
    start_byte: int,
    samples: Samples,
    *,
    size: int,
    num_threads: int | None,
    on_progress: OnProgress | None,
) -> None:
    """Decode in threads: Pillow and NumPy let go of the interpreter for most of the work.

    Images are written, not mapped: pages of a map would count as this process's memory until the end.
    """
    total, image_bytes = len(samples), size * size * 3

    def decode(index: int) -> None:
        pixels = np.ascontiguousarray(samples.source.read(index, size=size))
        os.pwrite(handle, pixels.data, start_byte + index * image_bytes)

    pool = ThreadPoolExecutor(num_threads or usable_cores())
    try:
        for done, _ in enumerate(pool.map(decode, range(total)), start=1):
            if on_progress and (done % 100 == 0 or done == total):
                on_progress(done, total)
    finally:
        pool.shutdown(cancel_futures=True)


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
