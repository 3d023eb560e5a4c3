"""Downloads against a real server that cuts, stalls, refuses and lies."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fqsweep.data.download import (
    DownloadError,
    Patience,
    check_md5,
    download_file,
    open_session,
    part_of,
    require_room,
)
from fqsweep.errors import InputError
from tests.data.faulty_server import Site, serving

CONTENT = np.random.default_rng(0).bytes(1_000_003)
HASTY = Patience(connect_s=5, read_s=5, attempts=3, pause_s=0.01, longest_pause_s=0.02)
IMPATIENT = replace(HASTY, read_s=0.3)  # for silence; elsewhere a busy machine would be taken for it


@pytest.fixture
def site() -> Iterator[Site]:
    with serving(Site(files={"big.zip": CONTENT})) as running:
        yield running


def fetch(site: Site, target: Path, *, patience: Patience = HASTY, **options: object) -> None:
    with open_session() as session:
        download_file(session, f"{site.url}/{target.name}", target, patience=patience, **options)  # type: ignore[arg-type]


def test_a_file_comes_whole_with_its_progress(site: Site, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    fetch(site, tmp_path / "big.zip", on_progress=lambda done, total: seen.append((done, total)))
    assert (tmp_path / "big.zip").read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT)) and len(seen) > 10
    assert [path.name for path in tmp_path.iterdir()] == ["big.zip"]


@pytest.mark.parametrize("fault", ["cut", "stall"])
def test_a_broken_connection_is_resumed_at_its_byte(site: Site, tmp_path: Path, fault: str) -> None:
    site.faults["big.zip"] = [fault, fault]
    fetch(site, tmp_path / "big.zip", patience=IMPATIENT if fault == "stall" else HASTY)
    assert (tmp_path / "big.zip").read_bytes() == CONTENT
    starts = [int(asked.removeprefix("bytes=").rstrip("-")) for _, asked in site.asked if asked]
    assert len(starts) == 2 and 300_000 < starts[0] < starts[1] < len(CONTENT)


def test_a_new_call_goes_on_where_the_last_one_was_ended(site: Site, tmp_path: Path) -> None:
    def stop(done: int, _total: int) -> None:
        if done > 500_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(site, tmp_path / "big.zip", on_progress=stop)
    assert not (tmp_path / "big.zip").exists()
    have = part_of(tmp_path / "big.zip").stat().st_size
    fetch(site, tmp_path / "big.zip")
    assert (tmp_path / "big.zip").read_bytes() == CONTENT
    assert site.asked[-1] == ("big.zip", f"bytes={have}-")


def test_a_part_that_is_whole_already_is_taken_as_it_is(site: Site, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(site, tmp_path / "big.zip", on_progress=stop)
    fetch(site, tmp_path / "big.zip")
    assert (tmp_path / "big.zip").read_bytes() == CONTENT
    assert site.asked[-1] == ("big.zip", f"bytes={len(CONTENT)}-")


def test_a_part_longer_than_the_file_is_thrown_away(site: Site, tmp_path: Path) -> None:
    part_of(tmp_path / "big.zip").write_bytes(CONTENT + b"more")
    fetch(site, tmp_path / "big.zip")
    assert (tmp_path / "big.zip").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("etag", "later"), [('"one"', '"two"'), ('W/"one"', 'W/"two"'), (None, None), (None, '"two"')]
)
def test_a_file_that_changed_on_the_server_is_fetched_anew(
    site: Site, tmp_path: Path, etag: str | None, later: str | None
) -> None:
    """By a strong mark, by a weak one, and without any by its size."""
    site.faults["big.zip"], site.etag = ["cut", 404], etag
    with pytest.raises(DownloadError, match="404"):
        fetch(site, tmp_path / "big.zip")
    assert part_of(tmp_path / "big.zip").stat().st_size > 0
    other = CONTENT[::-1] if etag else CONTENT[::-1] + b"more"
    site.files["big.zip"], site.etag = other, later
    fetch(site, tmp_path / "big.zip")
    assert (tmp_path / "big.zip").read_bytes() == other


@pytest.mark.parametrize("etag", ['W/"one"', None])
def test_a_server_without_a_strong_mark_is_gone_on_with_all_the_same(
    site: Site, tmp_path: Path, etag: str | None
) -> None:
    site.faults["big.zip"], site.etag = ["cut"], etag
    fetch(site, tmp_path / "big.zip")
    assert (tmp_path / "big.zip").read_bytes() == CONTENT
    assert len(site.asked) == 2 and site.asked[1][1] is not None


def test_a_part_of_which_nothing_is_known_is_not_gone_on_with(site: Site, tmp_path: Path) -> None:
    part_of(tmp_path / "big.zip").write_bytes(b"of an older file")
    fetch(site, tmp_path / "big.zip")
    assert (tmp_path / "big.zip").read_bytes() == CONTENT
    assert site.asked == [("big.zip", None)]


def test_a_server_without_ranges_sends_it_all_again(site: Site, tmp_path: Path) -> None:
    site.ranges, site.faults["big.zip"] = False, ["cut"]
    fetch(site, tmp_path / "big.zip")
    assert (tmp_path / "big.zip").read_bytes() == CONTENT
    assert len(site.asked) == 2


def test_a_busy_server_is_asked_again(site: Site, tmp_path: Path) -> None:
    site.faults["big.zip"] = [500, 503]
    fetch(site, tmp_path / "big.zip")
    assert (tmp_path / "big.zip").read_bytes() == CONTENT
    site.faults["big.zip"] = [429] * 9
    (tmp_path / "big.zip").unlink()
    with pytest.raises(DownloadError, match=r"answers 429 .*\(tried 3 times\)") as caught:
        fetch(site, tmp_path / "big.zip")
    assert caught.value.kind == "failed"


def test_a_missing_file_is_not_asked_for_twice(site: Site, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"other\.zip: the server answers 404") as caught:
        fetch(site, tmp_path / "other.zip")
    assert caught.value.kind == "gone"
    assert len(site.asked) == 1


def test_a_length_that_is_never_reached_is_given_up_with_what_came_kept(site: Site, tmp_path: Path) -> None:
    site.announced["big.zip"] = len(CONTENT) + 1000
    site.ranges = False
    with pytest.raises(DownloadError, match=r"tried 3 times\); [\d,]+ bytes are kept"):
        fetch(site, tmp_path / "big.zip")
    assert not (tmp_path / "big.zip").exists()


def test_a_server_that_cuts_every_body_and_goes_on_with_none_is_given_up(site: Site, tmp_path: Path) -> None:
    site.faults["big.zip"] = ["cut", 416] * 9
    with pytest.raises(DownloadError, match="tried 3 times"):
        fetch(site, tmp_path / "big.zip")
    assert len(site.asked) == 4


def test_a_body_that_is_coded_though_nobody_asked_is_taken_whole(site: Site, tmp_path: Path) -> None:
    site.files["big.zip"], site.coded, site.faults["big.zip"] = bytes(10_000_000), True, ["cut"]
    fetch(site, tmp_path / "big.zip")
    assert (tmp_path / "big.zip").read_bytes() == bytes(10_000_000)
    assert len(site.asked) == 3, "cut, gone on with in vain, and whole"


@pytest.mark.parametrize("where", ["ring", "http://[foo/x.jpg", "http://127.0.0.1:99999/"])
def test_an_address_that_leads_nowhere_is_gone(site: Site, tmp_path: Path, where: str) -> None:
    site.faults["big.zip"] = [f"{site.url}/big.zip" if where == "ring" else where] * 99
    with pytest.raises(DownloadError, match=r"/big\.zip: ") as caught:
        fetch(site, tmp_path / "big.zip")
    assert caught.value.kind == "gone"


def test_a_proxy_that_cannot_be_says_nothing_about_the_file(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http:///proxy")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with pytest.raises(DownloadError, match="proxy") as caught:
        fetch(site, tmp_path / "big.zip")
    assert caught.value.kind == "failed"


def test_a_server_that_is_away_is_unreachable(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="tried 3 times") as caught:
        fetch(Site(url="http://127.0.0.1:9"), tmp_path / "big.zip")
    assert caught.value.kind == "unreachable"


def test_another_content_than_the_published_one_is_deleted(site: Site, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="its MD5 is .* in place of 00") as caught:
        fetch(site, tmp_path / "big.zip", check_file=lambda path: check_md5(path, "00"))
    assert caught.value.kind == "changed"
    assert list(tmp_path.iterdir()) == []


def test_what_the_disk_cannot_hold_is_not_begun(site: Site, tmp_path: Path) -> None:
    site.announced["big.zip"] = 10**16
    with pytest.raises(InputError, match=r"needs 10,000,000,000,000,000 bytes for it but has [\d,]+ free"):
        fetch(
            site,
            tmp_path / "big.zip",
            check_size=lambda rest, _total: require_room(tmp_path, rest, what="it"),
        )
    assert list(tmp_path.iterdir()) == []
