"""What the store asks of Mooncake: its client's calls, what their codes mean, and when to wait. No torch.

A master that does not answer is waited for. It forgets every object when it is restarted; an object also goes
with the client in whose memory it lies. The codes are those of Mooncake's include/types.h, and what they mean
was measured on 0.3.13 (docs/decisions.md, D138).
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

from paceline.features.settings import MooncakeSection
from paceline.features.stores.mooncake.refusals import (
    away,
    closed,
    no_client,
    no_package,
    no_segment_has_room,
    refuses,
    too_old,
)

PATIENCE_S = 300.0  # with a master that is away: its user, or its service manager, starts it again
ROOM_S = 60.0  # and with memory that has no room, if that is less
LOOK_S = 0.5
CONNECT_S = 5.0
SEEN_S = 3.0  # a producer tells of itself more often
ABSENT, HALF_WRITTEN = -704, -703
AWAY = frozenset({-900, -901, -103, -601})  # no answer, or a master that does not know this client yet
NO_ROOM = frozenset({-200, -101, -1700})
WRONG_CALL = frozenset({-400, -600})
MARK = "producer"  # the key, below a store's, that says that a producer of the run is at this master


class Client(Protocol):
    """The part of mooncake.store.MooncakeDistributedStore that is used. Codes below 0 are failures."""

    def get_hostname(self) -> str: ...
    def register_buffer(self, buffer_ptr: int, size: int) -> int: ...
    def unregister_buffer(self, buffer_ptr: int) -> int: ...
    def upsert_from(self, key: str, buffer_ptr: int, size: int, config: Any) -> int: ...
    def batch_get_into(self, keys: list[str], buffer_ptrs: list[int], sizes: list[int]) -> list[int]: ...
    def batch_is_exist(self, keys: list[str]) -> list[int]: ...
    def batch_remove(self, keys: list[str], force: bool) -> list[int]: ...
    def remove_by_regex(self, regex_pattern: str, force: bool) -> int: ...
    def close(self) -> int: ...


class Link:
    """One client at one master. Any thread may call."""

    def __init__(
        self,
        client: Client,
        pinned: Any,
        master: str,
        *,
        patience_s: float = PATIENCE_S,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`pinned`: the ReplicateConfig of every object."""
        self._open_client: Client | None = client
        self._pinned, self.master = pinned, master
        self._patience_s, self._sleep, self._clock = patience_s, sleep, clock
        self._silent_since: float | None = None  # the first call since then that the master did not answer

    @property
    def _client(self) -> Client:
        """A call of a client that was closed would end the process. Raises StoreError."""
        if self._open_client is None:
            raise closed(self.master)
        return self._open_client

    def register(self, address: int, size: int) -> None:
        """Let the client read from and write to this memory. Raises StoreError."""
        if code := self._client.register_buffer(address, size):
            raise refuses(self.master, "register", f"{size} bytes of memory", code)

    def unregister(self, address: int) -> None:
        if self._open_client is not None:
            self._open_client.unregister_buffer(address)

    def put(self, key: str, address: int, size: int) -> None:
        """Store an object, in place of one that has the key or was half-written under it.

        `size`: at least 1. Raises StoreFullError, StoreError. A segment may have died since the master heard
        of it, so every failure that may pass is tried again.
        """
        began = self._clock()
        while code := self._client.upsert_from(key, address, size, self._pinned):
            waited_s = self._clock() - began
            if code in WRONG_CALL:
                raise refuses(self.master, "store", key, code)
            if code in NO_ROOM and waited_s >= min(ROOM_S, self._patience_s):
                raise no_segment_has_room(self.master, key, size, waited_s)
            if code in AWAY:
                self._refuse_to_wait(code, began)
            else:
                self._silent_since = None
                if waited_s >= self._patience_s:
                    raise refuses(self.master, "store", key, code)
            self._sleep(LOOK_S)
        self._silent_since = None

    def get(self, keys: Sequence[str], addresses: Sequence[int], sizes: Sequence[int]) -> list[int]:
        """Read objects, all at the same time; of each its size, or why it is a miss (a code below 0)."""

        def ask(which: list[int]) -> list[int]:
            return self._client.batch_get_into(
                [keys[n] for n in which], [addresses[n] for n in which], [sizes[n] for n in which]
            )

        return self._answered(len(keys), ask)

    def exist(self, keys: Sequence[str]) -> list[bool]:
        """Of each key whether it has an object that is whole, as the master believes."""
        found = self._answered(len(keys), lambda which: self._client.batch_is_exist([keys[n] for n in which]))
        return [code == 1 for code in found]

    def remove(self, keys: Sequence[str]) -> list[str]:
        """Remove objects, also those that were just read; the keys that must be removed again later."""
        found = self._answered(
            len(keys), lambda which: self._client.batch_remove([keys[n] for n in which], True)
        )
        return [key for key, code in zip(keys, found, strict=True) if code not in (0, ABSENT)]

    def remove_like(self, pattern: str) -> None:
        """Remove the objects whose keys match the regular expression; a master that is away has none."""
        self._client.remove_by_regex(pattern, True)

    def try_to_mark(self, key: str, address: int, size: int) -> None:
        """Store the object if there is none; the caller does this again and again, and no failure matters."""
        if self._client.batch_is_exist([key]) == [0]:
            self._client.upsert_from(key, address, size, self._pinned)

    def try_to_remove(self, keys: Sequence[str]) -> list[str]:
        """As `remove`, without waiting for the master."""
        found = self._client.batch_remove(list(keys), True)
        return [key for key, code in zip(keys, found, strict=True) if code not in (0, ABSENT)]

    def close(self) -> None:
        """The objects in this client's memory go with it. No other thread may be in a call."""
        if self._open_client is not None:
            client, self._open_client = self._open_client, None
            client.close()

    def _answered(self, count: int, ask: Callable[[list[int]], list[int]]) -> list[int]:
        """The codes of `count` objects, once the master has answered for all. Raises StoreError."""
        found, open_ones, began = [0] * count, list(range(count)), self._clock()
        while open_ones:
            for number, code in zip(open_ones, ask(open_ones), strict=True):
                found[number] = code
            open_ones = [number for number in open_ones if found[number] in AWAY]
            if open_ones:
                self._refuse_to_wait(found[open_ones[0]], began)
                self._sleep(LOOK_S)
        self._silent_since = None
        return found

    def _refuse_to_wait(self, code: int, began: float) -> None:
        """Raise StoreError if the master has not answered for as long as it is waited for.

        That counts from the first call that it did not answer: one after another would wait anew.
        """
        if self._silent_since is None:
            self._silent_since = began
        waited_s = self._clock() - min(began, self._silent_since)
        if waited_s >= self._patience_s:
            raise away(self.master, f"code {code}", waited_s)


