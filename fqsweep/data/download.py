"""Fetch one file over HTTP: resumed where it was cut, tried again where that is worthwhile, moved in place whole.

A download in progress is ``<name>.part``, with its server's marks of the content (ETag, Last-Modified, size) in
``<name>.part.mark``: a file that changed on the server meanwhile is fetched anew and not patched together. Where a
server tells no more than the size, another file of that size would pass; a part without any mark is begun anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import requests

from fqsweep import __version__
from fqsweep.errors import InputError

OnBytes = Callable[[int, int], None]
CHUNK_BYTES = 1 << 16
GONE_STATUS = frozenset({401, 403, 404, 410, 451})
BUSY_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_NETWORK_ERRORS = (
    requests.ConnectionError,
    requests.Timeout,
    requests.exceptions.ChunkedEncodingError,
    requests.exceptions.ContentDecodingError,
)
# Of the address that was asked for, or of one that it led to: another try changes nothing.
_BAD_ADDRESS = (
    requests.exceptions.InvalidURL,
    requests.exceptions.MissingSchema,
    requests.exceptions.InvalidSchema,
    requests.TooManyRedirects,
)


class DownloadError(RuntimeError):
    """A file could not be fetched; ``kind`` says whether trying again later is worthwhile.

    ``gone``: the server has no such file or does not give it; ``changed``: what came is not the file that was
    asked for; ``unreachable``: there was no answer; ``failed``: it broke off, or the server was busy.
    """

    def __init__(self, message: str, *, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


class _TryAgain(Exception):
    def __init__(self, reason: str, *, after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.after_s = after_s


@dataclass(frozen=True)
class _Mark:
    """What a server says of a file's content.

    Attributes:
        validator: what it may be asked with, a strong ETag or the time of the last change; empty where there is none.
        etag: a weak one too, which it may not be asked with, but which tells contents apart (RFC 9110, 13.1.5).
        num_bytes: of the whole file; 0 where it does not tell.
    """

    validator: str = ""
    etag: str = ""
    num_bytes: int = 0

    @classmethod
    def of(cls, response: requests.Response, num_bytes: int) -> _Mark:
        etag = response.headers.get("ETag", "")
        strong = etag if not etag.startswith("W/") else ""
        return cls(strong or response.headers.get("Last-Modified", ""), etag, num_bytes)

    def allows(self, other: _Mark) -> bool:
        """Whether the answer to a request with ``validator`` may be of the same content, by what both say."""
        said = [(self.etag, other.etag), (self.validator, other.validator), (self.num_bytes, other.num_bytes)]
        compared = [own == theirs for own, theirs in said if own and theirs]
        return all(compared) and bool(compared or self.validator)


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long is waited, and how often tried.

    Attributes:
        connect_s, read_s: no connection, or no further byte, for so long is a failure.
        attempts: failures in a row, after none of which more was there than ever before, that end the download.
        pause_s, longest_pause_s: before the second attempt; doubled each time up to the longest.
    """

    connect_s: float = 15.0
    read_s: float = 60.0
    attempts: int = 6
    pause_s: float = 1.0
    longest_pause_s: float = 60.0


def open_session() -> requests.Session:
    """A session that names itself; proxies come from the environment (``HTTPS_PROXY``)."""
    session = requests.Session()
    session.headers.update({"User-Agent": f"fqsweep/{__version__}", "Accept-Encoding": "identity"})
    return session


def download_file(
    session: requests.Session,
    url: str,
    target: Path,
    *,
    patience: Patience,
    check_size: Callable[[int, int], None] = lambda _rest, _total: None,
    check_file: Callable[[Path], None] = lambda _path: None,
    on_progress: OnBytes | None = None,
) -> None:
    """Fetch ``url`` to ``target``, which appears only when it is whole.

    Args:
        check_size: called with (bytes still to come, bytes in all) before any is written, where the server
            tells; raises what it thinks fit.
        check_file: called with the whole file before it is moved in place; what it refuses is deleted.
        on_progress: called with (bytes there, bytes in all, 0 where unknown).

    Raises:
        DownloadError: it cannot be had; what has come stays for the next call unless ``check_file`` refused it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part, failures = part_of(target), 0
    most_bytes = _size(part)
    while True:
        try:
            _fetch_rest(session, url, part, patience, check_size, on_progress)
            break
        except (*_NETWORK_ERRORS, _TryAgain) as error:
            failures = 0 if _size(part) > most_bytes else failures + 1
            most_bytes = max(most_bytes, _size(part))
            if failures >= patience.attempts:
                raise _given_up(url, part, error, attempts=failures) from error
            pause_s = min(patience.pause_s * 2 ** max(failures - 1, 0), patience.longest_pause_s)
            wanted_s = error.after_s if isinstance(error, _TryAgain) else 0.0
            time.sleep(max(pause_s, min(wanted_s, patience.longest_pause_s)))
        except requests.RequestException as error:
            raise DownloadError(f"{url}: {error}", kind=_kind_of(error)) from error
    try:
        check_file(part)
    except BaseException:
        _discard(part)
        raise
    os.replace(part, target)
    _mark_of(part).unlink(missing_ok=True)


def part_of(target: Path) -> Path:
    """Where a download of ``target`` in progress lies."""
    return target.with_name(target.name + ".part")


def check_md5(path: Path, md5: str) -> None:
    """Refuse a file whose content is not the one that was published.

    Raises:
        DownloadError: ``changed``.
    """
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "md5").hexdigest()
    if found != md5.lower():
        raise DownloadError(f"{path.name}: its MD5 is {found} in place of {md5}", kind="changed")


def require_room(folder: Path, needed_bytes: int, *, what: str) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        InputError: naming the folder, what is needed and what is free.
    """
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes > free_bytes:
        raise InputError(
            f"{folder} needs {needed_bytes:,} bytes for {what} but has {free_bytes:,} free; "
            "free some or choose another --data-dir"
        )


