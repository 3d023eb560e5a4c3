"""Archives that are whole, damaged or malicious."""

import stat
import struct
import zipfile
from pathlib import Path

import pytest

from fqsweep.data.download import DownloadError
from fqsweep.data.unpack import unpack_zip


def write_zip(path: Path, entries: dict[str, bytes], *, deflate: bool = False) -> Path:
    kind = zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def test_an_archive_unpacks_without_its_own_folder(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "X.zip", {"X/a.jpg": b"a", "X/deep/b.jpg": b"b"})
    assert unpack_zip(archive, tmp_path / "X") == 2
    assert (tmp_path / "X" / "a.jpg").read_bytes() == b"a"
    assert (tmp_path / "X" / "deep" / "b.jpg").read_bytes() == b"b"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["X", "X.zip"]


def test_an_archive_of_plain_files_becomes_the_folder(tmp_path: Path) -> None:
    unpack_zip(write_zip(tmp_path / "X.zip", {"a.jpg": b"a", "LICENSE": b"text"}), tmp_path / "X")
    assert sorted(path.name for path in (tmp_path / "X").iterdir()) == ["LICENSE", "a.jpg"]


@pytest.mark.parametrize(
    "name",
    ["../evil.jpg", "/evil.jpg", "a/../../evil.jpg", "..\\evil.jpg", "C:/evil.jpg", "\\\\host\\evil.jpg"],
)
def test_a_path_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    archive = write_zip(tmp_path / "X.zip", {"good.jpg": b"good", name: b"evil"})
    with pytest.raises(DownloadError, match="leaves the folder"):
        unpack_zip(archive, tmp_path / "X")
    assert [path.name for path in tmp_path.iterdir()] == ["X.zip"]
    assert not (tmp_path.parent / "evil.jpg").exists()


def test_a_link_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "X.zip", "w") as archive:
        link = zipfile.ZipInfo("link")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc")
        archive.writestr("link/passwd", b"evil")
    with pytest.raises(DownloadError, match="'link' is a link or a device"):
        unpack_zip(tmp_path / "X.zip", tmp_path / "X")
    assert not (tmp_path / "X").exists()


def test_an_absurd_expansion_is_refused_before_a_byte_is_written(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "X.zip", {"bomb.jpg": bytes(1 << 27)}, deflate=True)
    with pytest.raises(DownloadError, match=r"would become 134,217,728"):
        unpack_zip(archive, tmp_path / "X")
    assert [path.name for path in tmp_path.iterdir()] == ["X.zip"]


def test_a_bomb_that_lies_about_its_size_is_cut_off(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "X.zip", {"bomb.jpg": bytes(1 << 24)}, deflate=True)
    content = bytearray(archive.read_bytes())
    for signature, offset in ((b"PK\3\4", 22), (b"PK\1\2", 24)):
        start = content.find(signature)
        content[start + offset : start + offset + 4] = struct.pack("<I", 100)
    archive.write_bytes(content)
    with pytest.raises(DownloadError, match="is damaged"):
        unpack_zip(archive, tmp_path / "X")
    assert not (tmp_path / "X").exists()


@pytest.mark.parametrize("damage", ["one byte", "end", "no zip", "twice", "file as folder"])
def test_a_damaged_archive_leaves_nothing(tmp_path: Path, damage: str) -> None:
    archive = write_zip(tmp_path / "X.zip", {"a.jpg": b"content of a" * 99, "b.jpg": b"b"})
    content = bytearray(archive.read_bytes())
    if damage == "one byte":
        content[100] ^= 1
        archive.write_bytes(content)
    elif damage == "end":
        archive.write_bytes(content[:-30])
    elif damage == "no zip":
        archive.write_bytes(b"<html>not found</html>")
    elif damage == "twice":
        with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(archive, "a") as opened:
            opened.writestr("a.jpg", b"other")
    else:
        write_zip(archive, {"a": b"file", "a/b.jpg": b"below it"})
    with pytest.raises(DownloadError, match=r"is damaged \(|is there twice"):
        unpack_zip(archive, tmp_path / "X")
    assert [path.name for path in tmp_path.iterdir()] == ["X.zip"]


@pytest.mark.parametrize("name", [None, "only/a/folder/"])
def test_an_archive_without_a_file_is_refused(tmp_path: Path, name: str | None) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        if name:
            archive.writestr(name, "")
    with pytest.raises(DownloadError, match="it holds no file"):
        unpack_zip(tmp_path / "a.zip", tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x" * 300, "1")
    with pytest.raises(DownloadError, match="a file cannot be called as its entry wants"):
        unpack_zip(tmp_path / "a.zip", tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]
