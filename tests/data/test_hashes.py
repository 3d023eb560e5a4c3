"""Image files are known by their bytes, and read again only where they were changed."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from fqsweep.data import hashes
from fqsweep.data.hashes import UNREADABLE, hash_files


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two files, long unchanged; the user's cache is of this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a.jpg", "b.jpg"):
        (images / name).write_bytes(name.encode())
    monkeypatch.setattr(hashes, "SETTLED_NS", -1_000_000_000)  # as if what was written now were old
    return images


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def read_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("a file was read"))


def test_what_was_hashed_is_not_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = hash_files(folder, ["a.jpg", "b.jpg"])
    assert found == [sha256("a.jpg"), sha256("b.jpg")]
    read_nothing(monkeypatch)
    assert hash_files(folder, ["b.jpg", "a.jpg"]) == found[::-1]


def test_other_bytes_of_the_same_number_and_date_are_seen(folder: Path) -> None:
    hash_files(folder, ["a.jpg"])
    before = (folder / "a.jpg").stat()
    (folder / "a.jpg").write_bytes(b"other")
    os.utime(folder / "a.jpg", ns=(before.st_atime_ns, before.st_mtime_ns))  # as `cp -p` does
    assert hash_files(folder, ["a.jpg"]) == [sha256("other")]


def test_a_file_that_was_changed_just_now_is_not_noted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "SETTLED_NS", 3600 * 1_000_000_000)
    hash_files(folder, ["a.jpg"])
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: hashlib.sha256(b"read again"))
    assert hash_files(folder, ["a.jpg"]) == [sha256("read again")]


@pytest.mark.parametrize("damage", [b"{", b"[]", b'{"a.jpg": 3}', b'{"a.jpg": []}', b"\xff"])
def test_damaged_notes_are_made_anew(folder: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes) -> None:
    wanted = hash_files(folder, ["a.jpg"])
    (notes,) = (folder.parent / "cache").rglob("*.json")
    notes.write_bytes(damage)
    assert hash_files(folder, ["a.jpg"]) == wanted
    read_nothing(monkeypatch)
    assert hash_files(folder, ["a.jpg"]) == wanted


def test_without_a_place_for_notes_files_are_hashed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert hash_files(folder, ["a.jpg"]) == hash_files(folder, ["a.jpg"]) == [sha256("a.jpg")]


def test_a_file_that_cannot_be_read_is_left_to_whoever_decodes_it(folder: Path) -> None:
    (folder / "a.jpg").unlink()
    assert hash_files(folder, ["a.jpg", "b.jpg"]) == [UNREADABLE, sha256("b.jpg")]
    time.sleep(0.01)
    (folder / "a.jpg").write_bytes(b"back")
    assert hash_files(folder, ["a.jpg"]) == [sha256("back")]
