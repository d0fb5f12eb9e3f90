"""What the stand-ins of inference servers share: loopback HTTP, a key, and faults that tests ask for."""

from __future__ import annotations

import json
import threading
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


class StandInServer(ThreadingHTTPServer):
    """`misbehave(how)` makes the next answers wrong; requests must carry `key`, if it is not empty."""

    def __init__(self, handler: type[StandInHandler], *, key: str = "", port: int = 0) -> None:
        self.key = key
        self._faults: Counter[str] = Counter()
        self._lock = threading.Lock()
        super().__init__(("127.0.0.1", port), handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def start(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def misbehave(self, how: str, times: int = 1) -> None:
        """`how`: one of the names in the server's file; the next `times` answers are such."""
        with self._lock:
            self._faults[how] += times

    def takes(self, how: str) -> bool:
        with self._lock:
            found = self._faults[how] > 0
            self._faults[how] -= found
        return found


class StandInHandler(BaseHTTPRequestHandler):
    server: StandInServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def get(self) -> None:
        """Answer a GET request that does not ask for the server's health."""

    def post(self, body: Any) -> None:
        """Answer a POST request that carries the key."""

    def do_GET(self) -> None:
        if self.path == "/health":
            self.answer(503 if self.server.takes("sick") else 200, {})
        else:
            self.get()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.knows_key():
            self.post(body)

    def knows_key(self) -> bool:
        """Whether the request carries the server's key; answers it if not."""
        key = self.server.key
        if key and self.headers.get("Authorization", "") != f"Bearer {key}":
            self.answer(401, {"error": "Unauthorized"})
            return False
        return True

    def answer(self, status: int, body: Any) -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.close_connection = True
        with suppress(ConnectionError):  # the client may have given up
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(data)