def connect(section: MooncakeSection, segment_mib: int = 0, *, patience_s: float = PATIENCE_S) -> Link:
    """A client that gives `segment_mib` of its memory to the store. Raises ConfigError, StoreError."""
    os.environ.setdefault("GLOG_minloglevel", "3")  # it writes a line to stderr for every miss
    try:
        from mooncake import store as mooncake
    except ImportError as error:
        raise no_package(error) from error
    pinned = mooncake.ReplicateConfig()
    if not hasattr(pinned, "with_hard_pin"):
        raise too_old(installed_version())
    _wait_for(section.master, patience_s)
    host = section.host or own_address(section.master)
    client = mooncake.MooncakeDistributedStore()
    code = client.setup(
        host, section.metadata, segment_mib << 20, 0, section.protocol, section.devices, section.master
    )
    if code:
        raise no_client(section.master, host, segment_mib, code)
    pinned.with_hard_pin = True
    if segment_mib:
        pinned.preferred_segment = client.get_hostname()  # near, and it goes when this process goes
    return Link(client, pinned, section.master, patience_s=patience_s)


def is_seen(section: MooncakeSection, store: str) -> bool:
    """Whether a live producer of this store is at the master. Raises ConfigError, StoreError."""
    link, began = connect(section), time.monotonic()
    try:
        while not link.exist([f"{store}/{MARK}"])[0]:
            if time.monotonic() - began >= SEEN_S:
                return False
            time.sleep(LOOK_S)
    finally:
        link.close()
    return True


def _wait_for(master: str, patience_s: float) -> None:
    """Wait until the master takes connections: the client's own tries last for minutes. Raises StoreError."""
    began = time.monotonic()
    while (error := refusal_of(master)) is not None:
        waited_s = time.monotonic() - began
        if waited_s >= patience_s:
            raise away(master, error, waited_s)
        time.sleep(LOOK_S)


def refusal_of(master: str) -> str | None:
    """Why the master takes no connection; None if it does."""
    host, _, port = master.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        return error.strerror or str(error)
    return None


def own_address(master: str) -> str:
    """The address of this host from which the master is reached; nothing is sent. Raises StoreError."""
    host, _, port = master.rpartition(":")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[
            0
        ]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise away(master, error.strerror or str(error), 0.0) from error


def installed_version() -> str:
    for name in ("mooncake-transfer-engine-non-cuda", "mooncake-transfer-engine"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "of an unknown version"
