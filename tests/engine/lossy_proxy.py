"""A way to a server on which replies get lost, as they do when a server dies after it has done what was asked."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class LossyProxy:
    """Hands every request on to a server; of those that ``loses`` says, the reply is cut off, the first time."""

    def __init__(self, target: str, *, loses: Callable[[str, dict[str, Any]], str | None]) -> None:
        """Start to listen.

        Args:
            target: address of the server, without a slash at its end.
            loses: path and JSON body of a request -> what it is of which one reply gets lost, or None.
        """
        self.lost: set[str] = set()
        lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "connection")}
                request = urllib.request.Request(
                    target + self.path, data=body or None, headers=headers, method=self.command
                )
                try:
                    with urllib.request.urlopen(request, timeout=20) as reply:
                        status, kind, said = reply.status, reply.headers.get("Content-Type"), reply.read()
                except urllib.error.HTTPError as error:
                    status, kind, said = error.code, error.headers.get("Content-Type"), error.read()
                except OSError:  # the server is away, and so is the way to it
                    self.close_connection = True
                    return
                name = (
                    loses(self.path, json.loads(body)) if self.headers.get_content_subtype() == "json" else None
                )
                with lock:
                    cut = name is not None and name not in proxy.lost
                    if cut:
                        proxy.lost.add(str(name))
                if cut:
                    self.close_connection = True
                    return
                self.send_response(status)
                if kind:
                    self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(said)))
                self.end_headers()
                self.wfile.write(said)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any  # noqa: N815

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