def _fetch_rest(
    session: requests.Session,
    url: str,
    part: Path,
    patience: Patience,
    check_size: Callable[[int, int], None],
    on_progress: OnBytes | None,
) -> None:
    """Append what is missing to ``part``; returns when it is whole."""
    mark = _read_mark(part)
    have = 0 if mark == _Mark() else _size(part)
    times = (patience.connect_s, patience.read_s)
    with _ask(session, url, _range_headers(mark, have), times) as response:
        if response.status_code == 416 and _total_of(response) == have:
            return
        have = _resumed_at(response, url, part, have, mark)
        length = response.headers.get("Content-Length", "")
        # Of a body that is coded, which nobody asked for, it counts other bytes; a cut one is an error all the same.
        total = have + int(length) if length.isdigit() and not _is_coded(response) else 0
        check_size(max(total - have, 0), total)
        _write_mark(part, _Mark.of(response, total))
        with part.open("ab" if have else "wb") as stream:
            for chunk in response.iter_content(CHUNK_BYTES):
                stream.write(chunk)
                have += len(chunk)
                if on_progress:
                    on_progress(have, total)
            stream.flush()
            os.fsync(stream.fileno())
    if total and have != total:
        raise _TryAgain(f"ended after {have:,} of {total:,} bytes")


def _ask(
    session: requests.Session, url: str, headers: dict[str, str], times: tuple[float, float]
) -> requests.Response:
    """The server's answer, its body still to come; what parts of requests cannot read is an ``InvalidURL``."""
    try:
        return session.get(url, headers=headers, stream=True, timeout=times)
    except requests.RequestException:
        raise
    except ValueError as error:  # of urllib, for an address that a server leads to, or of urllib3
        raise requests.exceptions.InvalidURL(f"it, or where it leads, is no address ({error})") from error


def _range_headers(mark: _Mark, have: int) -> dict[str, str]:
    if not have:
        return {}
    return {"Range": f"bytes={have}-", **({"If-Range": mark.validator} if mark.validator else {})}


def _is_coded(response: requests.Response) -> bool:
    return response.headers.get("Content-Encoding", "identity").lower() not in ("identity", "")


def _resumed_at(response: requests.Response, url: str, part: Path, have: int, mark: _Mark) -> int:
    """The byte from which this answer goes on; 0 where the server begins anew."""
    status = response.status_code
    if status in GONE_STATUS:
        raise DownloadError(f"{url}: the server answers {status} ({response.reason})", kind="gone")
    if status in BUSY_STATUS:
        wait = response.headers.get("Retry-After", "")
        raise _TryAgain(
            f"the server answers {status} ({response.reason})", after_s=float(wait) if wait.isdigit() else 0.0
        )
    if status == 200:
        return 0
    start = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    goes_on = status == 206 and start is not None and int(start[1]) == have and not _is_coded(response)
    if goes_on and mark.allows(_Mark.of(response, _total_of(response))):
        return have
    if status in (206, 416):
        _discard(part)
        raise _TryAgain(f"the server cannot go on at byte {have:,}")
    raise DownloadError(f"{url}: the server answers {status} ({response.reason})", kind="failed")


def _total_of(response: requests.Response) -> int:
    """The file's size from ``Content-Range: bytes .../N``; 0 where it is not given."""
    found = re.match(r"bytes [\d*-]+/(\d+)", response.headers.get("Content-Range", ""))
    return int(found[1]) if found else 0


def _write_mark(part: Path, mark: _Mark) -> None:
    _mark_of(part).write_text(json.dumps(asdict(mark)))


def _read_mark(part: Path) -> _Mark:
    """What was noted of a part; an empty mark where nothing was, or where it cannot be read."""
    try:
        return _Mark(**json.loads(_mark_of(part).read_text()))
    except (OSError, ValueError, TypeError):
        return _Mark()


def _given_up(url: str, part: Path, error: Exception, *, attempts: int) -> DownloadError:
    unreachable = isinstance(error, requests.ConnectionError | requests.Timeout) and _size(part) == 0
    kept = f"; {_size(part):,} bytes are kept, the same command goes on there" if _size(part) else ""
    return DownloadError(
        f"{url}: {error} (tried {attempts} times){kept}", kind="unreachable" if unreachable else "failed"
    )


def _kind_of(error: requests.RequestException) -> str:
    """What an error that is none of the network says; a proxy that cannot be says nothing about the file."""
    own = isinstance(error, requests.exceptions.InvalidProxyURL)
    return "gone" if isinstance(error, _BAD_ADDRESS) and not own else "failed"


def _mark_of(part: Path) -> Path:
    return part.with_name(part.name + ".mark")


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _mark_of(part).unlink(missing_ok=True)


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0
