"""A Mooncake master and its clients in one process, as the real ones were measured to answer.

`testing/mooncake_suite.py` holds both to the same answers. The memory of a client is a dictionary here, and
addresses are real ones: tests read and write through them.
"""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

NO_HANDLE, BAD_CALL, HALF, ABSENT, LEASED, TRANSFER, AWAY = -200, -600, -703, -704, -706, -800, -900


@dataclass
class Object:
    content: bytearray
    at: str  # the client in whose memory it lies
    whole: bool = True
    leased: bool = False
    pinned: bool = False


@dataclass
class StandInMaster:
    """`watermark`: the share of the memory above which objects that are not pinned are evicted."""

    watermark: float = 0.9
    objects: dict[str, Object] = field(default_factory=dict)
    segments: dict[str, int] = field(default_factory=dict)
    is_up: bool = True
    dead: set[str] = field(default_factory=set)  # clients that were killed, and are not known to be dead yet
    calls: list[str] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def kill(self) -> None:
        self.is_up = False

    def start(self) -> None:
        """Clients give it their memory again, and it knows no object."""
        with self.lock:
            self.is_up = True
            self.objects.clear()

    def expire(self) -> None:
        """It has not heard of the dead clients for long enough."""
        with self.lock:
            for name in self.dead:
                self.forget(name)
            self.dead.clear()

    def forget(self, name: str) -> None:
        self.segments.pop(name, None)
        self.objects = {key: one for key, one in self.objects.items() if one.at != name}

    def taken(self, name: str) -> int:
        return sum(len(one.content) for one in self.objects.values() if one.at == name)

    def place_for(self, size: int, preferred: str) -> str | None:
        """A client whose memory has room, the preferred one first."""
        for name in sorted(self.segments, key=lambda name: (name != preferred, name)):
            if self.taken(name) + size <= self.segments[name]:
                return name
        return None

    def evict(self) -> None:
        total = sum(self.segments.values())
        for key in list(self.objects):
            if sum(len(one.content) for one in self.objects.values()) <= self.watermark * total:
                return
            if not self.objects[key].pinned:
                del self.objects[key]


@dataclass
class ReplicateConfig:
    with_hard_pin: bool = False
    preferred_segment: str = ""


class StandInClient:
    def __init__(self, master: StandInMaster, name: str, segment_bytes: int = 0) -> None:
        self.master, self.name = master, name
        self.registered: dict[int, int] = {}
        self.on_transfer: Callable[[], None] = lambda: None  # what happens while bytes are on their way
        if segment_bytes:
            master.segments[name] = segment_bytes

    def get_hostname(self) -> str:
        return self.name

    def register_buffer(self, buffer_ptr: int, size: int) -> int:
        self.registered[buffer_ptr] = size
        return 0

    def unregister_buffer(self, buffer_ptr: int) -> int:
        return 0 if self.registered.pop(buffer_ptr, None) is not None else BAD_CALL

    def put_from(self, key: str, buffer_ptr: int, size: int, config: Any) -> int:
        """What lies under the key stays, and the answer is the same."""
        with self.master.lock:
            if key in self.master.objects and self.master.is_up:
                return 0
        return self.upsert_from(key, buffer_ptr, size, config)

    def upsert_from(self, key: str, buffer_ptr: int, size: int, config: Any) -> int:
        master = self.master
        with master.lock:
            master.calls.append("upsert")
            if not master.is_up:
                return AWAY
            if not key:
                return BAD_CALL
            if not size:
                return 0
            master.objects.pop(key, None)
            at = master.place_for(size, config.preferred_segment)
            if at is None:
                return NO_HANDLE
            if at in master.dead:
                return TRANSFER
            one = Object(bytearray(size), at, whole=False, pinned=config.with_hard_pin)
            master.objects[key] = one
        self.on_transfer()
        one.content[:] = ctypes.string_at(buffer_ptr, size)
        with master.lock:
            if not master.is_up:
                return AWAY
            one.whole = True
            master.evict()
        return 0

    def batch_get_into(self, keys: list[str], buffer_ptrs: list[int], sizes: list[int]) -> list[int]:
        return [self._get(*one) for one in zip(keys, buffer_ptrs, sizes, strict=True)]

    def _get(self, key: str, address: int, size: int) -> int:
        with self.master.lock:
            self.master.calls.append("get")
            found = self.master.objects.get(key)
            if not self.master.is_up:
                return AWAY
            if found is None:
                return ABSENT
            if not found.whole:
                return HALF
            if found.at in self.master.dead:
                return TRANSFER
            if len(found.content) > size:
                return BAD_CALL
            found.leased = True
            content = bytes(found.content)
        ctypes.memmove(address, content, len(content))
        return len(content)

    def batch_is_exist(self, keys: list[str]) -> list[int]:
        with self.master.lock:
            if not self.master.is_up:
                return [AWAY] * len(keys)
            objects = self.master.objects
            return [int(key in objects and objects[key].whole) for key in keys]

    def batch_remove(self, keys: list[str], force: bool = False) -> list[int]:
        return [self._remove(key, force) for key in keys]

    def _remove(self, key: str, force: bool) -> int:
        with self.master.lock:
            found = self.master.objects.get(key)
            if not self.master.is_up:
                return AWAY
            if found is None:
                return ABSENT
            if found.leased and not force:
                return LEASED
            if not found.whole:
                return HALF
            del self.master.objects[key]
            return 0

    def remove_by_regex(self, regex_pattern: str, force: bool = False) -> int:
        with self.master.lock:
            if not self.master.is_up:
                return AWAY
            wanted = re.compile(regex_pattern)
            return sum(
                self._remove(key, force) == 0 for key in list(self.master.objects) if wanted.search(key)
            )

    def close(self) -> int:
        with self.master.lock:
            self.master.forget(self.name)
        return 0

    def kill(self) -> None:
        """As SIGKILL: nobody tells the master."""
        self.master.dead.add(self.name)
