"""Whether a master and this host's Mooncake do what the store needs: asked by a small object. No torch."""

from __future__ import annotations

import ctypes
import secrets
import time
from typing import Any

from paceline.errors import StoreError
from paceline.features.settings import MooncakeSection
from paceline.features.stores.mooncake.link import connect, installed_version, own_address

OBJECT_BYTES, SEGMENT_MIB, PATIENCE_S = 1 << 20, 16, 5.0


def examined(section: MooncakeSection) -> dict[str, Any]:
    """The version, the address that others are told, and the milliseconds of a put and a get.

    Raises ConfigError, StoreError.
    """
    link = connect(section, SEGMENT_MIB, patience_s=PATIENCE_S)
    key, content = f"paceline-doctor/{secrets.token_hex(8)}", secrets.token_bytes(OBJECT_BYTES)
    memory = ctypes.create_string_buffer(content, OBJECT_BYTES)
    address = ctypes.addressof(memory)
    try:
        link.register(address, OBJECT_BYTES)
        began = time.monotonic()
        link.put(key, address, OBJECT_BYTES)
        ctypes.memset(address, 0, OBJECT_BYTES)
        stored = time.monotonic()
        [code] = link.get([key], [address], [OBJECT_BYTES])
        ended = time.monotonic()
        if code != OBJECT_BYTES or memory.raw != content:
            raise _not_the_same(section.master, code)
        link.remove([key])
        link.unregister(address)
    finally:
        link.close()
    return {
        "version": installed_version(),
        "address": section.host or own_address(section.master),
        "put_ms": round(1e3 * (stored - began), 2),
        "get_ms": round(1e3 * (ended - stored), 2),
    }


def _not_the_same(master: str, code: int) -> StoreError:
    return StoreError(
        f"An object came back from the Mooncake master {master} with other bytes, or not at all "
        f"(code {code}).",
        why="Every sample would be lost, and captured again and again.",
        next="use one version of Mooncake everywhere, and look into the master's log.",
    )
