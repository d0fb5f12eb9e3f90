"""Which requests may look: the Host header, the token, and what a browser may do with the page.

A page of another site can point a name of its own at this machine and have a visitor's browser ask here. Its
requests carry that name, so only this machine's names and addresses are answered. A token is never part of an
address; a browser that has given it holds a cookie of this process instead.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
import socket
from collections.abc import Mapping
from urllib.parse import parse_qs

import anyio
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from paceline.errors import ConfigError
from paceline.monitoring.addresses import is_loopback, names_this_machine

COOKIE = "paceline_dashboard"
TOKEN_LEAST, FORM_BYTES_MAX, WRONG_S = 16, 4096, 0.5
OPEN = ("/login", "/login.js", "/page.css")  # without a token
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Access:
    """Middleware. `token`: None on a loopback address only."""

    def __init__(self, app: ASGIApp, host: str, token: str | None) -> None:
        self._app, self._host, self._token = app, host, token
        self._session = secrets.token_urlsafe(32)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        answer = await self._refusal(Request(scope, receive))
        await (answer or self._app)(scope, receive, _with_headers(send))

    async def _refusal(self, request: Request) -> Response | None:
        """What is answered instead; None if the request may pass."""
        if not is_named(request.headers.get("host", ""), self._host):
            return PlainTextResponse("Ask for 127.0.0.1, localhost or this host's own name.", 403)
        if request.method == "POST" and request.url.path == "/login":
            return await self._log_in(request)
        if self._token is None or request.url.path in OPEN or self._knows(request.headers, request.cookies):
            return None
        if request.url.path == "/":
            return RedirectResponse("/login", 303)
        return PlainTextResponse("A token is needed.", 401)

    def _knows(self, headers: Mapping[str, str], cookies: Mapping[str, str]) -> bool:
        assert self._token is not None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        bears = scheme.lower() == "bearer" and is_same(given.strip(), self._token)
        return bears or is_same(cookies.get(COOKIE, ""), self._session)

    async def _log_in(self, request: Request) -> Response:
        data = b""
        async for part in request.stream():
            data += part
            if len(data) > FORM_BYTES_MAX:
                return PlainTextResponse("That is too long for a token.", 413)
        [given, *_] = parse_qs(data.decode(errors="replace")).get("token", [""])
        if self._token is None or not is_same(given.strip(), self._token):
            await anyio.sleep(WRONG_S)
            return RedirectResponse("/login?wrong=1", 303)
        answer = RedirectResponse("/", 303)
        answer.set_cookie(COOKIE, self._session, httponly=True, samesite="strict")
        return answer


def check_token(host: str, token: str | None) -> None:
    """Raises ConfigError if others could reach `host` without a token, or with one that is guessed soon."""
    if token is None and not (host == "localhost" or is_loopback(host)):
        raise ConfigError(
            f"{host} can be reached from elsewhere, and there is no token.",
            why="The dashboard shows prompts, answers and paths to every user who can reach it.",
            next="give a token with --token-file FILE or PACELINE_DASHBOARD_TOKEN; or leave out --host, and "
            "reach this machine through ssh -L",
        )
    if token is not None and len(token) < TOKEN_LEAST:
        raise ConfigError(
            f"The token has {len(token)} characters; {TOKEN_LEAST} are the least.",
            why="A short one can be guessed.",
            next="openssl rand -hex 32 > FILE makes one",
        )


def is_named(given: str, host: str) -> bool:
    """Whether the Host header `given` means this machine. `host`: what the dashboard listens on."""
    if host == "localhost" or is_loopback(host):
        return names_this_machine(given)
    name = given.rpartition(":")[0] if given.rpartition(":")[2].isdecimal() else given
    return name.lower() in {"localhost", host.lower(), socket.gethostname().lower()} or _is_address(name)


def is_same(given: str, secret: str) -> bool:
    """In a time that does not tell how much of it is right."""
    return hmac.compare_digest(given.encode(errors="replace"), secret.encode(errors="replace"))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers[name] = value
        await send(message)

    return sending
