"""The address of a ledger's server: checked, completed from the environment, told without its secrets.

    redis://HOST:PORT/DATABASE      rediss://... (TLS)      unix:///PATH?db=DATABASE

User and password may stand before the host as USER:PASSWORD@, or in the environment, where no file shows
them (PACELINE_REDIS_USER, PACELINE_REDIS_PASSWORD). Certificates: `?ssl_ca_certs=FILE`, `ssl_certfile`,
`ssl_keyfile`. Standard library only.
"""

from __future__ import annotations

import os
import re
from urllib.parse import parse_qs

from paceline.errors import ConfigError

ADDRESS = re.compile(r"(rediss?|unix)://(?:([^/?#@\s]*)@)?([^/?#@\s]*)(/[^?#@]*)?(\?[^#@]*)?")
HOST = re.compile(r"(?:\[[0-9a-fA-F:.]+\]|[^\[\]:]+)(?::(\d{1,5}))?")
OPTIONS = ("db", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
IN_ENVIRONMENT = "PACELINE_REDIS_URL"


def checked(url: str) -> str:
    """The address as it is. Raises ValueError, which shows none of it, if it is none."""
    found = ADDRESS.fullmatch(url)
    if found is None:
        raise ValueError(
            "an address is redis://HOST:PORT/DATABASE, rediss://... or unix:///PATH?db=DATABASE; write / ? # "
            "@ and : of a user or a password as %2F %3F %23 %40 and %3A"
        )
    scheme, _, host, path, options = found.groups()
    given = parse_qs((options or "")[1:], keep_blank_values=True)
    if given.keys() - set(OPTIONS):
        raise ValueError(f"the options of an address are {', '.join(OPTIONS)}")
    if len(given.get("db", [])) + (scheme != "unix" and (path or "/") != "/") > 1:
        raise ValueError("an address names its database once")
    if scheme == "unix":
        if host or not path:
            raise ValueError("the address of a socket is unix:///PATH?db=DATABASE")
    elif not HOST.fullmatch(host) or not re.fullmatch(r"(/\d*)?", path or ""):
        raise ValueError("an address is redis://HOST:PORT/DATABASE, and a database is a number")
    return url


def told(url: str) -> str:
    """The address without user and password."""
    return re.sub(r"://[^/?#]*@", "://", url)


def complete(url: str | None) -> str:
    """The address, or that of the environment. Raises ConfigError if there is none.

    The environment's user and password are given to the server for which it names them, and to no other.
    """
    given = _of_environment()
    if url is None and given is None:
        raise ConfigError(
            "The run's ledger is on a server, and nothing says on which.",
            next=f"set ledger.url in the run file, or {IN_ENVIRONMENT}, to redis://HOST:PORT/DATABASE.",
        )
    return given if given is not None and url in (None, told(given)) else str(url)


def _of_environment() -> str | None:
    url = os.environ.get(IN_ENVIRONMENT)
    try:
        return checked(url) if url else None
    except ValueError as error:
        raise ConfigError(
            f"{IN_ENVIRONMENT} in the environment is no address: {error}.",
            next=f"correct or unset {IN_ENVIRONMENT}.",
        ) from None
