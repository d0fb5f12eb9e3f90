"""The addresses that a server of a run listens on, and the names by which it is asked."""

from __future__ import annotations

import ipaddress

from paceline.errors import ConfigError


def refused_address(verb: str, host: str, port: int, error: Exception) -> ConfigError:
    """The error for an address that `paceline VERB` cannot listen on."""
    other = port + 1 if 0 < port < 65535 else 8001
    return ConfigError(
        f"paceline {verb} cannot listen on {host}, port {port} ({error}).",
        why="The port is taken, or the address is not of this machine.",
        next=f"choose another port, such as paceline {verb} RUN --port {other}; "
        "without --host it listens on this machine's own address.",
    )


def names_this_machine(host: str) -> bool:
    """Whether a request's Host header is a loopback address or localhost, with or without a port."""
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
    return name in ("", "localhost") or is_loopback(name.strip("[]"))


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
