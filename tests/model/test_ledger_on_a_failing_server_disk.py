"""The disk under the server: full, or with an append-only file that ends anywhere."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from paceline.errors import LedgerError, LedgerRegressedError
from paceline.ledger.stores.redis import RedisLedger
from paceline.ledger.stores.redis.server import Server
from paceline.testing.ledger_calls import capture, producer_of
from paceline.testing.ledger_history import state_of
from paceline.testing.ledger_under_faults import compare, play, undisturbed
from paceline.testing.small_disk import NoDiskError, SmallDisk
from paceline.testing.specification_of_steps import SpecificationLedger
from paceline.testing.valkey_server import ValkeyServer

CALLS = 300
ROOM = 20_000  # bytes that a server may still write: a good part of a history
CUTS = 40
PROMPTS = 40
MakeServer = Callable[..., ValkeyServer]


@pytest.fixture
def make_server(memory: Path) -> Iterator[MakeServer]:
    servers: list[ValkeyServer] = []

    def make(**options: str) -> ValkeyServer:
        folder = memory / str(len(servers))
        folder.mkdir()
        servers.append(ValkeyServer(folder, **options))
        return servers[-1]

    yield make
    for server in servers:
        server.stop()


def fill(server: ValkeyServer, room: int = ROOM) -> None:
    server.limit_files(server.append_only_file.stat().st_size + room)


def change_until_refused(ledger: RedisLedger) -> None:
    for number in range(100):
        ledger.set_facts(None, {"a": number})


def when_waited(monkeypatch: pytest.MonkeyPatch, then: Callable[[], None]) -> list[float]:
    """Do `then` when a client begins to wait for the server, once; how long clients waited, in seconds."""
    waits, sleep = list[float](), Server.sleep

    def wait(seconds: float) -> None:
        if not waits:
            then()
        waits.append(seconds)
        sleep(seconds)

    monkeypatch.setattr(Server, "sleep", staticmethod(wait))
    return waits


def test_a_full_disk_is_waited_for(make_server: MakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is refused, lost or repeated, and a later kill of the server takes nothing back."""
    server = make_server(appendfsync="everysec")
    waits = when_waited(monkeypatch, lambda: server.limit_files(None))
    go_on_after(server, lambda: fill(server), waits)


@pytest.fixture
def disk(memory: Path) -> Iterator[SmallDisk]:
    try:
        made = SmallDisk(memory / "disk", 1 << 20)
    except NoDiskError as refused:
        pytest.skip(f"this machine lets this user mount no disk: {refused}")
    yield made
    made.close()


def test_a_disk_that_is_really_full_is_waited_for(
    disk: SmallDisk, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing may be mounted, the limit on a file's size stands for it, above."""
    with ValkeyServer(memory, disk.enter, dir=str(disk.folder), appendfsync="everysec") as server:
        waits = when_waited(monkeypatch, disk.empty)
        go_on_after(server, lambda: disk.fill(ROOM), waits)


def go_on_after(server: ValkeyServer, fill_up: Callable[[], None], waits: list[float]) -> None:
    """Make changes until somebody waited, and more; the ledger is as the specification has it, to the end."""
    ledger, known = RedisLedger(server.url, "run0", durability="head"), SpecificationLedger()
    producers = producer_of(ledger, prompts=PROMPTS), producer_of(known, prompts=PROMPTS)
    fill_up()
    for number in range(PROMPTS):
        for producer in producers:
            capture(producer, number)
    assert waits
    assert (ledger.lsn(), state_of(ledger)) == (known.lsn(), state_of(known))
    server.restart()
    assert (ledger.lsn(), state_of(ledger)) == (known.lsn(), state_of(known))
    ledger.close()


def test_a_server_that_ends_because_its_disk_is_full_is_waited_for(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `appendfsync always` it answers nothing that it could not write."""
    server = make_server(appendfsync="always")
    ledger = RedisLedger(server.url, "run0", durability="full")

    def restart() -> None:
        server.kill()  # it has ended already
        server.start()

    waits = when_waited(monkeypatch, restart)
    fill(server)
    compare(ledger, 1, CALLS, undisturbed)
    assert waits
    ledger.close()


def test_a_disk_that_stays_full_is_an_error_with_advice(make_server: MakeServer) -> None:
    server = make_server(appendfsync="everysec")
    ledger = RedisLedger(server.url, "run0", durability="head", patience_s=0.1)
    fill(server, room=0)
    with pytest.raises(LedgerError, match=r"could not write to its disk.*free space"):
        change_until_refused(ledger)
    server.limit_files(None)
    ledger.close()


def test_changes_that_a_full_disk_did_not_take_are_missed(make_server: MakeServer) -> None:
    """The server answered them and was killed before there was room: its clients notice."""
    server = make_server(appendfsync="everysec")
    ledger = RedisLedger(server.url, "run0", durability="head", patience_s=0.1)
    fill(server, room=0)
    with pytest.raises(LedgerError):
        change_until_refused(ledger)
    server.kill()
    server.start()
    with pytest.raises(LedgerRegressedError):
        ledger.set_facts(None, {"b": 1})
    ledger.close()


def test_a_file_that_ends_anywhere_holds_whole_changes(make_server: MakeServer, memory: Path) -> None:
    """A power failure may leave any beginning of it; none is half of a change."""
    server, states = make_server(), dict[int, dict[str, Any]]()
    name = uuid.uuid4().hex
    ledger = RedisLedger(server.url, name, durability="head")
    states[0] = state_of(ledger)
    for _, _, lsn in play(ledger, 2, 120, undisturbed):
        states[lsn] = state_of(ledger)
    ledger.close()
    whole, rng, found = server.append_only_file.read_bytes(), random.Random(0), set[int]()
    server.kill()
    for _ in range(CUTS):
        server.append_only_file.write_bytes(whole[: rng.randrange(len(whole) // 20, len(whole))])
        server.start()
        cut = RedisLedger(server.url, name, durability="head")
        assert state_of(cut) == states[cut.lsn()]
        found.add(cut.lsn())
        cut.close()
        server.kill()
    assert len(found) > CUTS // 2
