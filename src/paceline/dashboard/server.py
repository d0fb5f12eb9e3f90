"""Serves the dashboard: one page, and what runs do as JSON and as server-sent events."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import uvicorn
from anyio import sleep, to_thread
from msgspec.structs import replace
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from paceline.dashboard.access import Access, check_token
from paceline.dashboard.runs import Runs, RunShown
from paceline.errors import PacelineError, explained
from paceline.monitoring.addresses import refused_address

PAGE = Path(__file__).parent / "page"
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
LOOK_S, STILL_S = 1.0, 15.0  # between two looks; after so long without news a line says that all is well
CONNECTIONS_MAX = 100
QUERY_MAX = 500  # characters of a sample's id


def dashboard(runs: Runs, host: str, token: str | None) -> ASGIApp:
    """The application. `host`: what it will listen on."""

    async def listed(request: Request) -> Response:
        return _json(await to_thread.run_sync(runs.shown, _opened(request)))

    async def events(request: Request) -> Response:
        return StreamingResponse(_told(runs, _opened(request)), media_type="text/event-stream")

    async def history(request: Request) -> Response:
        run = request.path_params["run"]
        return await _answered(lambda: runs.find(run).history())

    async def answers(request: Request) -> Response:
        run = request.path_params["run"]
        return await _answered(lambda: runs.find(run).answers())

    async def step(request: Request) -> Response:
        run, number = request.path_params["run"], request.path_params["step"]
        return await _answered(lambda: runs.find(run).step(number))

    async def samples(request: Request) -> Response:
        run, sample = request.path_params["run"], request.query_params.get("id", "")[:QUERY_MAX]
        return await _answered(lambda: runs.find(run).samples(sample))

    app = Starlette(
        routes=[
            Route("/api/runs", listed),
            Route("/api/events", events),
            Route("/api/runs/{run}/history", history),
            Route("/api/runs/{run}/answers", answers),
            Route("/api/runs/{run}/steps/{step:int}", step),
            Route("/api/runs/{run}/samples", samples),
            *(_file(f"/{path.name}", path) for path in sorted(PAGE.iterdir()) if path.suffix in KINDS),
            _file("/", PAGE / "index.html"),
            _file("/login", PAGE / "login.html"),
        ]
    )
    return Access(app, host, token)


def serve(app: ASGIApp, listening: socket.socket) -> None:
    """Until Ctrl-C."""
    config = uvicorn.Config(
        app,
        log_level="critical",
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        limit_concurrency=CONNECTIONS_MAX,
        timeout_graceful_shutdown=1,
    )
    uvicorn.Server(config).run(sockets=[listening])


def listen(host: str, port: int, token: str | None) -> socket.socket:
    """`port` 0: a free one. Raises ConfigError if it cannot, or should not, listen there."""
    check_token(host, token)
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise refused_address("dashboard", host, port, error) from error


async def _told(runs: Runs, opened: str) -> AsyncIterator[bytes]:
    """All runs whenever something about them is new."""
    last, silent_s = b"", 0.0
    while True:
        shown = await to_thread.run_sync(runs.shown, opened)
        now = msgspec.json.encode([_timeless(one) for one in shown])
        if now != last:
            yield b"event: runs\ndata: " + msgspec.json.encode(shown) + b"\n\n"
            last, silent_s = now, 0.0
        elif silent_s >= STILL_S:
            yield b": still here\n\n"
            silent_s = 0.0
        await sleep(LOOK_S)
        silent_s += LOOK_S


def _timeless(one: RunShown) -> RunShown:
    """Without the moment of the look, which is new each time."""
    return one if one.status is None else replace(one, status=replace(one.status, time=0.0))


async def _answered(read: Any) -> Response:
    """What `read` returns; an error as it is told on a command line."""
    try:
        return _json(await to_thread.run_sync(read))
    except Exception as error:  # noqa: BLE001 (it is shown)
        told: PacelineError = explained(error)
        return _json({"what": told.what, "why": told.why, "next": told.next}, 404)


def _opened(request: Request) -> str:
    return request.query_params.get("run", "")


def _json(content: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")


def _file(address: str, path: Path) -> Route:
    content, kind = path.read_bytes(), KINDS[path.suffix]

    async def read(_: Request) -> Response:
        return Response(content, media_type=kind)

    return Route(address, read)
