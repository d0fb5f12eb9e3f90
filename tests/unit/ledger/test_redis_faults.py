"""The ledger on a server: what is away, cut, full, or came back without its newest changes."""

from __future__ import annotations

import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from paceline.errors import LedgerError, LedgerRegressedError, UnknownResultError
from paceline.ledger.producer_session import ProducerSession
from paceline.ledger.records import Lease, SourceBlock
from paceline.ledger.stores.redis import RedisLedger
from paceline.ledger.stores.redis.address import Address
from paceline.ledger.stores.redis.server import Server
from paceline.testing.broken_link import BrokenLink, Moment
from paceline.testing.ledger_calls import RUN_ID, capture, producer_of
from paceline.testing.valkey_server import ValkeyServer


@pytest.fixture
def own(tmp_path: Path) -> Iterator[ValkeyServer]:
    """A server of this test, which may do with it what it likes."""
    server = ValkeyServer(tmp_path)
    yield server
    server.stop()


@pytest.fixture
def opened() -> Iterator[Callable[..., RedisLedger]]:
    """Opens ledgers that are closed after the test."""
    ledgers: list[RedisLedger] = []

    def open_ledger(url: str, name: str = "run0", **options: Any) -> RedisLedger:
        ledgers.append(RedisLedger(url, name, durability="head", **options))
        return ledgers[-1]

    yield open_ledger
    for ledger in ledgers:
        ledger.close()


Open = Callable[..., RedisLedger]


def put_back(server: ValkeyServer, copy: Path) -> None:
    """Restart the server on an older copy of its append-only file."""
    server.kill()
    shutil.rmtree(server.folder / "appendonlydir")
    shutil.copytree(copy, server.folder / "appendonlydir")
    server.start()


def copied(server: ValkeyServer) -> Path:
    copy = server.folder / "copy"
    shutil.copytree(server.folder / "appendonlydir", copy)
    return copy


# -- a server that is killed or away -----------------------------------------------------------


def test_a_killed_server_keeps_every_answered_change(own: ValkeyServer, opened: Open) -> None:
    """Also those that nothing synced; its clients go on by themselves."""
    ledger = opened(own.url)
    capture(producer_of(ledger), 0, 1)
    before = ledger.snapshot()
    own.kill()
    own.start()
    assert ledger.snapshot() == before
    ledger.set_facts(None, {"after": 1})
    assert ledger.lsn() == before.lsn + 1


def test_scripts_that_the_server_forgot_are_sent_again(valkey: ValkeyServer, opened: Open) -> None:
    ledger = opened(valkey.url, uuid.uuid4().hex)
    with valkey.client() as client:
        client.script_flush()
    ledger.set_facts(None, {"a": 1})
    assert ledger.facts() == {"a": 1}


def test_a_server_that_stays_away_is_an_error_with_advice(own: ValkeyServer, opened: Open) -> None:
    ledger = opened(own.url, patience_s=0.1)
    own.kill()
    with pytest.raises(LedgerError, match=r"did not answer for 0.1 seconds.*start the server"):
        ledger.set_facts(None, {"a": 1})
    own.start()
    assert ledger.facts() == {}


def test_a_server_that_became_a_replica_is_waited_for(own: ValkeyServer, opened: Open) -> None:
    """It may become the primary again, or the address lead to another one; nothing is written meanwhile."""
    ledger = opened(own.url, patience_s=0.1)
    before = ledger.lsn()
    with own.client() as client:
        client.execute_command("REPLICAOF", "127.0.0.1", "1")
        with pytest.raises(LedgerError, match="did not answer"):
            ledger.set_facts(None, {"a": 1})
        client.execute_command("REPLICAOF", "NO", "ONE")
    assert ledger.lsn() == before
    ledger.set_facts(None, {"a": 1})


def test_a_full_server_refuses_a_change_whole(own: ValkeyServer, opened: Open) -> None:
    """Questions are still answered."""
    ledger = opened(own.url)
    before = ledger.lsn()
    with own.client() as client:
        client.config_set("maxmemory", 1)
        with pytest.raises(LedgerError, match=r"no memory left.*raise maxmemory"):
            ledger.set_facts(None, {"a": 1})
        assert (ledger.lsn(), ledger.facts()) == (before, {})
        client.config_set("maxmemory", 0)
    ledger.set_facts(None, {"a": 1})


# -- results that get lost ---------------------------------------------------------------------


@pytest.fixture
def link(valkey: ValkeyServer, tmp_path: Path) -> Iterator[BrokenLink]:
    broken = BrokenLink(tmp_path / "link.sock", valkey.socket)
    yield broken
    broken.close()


