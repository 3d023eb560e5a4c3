"""A real web server on this machine that misbehaves as told."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

UNSAID = -1


@dataclass
class Site:
    """What the server holds and how it answers.

    Attributes:
        files: path -> content.
        faults: path -> faults of the next answers, used up one by one: a status, ``cut`` (half of the body, then
            the connection is closed), ``stall`` (half of it, then silence) or an address to ask in its place.
        ranges: whether ranges are served.
        coded: whether bodies are compressed, which nobody asked for.
        announced: path -> a Content-Length that is not true; ``UNSAID``: none is sent, the body ends when the
            connection does.
        asked: (path, Range header) of every request.
        most_at_once: largest number of requests that waited for their answer at a time.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, list[int | str]] = field(default_factory=dict)
    ranges: bool = True
    etag: str | None = '"one"'
    coded: bool = False
    announced: dict[str, int] = field(default_factory=dict)
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    stall_s: float = 1.0
    pause_s: float = 0.0
    most_at_once: int = 0
    url: str = ""
    _busy: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def counted(self) -> Iterator[None]:
        with self._lock:
            self._busy += 1
            self.most_at_once = max(self.most_at_once, self._busy)
        try:
            yield
        finally:
            with self._lock:
                self._busy -= 1


@contextmanager
def serving(site: Site) -> Iterator[Site]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.lstrip("/")
            asked = self.headers.get("Range")
            site.asked.append((path, asked))
            # Not while it answers: who has the whole answer may ask again before this thread is told of its end.
            with site.counted():
                time.sleep(site.pause_s)
            queue = site.faults.get(path, [])
            fault = queue.pop(0) if queue else None
            if isinstance(fault, int) or path not in site.files:
                self.send_response(fault if isinstance(fault, int) else 404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if fault is not None and fault.startswith("http"):
                self.send_response(302)
                self.send_header("Location", fault)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self._send(site.files[path], asked, fault, site.announced.get(path))

        def _send(self, content: bytes, asked: str | None, fault: object, announced: int | None) -> None:
            start = 0
            same = self.headers.get("If-Range") in (None, site.etag)
            if asked and site.ranges and same:
                start = int(asked.removeprefix("bytes=").rstrip("-"))
                if start >= len(content):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(content)}")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            else:
                self.send_response(200)
            body = content[start:]
            if site.coded:
                body = gzip.compress(body)
                self.send_header("Content-Encoding", "gzip")
            if site.etag is not None:
                self.send_header("ETag", site.etag)
            if announced != UNSAID:
                self.send_header("Content-Length", str(announced or len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if fault in ("cut", "stall") else body)
            self.wfile.flush()
            if fault == "stall":
                time.sleep(site.stall_s)
            self.close_connection = fault is not None or announced is not None

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield site
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
