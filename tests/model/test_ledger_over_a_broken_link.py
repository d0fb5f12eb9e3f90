"""The ledger on a server, over a connection that breaks at every moment of every kind of call."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from paceline.errors import FencedError
from paceline.ledger.stores.redis import RedisLedger
from paceline.testing.broken_link import BrokenLink, Moment
from paceline.testing.ledger_under_faults import KINDS, Strikes, compare
from paceline.testing.valkey_server import ValkeyServer

REPLY_S = 0.1
CALLS = 900
DEATHS = (Moment.BEFORE, Moment.MIDWAY, Moment.AFTER)
Open = Callable[[str], RedisLedger]


@pytest.fixture
def opened() -> Iterator[Open]:
    """Opens the test's ledger by a URL; it is closed after the test."""
    name, ledgers = uuid.uuid4().hex, list[RedisLedger]()

    def open_ledger(url: str) -> RedisLedger:
        ledgers.append(RedisLedger(url, name, durability="head"))
        return ledgers[-1]

    yield open_ledger
    for ledger in ledgers:
        ledger.close()


@pytest.fixture
def own(memory: Path) -> Iterator[ValkeyServer]:
    """A server of this test, which may kill it."""
    server = ValkeyServer(memory)
    yield server
    server.stop()


def linked(server: ValkeyServer, folder: Path) -> BrokenLink:
    return BrokenLink(folder / "link.sock", server.socket)


def test_a_broken_connection_neither_loses_nor_repeats_a_call(
    valkey: ValkeyServer, memory: Path, opened: Open
) -> None:
    """Every kind of call, at every moment: each is made once, and its caller gets its answer."""
    link = linked(valkey, memory)
    strikes = Strikes(link, seed=0)
    direct = opened(valkey.url)
    compare(opened(link.url(REPLY_S)), 0, CALLS, strikes, direct)
    link.close()
    assert set(itertools.product(KINDS, Moment)) == set(strikes.counts)


def test_a_server_killed_at_any_kind_of_call_keeps_what_it_answered(
    own: ValkeyServer, memory: Path, opened: Open
) -> None:
    """Before it makes the call, while it reads it, and after it made it; clients go on by themselves."""

    def restart() -> None:
        own.kill()
        own.start()

    link = linked(own, memory)
    strikes = Strikes(link, 1, DEATHS, then=restart)
    compare(opened(link.url(30.0)), 1, CALLS, strikes, opened(own.url))
    link.close()
    assert set(itertools.product(KINDS, DEATHS)) == set(strikes.counts)


def test_an_acquisition_that_arrives_late_takes_nothing_over(
    valkey: ValkeyServer, memory: Path, opened: Open
) -> None:
    """Its process repeated it and lost the role since; the holder of today is not fenced."""
    link = linked(valkey, memory)
    ledger = opened(link.url(REPLY_S))
    link.strike("acquire", Moment.LATE)
    before = ledger.acquire("consumer", "before")
    now = ledger.acquire("consumer", "now")
    assert link.deliver() == 1
    assert ledger.plan(now.call(1), None) is None
    with pytest.raises(FencedError):
        ledger.plan(before.call(1), None)
    link.close()
