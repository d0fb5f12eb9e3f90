"""Serves a run's metrics over HTTP, at /metrics: one page, for a scraper."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock

from paceline.monitoring.addresses import is_loopback, names_this_machine, refused_address
from paceline.monitoring.metrics import CONTENT_TYPE

FRESH_S = 1.0  # however often it is asked, the run is read once in this time
REQUEST_S = 10.0


class MetricsServer(ThreadingHTTPServer):
    """Call `serve_forever`. On a loopback address it answers only requests that name this machine."""

    daemon_threads = True

    def __init__(self, host: str, port: int, page: Callable[[], str]) -> None:
        """`port` 0: a free one. `page`: the exposition. Raises ConfigError if it cannot listen there."""
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._page, self._read_at, self._text, self._lock = page, -FRESH_S, "", Lock()
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise refused_address("metrics", host, port, error) from error
        self.is_loopback = is_loopback(str(self.server_address[0]))

    @property
    def url(self) -> str:
        host = str(self.server_address[0])
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_port}/metrics"

    def page(self) -> str:
        with self._lock:
            if time.monotonic() - self._read_at >= FRESH_S:
                self._text, self._read_at = self._page(), time.monotonic()
            return self._text

    def handle_error(self, request: object, client_address: object) -> None:
        """A scraper that went away is no event."""


class _Handler(BaseHTTPRequestHandler):
    timeout = REQUEST_S
    server: MetricsServer
    server_version, sys_version = "paceline", ""

    def do_GET(self) -> None:
        """The page, or what is wrong with the request."""
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(404, "The metrics are at /metrics")
        elif self.server.is_loopback and not names_this_machine(self.headers.get("Host", "")):
            # Else any web page could have a browser of this machine read them under a name of its own.
            self.send_error(403, "Ask for 127.0.0.1 or localhost")
        else:
            data = self.server.page().encode()
            self.send_response(200)
            self.send_header("Content-Type", CONTENT_TYPE)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Not a line for every scrape."""