def test_a_lost_result_is_asked_for_again_under_the_same_number(link: BrokenLink, opened: Open) -> None:
    """The change was made once; the session gets what it returned."""
    ledger = opened(link.url(30.0), uuid.uuid4().hex)
    producer = producer_of(ledger)
    before = ledger.lsn()
    link.strike("lease", Moment.AFTER)
    assert producer.lease(1) == [Lease(0)]
    assert (ledger.lsn(), ledger.snapshot().prompts.leased) == (before + 1, 1)


def test_a_call_without_a_number_says_that_its_result_is_unknown(link: BrokenLink, opened: Open) -> None:
    ledger = opened(link.url(30.0), uuid.uuid4().hex)
    link.strike("set_facts", Moment.AFTER)
    with pytest.raises(UnknownResultError, match="unknown"):
        ledger.set_facts(None, {"a": 1})
    assert ledger.facts() == {"a": 1}


def test_a_lost_result_of_an_acquisition_costs_no_epoch(link: BrokenLink, opened: Open) -> None:
    """It is repeated, and recognised: no process was replaced."""
    ledger = opened(link.url(30.0), uuid.uuid4().hex)
    session = ProducerSession(ledger, RUN_ID)
    link.strike("acquire", Moment.AFTER)
    assert session.acquire() == 1
    assert ledger.snapshot().restarts == 0


def test_a_late_copy_of_a_call_that_changed_nothing_changes_nothing(
    valkey: ValkeyServer, opened: Open
) -> None:
    """A lease that found no prompt would find one by then, and nobody would know that it is leased."""
    ledger = opened(valkey.url, uuid.uuid4().hex)
    ledger.extend(None, [SourceBlock(0, 1, "prompts")])
    holder, waiting = (ledger.acquire(f"producer:{worker}", "a test") for worker in "ab")
    assert ledger.lease(holder.call(1), 1) == [Lease(0)]
    assert ledger.lease(waiting.call(1), 1) == []
    ledger.give_back(holder.call(2), [0])
    before = ledger.lsn()
    assert ledger.lease(waiting.call(1), 1) == []
    assert (ledger.lsn(), ledger.snapshot().prompts.leased) == (before, 0)
    assert ledger.lease(waiting.call(2), 1) == [Lease(0)]


def test_a_lost_answer_is_asked_for_again(link: BrokenLink, opened: Open) -> None:
    ledger = opened(link.url(30.0), uuid.uuid4().hex)
    link.strike("snapshot", Moment.AFTER)
    assert ledger.snapshot().lsn == 0


def test_a_change_whose_sync_the_server_refuses_may_have_been_made(own: ValkeyServer, opened: Open) -> None:
    """The refusal is not taken for one of the change, which stands."""
    ledger = opened(own.url)
    with own.client() as client:
        client.config_set("appendonly", "no")
    with pytest.raises(UnknownResultError, match=r"may not have reached .*appendonly is disabled"):
        ledger.set_facts(None, {"a": 1}, settle=True)
    assert ledger.facts() == {"a": 1}


def test_a_sync_that_a_failover_ends_is_asked_for_again(valkey: ValkeyServer) -> None:
    """With its change, where that does no harm; else the caller gets to know of it."""
    server, error = Server(Address(valkey.url), 60.0, lambda _: None), "return {err = 'UNBLOCKED master'}"
    scripts = [error, "return 1", error]
    commands = lambda *_: [("PING",), ("EVAL", scripts.pop(0), "0")]  # noqa: E731
    assert server.ask(commands, repeatable=True) == [b"PONG", 1]
    ping, refusal = server.ask(commands, repeatable=False)
    assert (ping, str(refusal)[:9]) == (b"PONG", "UNBLOCKED")
    server.close()


# -- a server that lost changes ----------------------------------------------------------------


def test_a_server_that_came_back_with_an_older_file_is_refused(own: ValkeyServer, opened: Open) -> None:
    """By every process that knows what is missing, for questions and for changes."""
    ledger = opened(own.url)
    copy = copied(own)
    ledger.set_facts(None, {"a": 1})
    put_back(own, copy)
    for call in (ledger.snapshot, ledger.lsn, lambda: ledger.set_facts(None, {"b": 1})):
        with pytest.raises(LedgerRegressedError, match=r"ends at change 0.*run the same command again"):
            call()
    assert opened(own.url).facts() == {}, "a new process knows nothing of it, and may go on"


def test_a_loss_is_noticed_although_others_went_on(own: ValkeyServer, opened: Open) -> None:
    """The ledger is as long as before by then, but not of the same changes."""
    ledger = opened(own.url)
    copy = copied(own)
    for value in range(3):
        ledger.set_facts(None, {"a": value})
    put_back(own, copy)
    other = opened(own.url)
    for value in range(5):
        other.set_facts(None, {"b": value})
    with pytest.raises(LedgerRegressedError):
        ledger.set_facts(None, {"a": 9})
    assert other.facts() == {"b": 4}


