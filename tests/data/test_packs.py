import errno
import hashlib
import json
import multiprocessing
import os
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from moto.server import ThreadedMotoServer

from fqsweep.config import SynthdermConfig
from fqsweep.data import describe_samples, packs
from fqsweep.data.folder import FolderSource
from fqsweep.data.packs import open_pack, pack_path
from fqsweep.data.records import Samples
from fqsweep.data.store import fetch_pack
from fqsweep.data.subset import stratified_subset, take
from fqsweep.disk import is_no_space
from fqsweep.errors import InputError
from tests.data.conftest import write_photo


def is_as_recorded(path: Path) -> bool:
    """Whether a pack's checksum is the one beside it."""
    record = json.loads(path.with_suffix(".json").read_text())
    return bool(record["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest())


def synthetic(num_images: int = 100) -> Samples:
    return describe_samples(SynthdermConfig(kind="synthderm", num_images=num_images), data_dir=None)


def few(count: int = 6) -> Samples:
    return take(synthetic(), np.arange(count))


def _open_in_process(pack_dir: Path, ready: object, queue: object) -> None:
    ready.wait()  # type: ignore[attr-defined]
    queue.put(int(open_pack(few(30), size=16, pack_dir=pack_dir, num_threads=1).sum()))  # type: ignore[attr-defined]


def test_a_pack_holds_every_image_in_order(tmp_path: Path) -> None:
    samples = few()
    image_nhwc = open_pack(samples, size=32, pack_dir=tmp_path)
    assert image_nhwc.shape == (6, 32, 32, 3)
    for index in range(6):
        assert np.array_equal(image_nhwc[index], samples.source.read(index, size=32))
    with pytest.raises(ValueError, match="read-only"):
        image_nhwc[0] = 0


def test_a_second_opening_decodes_nothing(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report: Callable[[int, int], None] = lambda done, total: seen.append((done, total))  # noqa: E731
    open_pack(few(), size=16, pack_dir=tmp_path, on_progress=report)
    open_pack(few(), size=16, pack_dir=tmp_path, on_progress=report)
    assert seen == [(6, 6)]


def test_what_a_killed_process_left_of_a_pack_is_removed_before_there_must_be_room_for_another(
    tmp_path: Path,
) -> None:
    samples = few()
    leftover = tmp_path / f".{pack_path(samples, size=32, pack_dir=tmp_path).stem}.abc.npy"
    leftover.write_bytes(b"half a pack")
    others = tmp_path / ".0123456789abcdef_32px.abc.npy"
    others.write_bytes(b"in the making")
    open_pack(samples, size=32, pack_dir=tmp_path)
    assert not leftover.exists() and others.exists()


def test_another_size_subset_or_content_is_another_pack(tmp_path: Path) -> None:
    paths = {
        pack_path(few(), size=16, pack_dir=tmp_path),
        pack_path(few(), size=17, pack_dir=tmp_path),
        pack_path(few(5), size=16, pack_dir=tmp_path),
        pack_path(replace(few(), content="other"), size=16, pack_dir=tmp_path),
    }
    assert len(paths) == 4


@pytest.mark.parametrize("damage", ["truncated", "no record", "bad record", "bad header"])
def test_a_damaged_pack_is_made_again(tmp_path: Path, damage: str) -> None:
    before = np.array(open_pack(few(), size=16, pack_dir=tmp_path))
    path = pack_path(few(), size=16, pack_dir=tmp_path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "no record":
        path.with_suffix(".json").unlink()
    elif damage == "bad record":
        path.with_suffix(".json").write_text("[1")
    else:
        path.write_bytes(b"\0" * 64 + path.read_bytes()[64:])
    assert np.array_equal(open_pack(few(), size=16, pack_dir=tmp_path), before)
    assert is_as_recorded(path)


def test_opening_finds_a_changed_byte_and_makes_the_pack_again(tmp_path: Path) -> None:
    before = np.array(open_pack(few(), size=32, pack_dir=tmp_path))
    path = pack_path(few(), size=32, pack_dir=tmp_path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert np.array_equal(open_pack(few(), size=32, pack_dir=tmp_path), before)
    assert is_as_recorded(path)


def test_a_pack_is_copied_to_the_machines_own_disk_once(tmp_path: Path) -> None:
    far, near = tmp_path / "far", tmp_path / "near"
    for _ in range(2):
        image_nhwc = open_pack(few(), size=16, pack_dir=far, local_dir=near)
        assert Path(image_nhwc.filename).parent == near  # type: ignore[attr-defined]
    before = np.array(open_pack(few(), size=16, pack_dir=far))
    assert np.array_equal(image_nhwc, before)
    path = pack_path(few(), size=16, pack_dir=near)
    path.write_bytes(path.read_bytes()[:-1])
    assert np.array_equal(open_pack(few(), size=16, pack_dir=far, local_dir=near), before)
    assert sorted(p.suffix for p in near.iterdir() if p.suffix != ".lock") == [".json", ".npy"]


def test_a_copy_on_the_machines_own_disk_is_used_without_reading_the_far_pack(tmp_path: Path) -> None:
    far, near = tmp_path / "far", tmp_path / "near"
    before = np.array(open_pack(few(), size=16, pack_dir=far, local_dir=near))
    path = pack_path(few(), size=16, pack_dir=far)
    path.write_bytes(b"")  # read, it would be made again
    assert np.array_equal(open_pack(few(), size=16, pack_dir=far, local_dir=near), before)
    assert path.stat().st_size == 0
    path.with_suffix(".json").write_text("{}")  # another pack than the copy's
    assert np.array_equal(open_pack(few(), size=16, pack_dir=far, local_dir=near), before)
    assert path.stat().st_size > 0


@pytest.mark.parametrize("has_local_dir", [False, True])
def test_a_pack_is_decoded_by_one_machine_and_fetched_by_the_others(
    tmp_path: Path, has_local_dir: bool
) -> None:
    store = (tmp_path / "bucket" / "packs").as_uri()
    decoded: list[int] = []

    def opened(machine: str) -> np.ndarray:
        return open_pack(
            few(),
            size=16,
            pack_dir=tmp_path / machine,
            local_dir=tmp_path / machine / "near" if has_local_dir else None,
            store=store,
            on_progress=lambda done, _total: decoded.append(done),
        )

    first, second = opened("one"), opened("two")
    assert decoded == [6]
    assert np.array_equal(first, second)
    assert (Path(second.filename).parent.name == "near") == has_local_dir  # type: ignore[attr-defined]


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server that speaks S3, with a bucket: the address of a folder in it."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/bucket", method="PUT"), timeout=10)
    yield f"s3://bucket/some/packs?scheme=http&endpoint_override={host}:{port}"
    server.stop()


def test_packs_lie_on_s3(tmp_path: Path, s3: str) -> None:
    decoded: list[int] = []
    images = [
        np.array(
            open_pack(
                few(),
                size=16,
                pack_dir=tmp_path / machine,
                store=s3,
                on_progress=lambda n, _: decoded.append(n),
            )
        )
        for machine in ("one", "two")
    ]
    assert decoded == [6], "the second machine fetches what the first one decoded"
    assert np.array_equal(*images)


def test_a_bucket_that_does_not_exist_is_named(tmp_path: Path, s3: str) -> None:
    with pytest.raises(InputError, match="unset it to decode here"):
        open_pack(few(), size=16, pack_dir=tmp_path, store=s3.replace("bucket", "other"))


def test_a_damaged_pack_in_the_store_is_decoded_again_and_replaced(tmp_path: Path) -> None:
    store = tmp_path / "bucket"
    before = np.array(open_pack(few(), size=16, pack_dir=tmp_path / "one", store=store.as_uri()))
    (stored,) = store.glob("*.npy")
    stored.write_bytes(stored.read_bytes()[:-5])
    assert np.array_equal(open_pack(few(), size=16, pack_dir=tmp_path / "two", store=store.as_uri()), before)
    assert is_as_recorded(stored)


@pytest.mark.parametrize("store", ["nowhere://bucket/packs", "file:///proc/no-such-folder"])
def test_a_store_that_cannot_be_used_is_named(tmp_path: Path, store: str) -> None:
    with pytest.raises(InputError, match=f"FQSWEEP_PACK_STORE={store}: .*unset it to decode here"):
        open_pack(few(), size=16, pack_dir=tmp_path, store=store)


def test_an_error_of_the_own_disk_is_not_blamed_on_the_store(tmp_path: Path) -> None:
    store = (tmp_path / "bucket").as_uri()
    open_pack(few(), size=16, pack_dir=tmp_path / "one", store=store)
    (record,) = (tmp_path / "one").glob("*.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        fetch_pack(store, (tmp_path / "file" / record.name).with_suffix(".npy"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_room_that_cannot_be_claimed_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_given: int) -> None:
        raise OSError(code, "no")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(InputError, match="bytes for decoded images") as raised:
        open_pack(few(), size=16, pack_dir=tmp_path)
    assert is_no_space(raised.value)


def test_another_error_while_claiming_room_is_not_called_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_given: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        open_pack(few(), size=16, pack_dir=tmp_path)


def test_processes_that_ask_at_once_share_one_pack(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready, queue = context.Event(), context.Queue()
    workers = [context.Process(target=_open_in_process, args=(tmp_path, ready, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    ready.set()
    sums = {queue.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join()
    assert len(sums) == 1
    assert len(list(tmp_path.glob("*.npy"))) == 1


def test_an_unreadable_image_is_named_and_leaves_no_pack(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        write_photo(tmp_path / name)
    (tmp_path / "b.jpg").write_bytes(b"")
    source = FolderSource((tmp_path / "a.jpg", tmp_path / "b.jpg"))
    with pytest.raises(InputError, match=r"b\.jpg cannot be decoded"):
        open_pack(replace(few(2), source=source), size=16, pack_dir=tmp_path / "packs")
    assert [path.name for path in (tmp_path / "packs").iterdir() if path.suffix != ".lock"] == []


def test_a_disk_without_room_is_refused_before_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packs.shutil, "disk_usage", lambda folder: _Usage(free=1000))
    with pytest.raises(InputError, match=r"needs 8,704 bytes .* has 1,000 free; .*max_images"):
        open_pack(few(), size=16, pack_dir=tmp_path)


class _Usage:
    def __init__(self, *, free: int) -> None:
        self.free = free


def test_a_subset_keeps_the_shares_and_the_images(tmp_path: Path) -> None:
    samples = synthetic(600)
    subset = stratified_subset(samples, max_images=300, attributes=["skin_type"], seed=3)
    assert len(subset) == 300
    type_whole, type_subset = (
        np.bincount(s.groups["skin_type"].code_n, minlength=6) for s in (samples, subset)
    )
    assert np.abs(type_subset - type_whole / 2).max() <= 4
    position = samples.id_n.tolist().index(subset.id_n[7])
    assert np.array_equal(subset.source.read(7, size=16), samples.source.read(position, size=16))
    assert "300 images left out by max_images = 300." in subset.notes
    assert stratified_subset(samples, max_images=None, attributes=["skin_type"], seed=3) is samples


def test_a_larger_subset_of_one_seed_differs_from_another_seeds() -> None:
    first, again, other = (
        set(stratified_subset(synthetic(), max_images=50, attributes=["skin_type"], seed=seed).id_n.tolist())
        for seed in (0, 0, 1)
    )
    assert first == again != other
