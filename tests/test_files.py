"""Paths of a sweep, and files that are whole or absent."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from fqsweep import files
from fqsweep.files import (
    AttemptPaths,
    SweepPaths,
    append_line,
    locked,
    publish,
    read_lines,
    write_bytes,
    write_json,
)

HOSTILE = ["plain", "with blank", "quote'\"s", "ümlaut-日本", "percent%20", "-dash", "new\nline", "a" * 100]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_folder_of_any_name_takes_every_file(tmp_path: Path, name: str) -> None:
    paths = SweepPaths(tmp_path / name)
    write_json(paths.result("k1"), {"a": 1})
    append_line(paths.ledger, {"key": "k1"})
    write_bytes(paths.importance("k1"), b"x")
    assert paths.result("k1").read_text() == '{\n "a": 1\n}'
    assert read_lines(paths.ledger) == [{"key": "k1"}]


def test_every_path_lies_below_out_and_none_is_another(tmp_path: Path) -> None:
    paths = SweepPaths(tmp_path)
    found = [getattr(paths, name) for name in vars(SweepPaths) if isinstance(vars(SweepPaths)[name], property)]
    found += [paths.baseline("k"), paths.importance("k"), paths.trial("k"), paths.result("k"), paths.log("k")]
    assert len(set(found)) == len(found)
    assert all(tmp_path in path.parents for path in found)
    assert paths.result("k").parent == paths.trial("k")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model.fqs"
    write_bytes(target, b"old")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_bytes(target, b"new and longer")
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["model.fqs"]


def test_a_written_file_can_be_read_by_others(tmp_path: Path) -> None:
    write_bytes(tmp_path / "deep" / "er" / "file", b"x")
    assert os.stat(tmp_path / "deep" / "er" / "file").st_mode & 0o777 == 0o644


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_never_written(tmp_path: Path, number: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "result.json", {"loss": number})
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_line(tmp_path / "ledger.jsonl", {"loss": number})
    assert not (tmp_path / "result.json").exists()
    assert read_lines(tmp_path / "ledger.jsonl") == []


def test_a_line_cut_short_by_a_crash_loses_only_itself(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    for number in range(3):
        append_line(ledger, {"number": number})
    content = ledger.read_bytes()
    for cut in range(1, 15):
        ledger.write_bytes(content[:-cut])
        append_line(ledger, {"number": 9})
        kept = [line["number"] for line in read_lines(ledger)]
        # Without its last byte alone the third line is whole: only the line's end is missing.
        assert kept == ([0, 1, 2, 9] if cut == 1 else [0, 1, 9])


def test_text_in_a_line_may_hold_line_ends_of_any_kind(tmp_path: Path) -> None:
    value = {"title": "a\nb\u2028c\x85d\r"}
    append_line(tmp_path / "l", value)
    append_line(tmp_path / "l", value)
    assert read_lines(tmp_path / "l") == [value, value]


def test_lines_that_are_no_mapping_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "l").write_bytes(b'[1]\n{"a": 1}\nnot json\n\xff\xfe\n')
    assert read_lines(tmp_path / "l") == [{"a": 1}]


def test_a_missing_file_has_no_lines(tmp_path: Path) -> None:
    assert read_lines(tmp_path / "absent") == []


def _count_up(path: Path) -> None:
    for _ in range(20):
        with locked(path):
            number = int(path.read_text())
            time.sleep(0.001)
            path.write_text(str(number + 1))


def test_of_several_processes_one_at_a_time_holds_the_lock(tmp_path: Path) -> None:
    counter = tmp_path / "deep" / "counter"
    with locked(counter):
        counter.write_text("0")
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_count_up, args=(counter,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert counter.read_text() == "60"


def test_of_two_attempts_at_a_trial_the_first_whole_result_stands(tmp_path: Path) -> None:
    paths = SweepPaths(tmp_path)
    orphan, second = AttemptPaths(tmp_path, attempt="1-10"), AttemptPaths(tmp_path, attempt="2-11")
    write_bytes(orphan.trial("k") / "model.fqs", b"orphan, half done")
    write_bytes(second.trial("k") / "model.fqs", b"second")
    write_json(second.result("k"), {"attempt": 2})
    assert publish(second.trial("k"), paths.trial("k"), last="result.json")
    write_json(orphan.result("k"), {"attempt": 1})
    assert not publish(orphan.trial("k"), paths.trial("k"), last="result.json")
    assert (paths.trial("k") / "model.fqs").read_bytes() == b"second"
    assert [path.name for path in (tmp_path / "trials").iterdir()] == ["k"]


def test_a_leftover_without_a_result_gives_way(tmp_path: Path) -> None:
    paths, own = SweepPaths(tmp_path), AttemptPaths(tmp_path, attempt="2-11")
    write_bytes(paths.trial("k") / "model.fqs", b"cut off")
    write_json(own.result("k"), {"attempt": 2})
    assert publish(own.trial("k"), paths.trial("k"), last="result.json")
    assert [path.name for path in paths.trial("k").iterdir()] == ["result.json"]
