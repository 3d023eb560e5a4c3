"""Fetch many single images politely, and report what cannot be had.

Each server is asked by a few threads at most, one request at a time each. A server that does not answer is left
alone after a few images. What failed stands in a report beside the images, and the next call tries only what is
worthwhile.
"""

from __future__ import annotations

import csv
import io
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from PIL import Image

from fqsweep.data.download import DownloadError, Patience, check_md5, download_file, open_session
from fqsweep.files import write_bytes

MAX_PHOTO_BYTES = 1 << 27
REPORT_COLUMNS = ("id", "outcome", "url", "detail")
# Outcomes that another try does not change.
FINAL_OUTCOMES = frozenset({"gone", "changed", "no address"})


@dataclass(frozen=True)
class Photo:
    """An image to fetch: ``url`` is empty where none is known, ``md5`` None where none is published."""

    id: str
    url: str
    target: Path
    md5: str | None = None


@dataclass(frozen=True)
class Failure:
    """An image that was not fetched: ``outcome`` is a ``DownloadError``'s kind or ``no address``."""

    id: str
    outcome: str
    url: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class Manners:
    """How servers are treated.

    Attributes:
        threads: in all.
        per_host: requests at a time to one server.
        pause_s: between two requests of one thread.
        strikes: images in a row without any answer after which a thread leaves its server alone.
    """

    threads: int = 8
    per_host: int = 4
    pause_s: float = 0.05
    strikes: int = 3


def fetch_photos(
    photos: Sequence[Photo],
    *,
    patience: Patience,
    manners: Manners,
    accept_changed: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Failure]:
    """Fetch those of ``photos`` that are not there yet; returns the others, by id.

    Args:
        accept_changed: keep an image whose MD5 is not the published one, if it is an image at all.
        on_progress: called with (images dealt with, images in all).
    """
    wanted = [photo for photo in photos if not photo.target.exists()]
    failures = [Failure(p.id, "no address", "", "the table gives no address") for p in wanted if not p.url]
    with_url = [photo for photo in wanted if photo.url]
    stop, lock, done = threading.Event(), threading.Lock(), 0

    def work(lane: Sequence[Photo]) -> None:
        nonlocal done
        for failure in _fetch_lane(lane, patience, manners, accept_changed, stop):
            with lock:
                done += 1
                if failure is not None:
                    failures.append(failure)
                if on_progress:
                    on_progress(done, len(with_url))

    pool = ThreadPoolExecutor(manners.threads)
    try:
        for future in [pool.submit(work, lane) for lane in _lanes(with_url, per_host=manners.per_host)]:
            future.result()
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
    return sorted(failures, key=lambda failure: failure.id)


def _lanes(photos: Sequence[Photo], *, per_host: int) -> list[list[Photo]]:
    """What each thread fetches, one after the other: a server's images, dealt out to ``per_host`` lanes."""
    of_host: dict[str, list[Photo]] = defaultdict(list)
    for photo in photos:
        of_host[_host_of(photo.url)].append(photo)
    lanes = [of_all[first::per_host] for first in range(per_host) for of_all in of_host.values()]
    return [lane for lane in lanes if lane]


def _host_of(url: str) -> str:
    """The server of an address; empty where it cannot be read, which the download will say."""
    try:
        return urlsplit(url).netloc
    except ValueError:
        return ""


def _fetch_lane(
    lane: Sequence[Photo], patience: Patience, manners: Manners, accept_changed: bool, stop: threading.Event
) -> Iterator[Failure | None]:
    """Fetch one after the other; yields why it failed, or None, for each."""
    strikes = 0
    with open_session() as session:
        for photo in lane:
            if stop.is_set():
                return
            if strikes >= manners.strikes:
                yield Failure(photo.id, "unreachable", photo.url, "the server did not answer before")
                continue
            try:
                download_file(
                    session,
                    photo.url,
                    photo.target,
                    patience=patience,
                    check_size=_refuse_large,
                    check_file=partial(_check_photo, photo=photo, accept_changed=accept_changed),
                )
                strikes, failure = 0, None
            except DownloadError as error:
                strikes = strikes + 1 if error.kind == "unreachable" else 0
                failure = Failure(photo.id, error.kind, photo.url, str(error))
            yield failure
            time.sleep(manners.pause_s)


def _refuse_large(_rest_bytes: int, total_bytes: int) -> None:
    if total_bytes > MAX_PHOTO_BYTES:
        raise DownloadError(f"{total_bytes:,} bytes are too many for one photograph", kind="changed")


def _check_photo(path: Path, *, photo: Photo, accept_changed: bool) -> None:
    """Refuse what is not the published image, or (``accept_changed``, or no checksum) no image at all."""
    if photo.md5 is not None and not accept_changed:
        check_md5(path, photo.md5)
        return
    try:
        with Image.open(path) as image:
            image.load()
    except Exception as error:
        raise DownloadError(f"{photo.url}: what came is no image ({error})", kind="changed") from error


def write_report(path: Path, failures: Sequence[Failure]) -> None:
    """Store what could not be fetched, one row an image; no failures, no file."""
    if not failures:
        path.unlink(missing_ok=True)
        return
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(REPORT_COLUMNS)
    writer.writerows((f.id, f.outcome, f.url, f.detail) for f in failures)
    write_bytes(path, stream.getvalue().encode())


def read_report(path: Path) -> Mapping[str, Failure]:
    """What an earlier call could not fetch, by id."""
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    return {row["id"]: Failure(row["id"], row["outcome"], row["url"], row["detail"]) for row in rows}
