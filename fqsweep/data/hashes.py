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

    def look(name: str) -> tuple[list[int], str]:
        """A file's size and times, and the hash of its bytes."""
        path = root / name
        try:
            state = path.stat()
            traits = [state.st_size, state.st_mtime_ns, state.st_ctime_ns]
            *before, digest = noted.get(name) or [None]
            if before == traits:
                return traits, digest
            with path.open("rb") as stream:
                return traits, hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError:
            return [], UNREADABLE

    with ThreadPoolExecutor(usable_cores()) as pool:  # hashing lets go of the interpreter
        found = dict(zip(names, pool.map(look, names), strict=True))
    settled = {
        name: [*traits, digest]
        for name, (traits, digest) in found.items()
        if traits and max(traits[1:]) < now_ns - SETTLED_NS
    }
    if any(noted.get(name) != note for name, note in settled.items()):
        _write_notes(root, {**noted, **settled})
    return [found[name][1] for name in names]


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
