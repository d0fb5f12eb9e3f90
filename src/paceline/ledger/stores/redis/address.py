"""Where the server is, and how to log in: from a URL and the environment, never shown."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from paceline.errors import ConfigError

try:
    from redis import connection as transport
    from redis.backoff import NoBackoff
    from redis.retry import Retry
except ImportError as error:
    raise ConfigError(
        "A ledger on a Redis or Valkey server needs a package that is not installed.",
        next="pip install 'paceline[redis]'",
    ) from error

USER, PASSWORD = "PACELINE_REDIS_USER", "PACELINE_REDIS_PASSWORD"
CONNECT_S, REPLY_S = 10.0, 30.0
FORMS = "redis://HOST:PORT/0, rediss://HOST:PORT/0 (TLS) or unix:///PATH"


class Address:
    """A server's URL, taken apart. Its text leaves out user, password and options."""

    def __init__(self, url: str, environment: Mapping[str, str] = os.environ) -> None:
        """Raises ConfigError for a URL that cannot be read; the message does not repeat it."""
        try:
            options: dict[str, Any] = transport.parse_url(url)
            self._text = _shown(url, options.get("db"))
            self._kind = options.pop("connection_class", transport.Connection)
            options.setdefault("username", environment.get(USER))
            options.setdefault("password", environment.get(PASSWORD))
            options.setdefault("socket_connect_timeout", CONNECT_S)
            options.setdefault("socket_timeout", REPLY_S)
            # Retries and what may be repeated are this package's business.
            options |= {"protocol": 2, "retry": Retry(NoBackoff(), 0), "decode_responses": False}
            self._options = options
            self.connection()
        except (ValueError, TypeError, AttributeError, OSError):
            raise unreadable() from None

    def connection(self) -> Any:
        """A connection of redis-py, not connected yet."""
        return self._kind(**self._options)

    def __str__(self) -> str:
        return self._text

    __repr__ = __str__


def address_of(url: str) -> str:
    """The URL without user, password and options, for logs, events, errors and `status`."""
    return str(Address(url))


def _shown(url: str, database: int | None) -> str:
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return f"unix://{parts.path}" + (f"?db={database}" if database else "")
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or "localhost"
    return f"{parts.scheme}://{host}:{parts.port or 6379}" + ("" if database is None else f"/{database}")


def unreadable() -> ConfigError:
    return ConfigError(
        "The URL of the ledger's server cannot be read.",
        why="It may hold a password, so it is not shown here.",
        next=f"write it as {FORMS}, with special characters of user and password as %XX, or put those into "
        f"{USER} and {PASSWORD}.",
    )