def test_a_restart_that_lost_nothing_is_none(own: ValkeyServer, opened: Open) -> None:
    """However many there are, and whoever goes on first."""
    one, other = opened(own.url), opened(own.url)
    for value in range(3):
        one.set_facts(None, {"a": value})
        other.set_facts(None, {"b": value})
        position = one.position()
        own.kill()
        own.start()
    assert one.lsn() == other.lsn() == 6
    assert other.missing_since(position) == ""


def test_a_waiter_hears_of_a_loss(own: ValkeyServer, opened: Open) -> None:
    """It does not wait for a change that was there once."""
    ledger, heard = opened(own.url), []
    copy = copied(own)
    ledger.set_facts(None, {"a": 1})

    def wait() -> None:
        try:
            ledger.wait(1, timeout_s=60.0)
        except LedgerRegressedError as error:
            heard.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    put_back(own, copy)
    waiter.join(timeout=60.0)
    assert len(heard) == 1


def test_a_cleared_server_is_refused(own: ValkeyServer, opened: Open) -> None:
    """Also when another process has begun a new ledger under the same name there."""
    ledger = opened(own.url)
    ledger.set_facts(None, {"a": 1})
    position = ledger.position()
    with own.client() as client:
        client.flushall()
    with pytest.raises(LedgerRegressedError, match="is gone; it held 1 changes"):
        ledger.lsn()
    new = opened(own.url)
    with pytest.raises(LedgerRegressedError, match="another ledger"):
        ledger.set_facts(None, {"a": 2})
    assert "another ledger" in new.missing_since(position)


def test_a_position_tells_a_later_process_what_is_missing(own: ValkeyServer, opened: Open) -> None:
    """A checkpoint's manifest can carry it."""
    ledger = opened(own.url)
    copy = copied(own)
    ledger.set_facts(None, {"a": 1})
    position = ledger.position()
    assert opened(own.url).missing_since(position) == ""
    put_back(own, copy)
    assert "ends at change 0" in opened(own.url).missing_since(position)


# -- threads and processes ---------------------------------------------------------------------


def test_threads_of_a_process_share_a_ledger(valkey: ValkeyServer, opened: Open) -> None:
    """One works under operation numbers, others write facts without, at the same time."""
    ledger = opened(valkey.url, uuid.uuid4().hex)
    producer = producer_of(ledger)
    before = ledger.lsn()

    def beat(name: str) -> None:
        for number in range(20):
            ledger.set_facts(producer.fence, {name: number})

    threads = [threading.Thread(target=beat, args=(name,)) for name in ("a", "b", "c")]
    for thread in threads:
        thread.start()
    leased = [producer.lease(1)[0].ordinal for _ in range(6)]
    for thread in threads:
        thread.join()
    assert leased == list(range(6))
    assert ledger.lsn() == before + 66


def test_a_child_does_not_speak_on_its_parents_connections(valkey: ValkeyServer, opened: Open) -> None:
    ledger = opened(valkey.url, uuid.uuid4().hex)
    ledger.set_facts(None, {"a": 1})
    child = os.fork()
    if child == 0:
        try:
            for number in range(20):
                ledger.set_facts(None, {"child": number})
        finally:
            os._exit(0)
    for number in range(20):
        assert ledger.set_facts(None, {"parent": number}) == {"parent": number}
    assert os.waitpid(child, 0)[1] == 0
    assert ledger.facts() == {"a": 1, "child": 19, "parent": 19}
    assert ledger.lsn() == 41


def test_closing_ends_a_wait(valkey: ValkeyServer) -> None:
    ledger, ended = RedisLedger(valkey.url, uuid.uuid4().hex, durability="head"), []

    def wait() -> None:
        with pytest.raises(LedgerError, match="is closed"):
            ledger.wait(0, timeout_s=60.0)
        ended.append(True)

    waiter = threading.Thread(target=wait)
    waiter.start()
    ledger.close()
    waiter.join(timeout=60.0)
    assert ended == [True]


def test_a_call_that_connects_while_the_ledger_is_closed_is_not_made(valkey: ValkeyServer) -> None:
    server = Server(Address(valkey.url), 1.0, lambda _: server.close())
    with pytest.raises(LedgerError, match="is closed"):
        server.ask(lambda *_: [("PING",)], repeatable=True)


def test_a_child_that_closes_the_ledger_ends_no_call_of_its_parent(valkey: ValkeyServer) -> None:
    server = Server(Address(valkey.url), 1.0, lambda _: None)
    link = server._take()
    child = os.fork()
    if child == 0:
        try:
            server.close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert link.ask([("PING",)]) == [b"PONG"]
    server.close()
