"""Image files known by their bytes; read again only where a file was changed.

What was hashed lies in the user's cache, one file a folder of images, as in git's index: a file whose size and times
are those noted has the bytes that it had. What cannot be noted is hashed at every start.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from fqsweep.data.packs import usable_cores
from fqsweep.files import cache_folder, write_bytes

# A file changed within the tick of the clock in which it was hashed would look as it did.
SETTLED_NS = 2_000_000_000
UNREADABLE = "cannot be read"


def hash_files(root: Path, names: Sequence[str]) -> list[str]:
    """SHA-256 of the bytes of each file ``root / name``; ``UNREADABLE`` where that is left to whoever decodes it."""
    noted = _read_notes(root)
    now_ns = time.time_ns()
    traits_of = {name: _traits(root / name) for name in names}
    found = {
        name: noted[name][-1]
        for name in names
        if traits_of[name] and noted.get(name, [])[:-1] == traits_of[name]
    }
    changed = [name for name in dict.fromkeys(names) if name not in found]
    with ThreadPoolExecutor(usable_cores()) as pool:  # hashing lets go of the interpreter
        found |= zip(changed, pool.map(lambda name: _hash(root / name), changed), strict=True)
    settled = {
        name: [*traits_of[name], found[name]]
        for name in changed
        if traits_of[name] and max(traits_of[name][1:]) < now_ns - SETTLED_NS
    }
    if settled:
        _write_notes(root, {**noted, **settled})
    return [found[name] for name in names]


def _traits(path: Path) -> list[int]:
    """Size and times; nothing of a file that is not there."""
    try:
        state = path.stat()
    except OSError:
        return []
    return [state.st_size, state.st_mtime_ns, state.st_ctime_ns]


def _hash(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return UNREADABLE


def _notes_path(root: Path) -> Path:
    name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:20]
    return cache_folder() / "images" / f"{name}.json"


def _read_notes(root: Path) -> dict[str, list[Any]]:
    # No home (RuntimeError), nothing noted yet, or damaged: all is hashed.
    with suppress(OSError, ValueError, RuntimeError):
        notes = json.loads(_notes_path(root).read_text(encoding="utf-8"))
        if isinstance(notes, dict) and all(isinstance(note, list) and note for note in notes.values()):
            return notes
    return {}


def _write_notes(root: Path, notes: dict[str, list[Any]]) -> None:
    with suppress(OSError, RuntimeError):
        write_bytes(_notes_path(root), json.dumps(notes).encode())
