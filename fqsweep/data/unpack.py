"""Unpack a zip from the internet: nothing leaves the folder, and the folder appears only when it is whole."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from fqsweep.data.download import DownloadError, require_room

# Photographs hardly shrink in a zip (1.0 to 1.1 times); text does by 10. More than this is no data set.
MAX_EXPANSION = 50
SMALL_BYTES = 1 << 26
_ENCRYPTED = 0x1
_CHUNK_BYTES = 1 << 20
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    NotImplementedError,  # a compression that zipfile does not know
    FileExistsError,
    NotADirectoryError,
)
# Names that no file can have: too long, or with what the file system does not take.
_IMPOSSIBLE = (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ)


def unpack_zip(archive: Path, folder: Path, *, on_progress: Callable[[int, int], None] | None = None) -> int:
    """Unpack ``archive`` to the new folder ``folder``; returns the number of files.

    All entries are checked before the first is written: a path that leaves the folder, a link or a device, an
    encrypted entry, two entries of one name, no file at all, or an absurd expansion refuses the archive. Each file's
    CRC is compared. An archive whose files all lie in one folder of the new folder's name is unpacked without it.

    Raises:
        DownloadError: the archive is no zip, is damaged, or holds something of that kind.
        InputError: the disk has no room.
    """
    beside = folder.parent / f".{folder.name}.unpacking"
    shutil.rmtree(beside, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as opened:
            entries = _checked_entries(opened, archive)
            require_room(folder.parent, sum(entry.file_size for entry in entries), what=f"what {archive} holds")
            for done, entry in enumerate(entries, start=1):
                _write_entry(opened, entry, beside)
                if on_progress:
                    on_progress(done, len(entries))
    except _DAMAGE as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise DownloadError(
            f"{archive} is damaged ({error}); delete it and fetch it again", kind="changed"
        ) from error
    except BaseException as error:
        shutil.rmtree(beside, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in _IMPOSSIBLE:
            raise DownloadError(
                f"{archive} is refused: a file cannot be called as its entry wants ({error})", kind="changed"
            ) from error
        raise
    inner = beside / folder.name
    only_inner = inner.is_dir() and len(list(beside.iterdir())) == 1
    os.replace(inner if only_inner else beside, folder)
    shutil.rmtree(beside, ignore_errors=True)
    return len(entries)


def _checked_entries(opened: zipfile.ZipFile, archive: Path) -> list[zipfile.ZipInfo]:
    entries = [entry for entry in opened.infolist() if not entry.is_dir()]
    names = set()
    for entry in entries:
        fault = _fault_of(entry)
        if fault is None and entry.filename in names:
            fault = "is there twice"
        if fault:
            raise DownloadError(f"{archive} is refused: its entry {entry.filename!r} {fault}", kind="changed")
        names.add(entry.filename)
    if not entries:
        raise DownloadError(
            f"{archive} is refused: it holds no file; delete it and fetch it again", kind="changed"
        )
    unpacked_bytes = sum(entry.file_size for entry in entries)
    if unpacked_bytes > max(SMALL_BYTES, MAX_EXPANSION * archive.stat().st_size):
        raise DownloadError(
            f"{archive} is refused: its {archive.stat().st_size:,} bytes would become {unpacked_bytes:,}",
            kind="changed",
        )
    return entries


def _fault_of(entry: zipfile.ZipInfo) -> str | None:
    """Why an entry must not be unpacked; None where it may."""
    # Pythons before 3.12 read the name up to a NUL byte; orig_filename is what the archive says.
    name = entry.orig_filename.replace("\\", "/")
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or ":" in path.parts[0] or "\0" in name:
        return "leaves the folder"
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        return "is a link or a device, not a file"
    return "is encrypted" if entry.flag_bits & _ENCRYPTED else None


def _write_entry(opened: zipfile.ZipFile, entry: zipfile.ZipInfo, folder: Path) -> None:
    """Write one file; never more bytes than were announced, which zipfile sees to with the CRC."""
    target = folder / PurePosixPath(entry.filename.replace("\\", "/"))
    target.parent.mkdir(parents=True, exist_ok=True)
    with opened.open(entry) as source, target.open("xb") as sink:
        shutil.copyfileobj(source, sink, _CHUNK_BYTES)
