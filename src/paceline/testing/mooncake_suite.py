"""What the store relies on in Mooncake's client; the stand-in and a real master both pass it.

Subclass it, and define what it needs; pytest runs it.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from paceline.features.stores.mooncake.link import ABSENT, AWAY, HALF_WRITTEN, NO_ROOM

TOO_SMALL, LEASED, BROKEN = -600, -706, -800
SIZE = 1 << 20
SEGMENT_MIB = 16


class Memory:
    """Registered memory of `SIZE` bytes that begins with `content`."""

    kept: ClassVar[list[object]] = []  # its addresses must not be used again while a client has them

    def __init__(self, client: Any, content: bytes = b"") -> None:
        self._memory = ctypes.create_string_buffer(content, SIZE)
        self.kept.append(self._memory)
        self.address = ctypes.addressof(self._memory)
        assert client.register_buffer(self.address, SIZE) == 0

    @property
    def raw(self) -> bytes:
        return self._memory.raw


class MooncakeSuite(ABC):
    @abstractmethod
    def client(self, segment_mib: int = 0) -> Any:
        """A client of the one master; it gives so much memory."""

    @abstractmethod
    def pinned(self) -> Any:
        """A ReplicateConfig with a hard pin."""

    @abstractmethod
    def half(self, client: Any, key: str) -> None:
        """Begin to write an object of `SIZE` bytes, and do not end."""

    @abstractmethod
    def kill_master(self) -> None: ...

    @abstractmethod
    def start_master(self) -> None: ...

    @abstractmethod
    def killed_client_with(self, key: str) -> None:
        """A client that gave memory and put an object there was killed."""

    @abstractmethod
    def wait_until(self, condition: Callable[[], bool]) -> None:
        """For what the real master does after a while."""

    def put(self, client: Any, key: str, content: bytes = b"content") -> Memory:
        memory = Memory(client, content)
        assert client.upsert_from(key, memory.address, SIZE, self.pinned()) == 0
        return memory

    # -- objects ---------------------------------------------------------------------------------

    def test_an_object_comes_back_and_upsert_replaces_it(self) -> None:
        """Put answers the same and leaves what is there: that is why upsert is used."""
        writer, reader = self.client(SEGMENT_MIB), self.client()
        self.put(writer, "a", b"one")
        into = Memory(reader)
        assert reader.batch_get_into(["a"], [into.address], [SIZE]) == [SIZE]
        assert into.raw.startswith(b"one")
        two = Memory(writer, b"two")
        assert writer.put_from("a", two.address, SIZE, self.pinned()) == 0
        assert reader.batch_get_into(["a"], [into.address], [SIZE]) == [SIZE]
        assert into.raw.startswith(b"one")
        assert writer.upsert_from("a", two.address, SIZE, self.pinned()) == 0
        assert reader.batch_get_into(["a"], [into.address], [SIZE]) == [SIZE]
        assert into.raw.startswith(b"two")

    def test_an_object_of_no_bytes_is_not_stored_and_nobody_says_so(self) -> None:
        writer = self.client(SEGMENT_MIB)
        memory = Memory(writer)
        assert writer.upsert_from("a", memory.address, 0, self.pinned()) == 0
        assert writer.batch_is_exist(["a"]) == [0]

    def test_sizes_that_do_not_fit_are_told(self) -> None:
        """Room that is too large takes the object, and the answer is the object's size."""
        writer, reader = self.client(SEGMENT_MIB), self.client()
        memory, into = Memory(writer, b"x"), Memory(reader)
        assert writer.upsert_from("a", memory.address, SIZE // 2, self.pinned()) == 0
        found = [
            reader.batch_get_into([key], [into.address], [size])[0]
            for key, size in (("a", SIZE // 4), ("a", SIZE), ("none", SIZE))
        ]
        assert found == [TOO_SMALL, SIZE // 2, ABSENT]

    def test_what_was_just_read_is_removed_by_force_alone(self) -> None:
        writer, reader = self.client(SEGMENT_MIB), self.client()
        self.put(writer, "a")
        into = Memory(reader)
        reader.batch_get_into(["a"], [into.address], [SIZE])
        assert reader.batch_remove(["a"], False) == [LEASED]
        assert reader.batch_remove(["a", "none"], True) == [0, ABSENT]
        assert reader.batch_is_exist(["a"]) == [0]

    def test_objects_are_removed_by_a_pattern(self) -> None:
        writer = self.client(SEGMENT_MIB)
        for key in ("run.1/1-a", "run.1/2-b", "run-1/1-a"):
            self.put(writer, key)
        assert writer.remove_by_regex("^run[.]1/", True) == 2
        assert writer.batch_is_exist(["run.1/1-a", "run.1/2-b", "run-1/1-a"]) == [0, 0, 1]

    def test_a_half_written_object_is_no_object_and_gives_way_to_an_upsert(self) -> None:
        """It cannot be removed; a put would answer that all is well."""
        writer, reader = self.client(SEGMENT_MIB), self.client()
        self.half(writer, "a")
        into = Memory(reader)
        assert reader.batch_is_exist(["a"]) == [0]
        assert reader.batch_get_into(["a"], [into.address], [SIZE]) == [HALF_WRITTEN]
        assert reader.batch_remove(["a"], True) == [HALF_WRITTEN]
        memory = Memory(writer, b"whole")
        assert writer.put_from("a", memory.address, SIZE, self.pinned()) == 0
        assert reader.batch_is_exist(["a"]) == [0]
        assert writer.upsert_from("a", memory.address, SIZE, self.pinned()) == 0
        assert reader.batch_is_exist(["a"]) == [1]

    # -- memory ----------------------------------------------------------------------------------

    def test_pinned_objects_stay_when_the_memory_is_full(self) -> None:
        writer = self.client(SEGMENT_MIB)
        memory, keys = Memory(writer, b"x"), list[str]()
        while len(keys) <= SEGMENT_MIB:
            key = f"f{len(keys)}"
            code = writer.upsert_from(key, memory.address, SIZE, self.pinned())
            if code:
                break
            keys.append(key)
        assert code in NO_ROOM
        assert len(keys) >= SEGMENT_MIB - 2
        assert writer.batch_is_exist(keys) == [1] * len(keys)

    def test_objects_go_with_the_client_that_gave_the_memory(self) -> None:
        """At once, if it closes; if it is killed, they cannot be read, and the master knows later."""
        reader, writer = self.client(), self.client(SEGMENT_MIB)
        self.put(writer, "closed")
        writer.close()
        into = Memory(reader)
        assert reader.batch_is_exist(["closed"]) == [0]
        self.killed_client_with("killed")
        assert reader.batch_get_into(["killed"], [into.address], [SIZE])[0] in (BROKEN, ABSENT)
        self.wait_until(lambda: reader.batch_is_exist(["killed"]) == [0])

    # -- the master ------------------------------------------------------------------------------

    def test_a_master_that_is_killed_is_away_and_comes_back_empty(self) -> None:
        """Its clients find it again by themselves, and give it their memory."""
        writer, reader = self.client(SEGMENT_MIB), self.client()
        memory, into = self.put(writer, "a"), Memory(reader)
        self.kill_master()
        answers = [
            writer.upsert_from("b", memory.address, SIZE, self.pinned()),
            *reader.batch_get_into(["a"], [into.address], [SIZE]),
            *reader.batch_is_exist(["a"]),
            *reader.batch_remove(["a"], True),
            reader.remove_by_regex("^a", True),
        ]
        assert set(answers) <= AWAY
        self.start_master()
        self.wait_until(lambda: reader.batch_get_into(["a"], [into.address], [SIZE]) == [ABSENT])
        self.wait_until(lambda: writer.upsert_from("b", memory.address, SIZE, self.pinned()) == 0)
        self.wait_until(lambda: reader.batch_get_into(["b"], [into.address], [SIZE]) == [SIZE])
