"""Every bug planted in the client of the ledger on a server is found, each by the check named for it."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from paceline.errors import ConfigError, LedgerRegressedError, UnknownResultError
from paceline.ledger.stores.redis import RedisLedger
from paceline.testing.broken_link import BrokenLink, Moment
from paceline.testing.client_mutants import CLIENT_MUTANTS
from paceline.testing.ledger_calls import refusal_of
from paceline.testing.ledger_subjects import RedisSubject
from paceline.testing.samples import sample_ref
from paceline.testing.valkey_server import ValkeyServer

FOUND = (AssertionError, pytest.fail.Exception)  # what a check itself says; an error may be anything


class Checks:
    def __init__(self, server: ValkeyServer, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.opened: list[RedisLedger] = []

    def open(self, url: str = "", name: str = "") -> RedisLedger:
        ledger = RedisLedger(url or self.server.url, name or uuid.uuid4().hex, durability="head")
        self.opened.append(ledger)
        return ledger

    def an_older_copy_is_noticed(self) -> None:
        subject = RedisSubject(self.server)
        ledger = self.open(name=subject.name)
        subject.save()
        ledger.set_facts(None, {"a": 1})
        subject.restore()
        with pytest.raises(LedgerRegressedError):
            ledger.lsn()

    def an_answer_that_comes_too_late_is_nobodys(self) -> None:
        ledger = self.open(f"{self.server.url}?socket_timeout=0.1")
        with self.server.client() as client:
            client.client_pause(300)
        with suppress(UnknownResultError):
            ledger.set_facts(None, {"a": 1})
        [answer] = ledger._server.ask(lambda link, whole: [["ECHO", "mine"]], repeatable=True)
        assert answer == b"mine"
        assert ledger.lsn() in (0, 1)

    def a_disk_that_refuses_is_told(self) -> None:
        with ValkeyServer(self.folder) as server, server.client() as client:
            ledger = self.open(server.url)
            client.config_set("appendonly", "no")
            with pytest.raises(UnknownResultError):
                ledger.set_facts(None, {"a": 1}, settle=True)

    def an_acquisition_waits_for_the_disk(self) -> None:
        ledger = self.open()
        with self.server.client() as client:
            client.config_resetstat()
            ledger.acquire("consumer", "a test")
            assert client.info("commandstats").get("cmdstat_waitaof", {}).get("calls") == 1

    def a_lost_result_without_a_number_is_unknown(self) -> None:
        link = BrokenLink(self.folder / "link.sock", self.server.socket)
        try:
            ledger = self.open(link.url(30.0))
            link.strike("set_facts", Moment.AFTER)
            with pytest.raises(UnknownResultError):
                ledger.set_facts(None, {"a": 1})
        finally:
            link.close()

    def a_child_has_its_own_connection(self) -> None:
        server = self.open()._server
        link = server._take()
        server._put_back(link)
        child = os.fork()
        if child == 0:
            os._exit(server._take() is link)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    def every_connection_is_looked_at(self) -> None:
        with ValkeyServer(self.folder) as server, server.client() as client:
            ledger = self.open(server.url)
            client.config_set("appendonly", "no")
            client.client_kill_filter(_type="normal", skipme=True)
            with pytest.raises(ConfigError):
                ledger.lsn()

    def the_log_is_read_to_its_end(self) -> None:
        ledger = self.open()
        ledger.commit(None, [sample_ref(number) for number in range(2001)])
        assert len(ledger.read(0, 3000).entries) == 2001

    def a_server_that_is_a_replica_for_a_while_is_waited_for(self) -> None:
        with ValkeyServer(self.folder) as server, server.client() as client:
            ledger = self.open(server.url)
            client.execute_command("REPLICAOF", "127.0.0.1", "1")
            ledger._server.sleep = lambda _: client.execute_command("REPLICAOF", "NO", "ONE")  # type: ignore[method-assign]
            assert refusal_of(lambda: ledger.set_facts(None, {"a": 1})) == ""
            assert ledger.facts() == {"a": 1}


FINDS: dict[str, Callable[[Checks], None]] = {
    "what was seen is forgotten": Checks.an_older_copy_is_noticed,
    "a broken connection is used again": Checks.an_answer_that_comes_too_late_is_nobodys,
    "the disk's answer is not read": Checks.a_disk_that_refuses_is_told,
    "nothing waits for the disk": Checks.an_acquisition_waits_for_the_disk,
    "a call without a number is repeated": Checks.a_lost_result_without_a_number_is_unknown,
    "a child speaks on its parent's connections": Checks.a_child_has_its_own_connection,
    "only the first connection is looked at": Checks.every_connection_is_looked_at,
    "a page of the log is taken for the log": Checks.the_log_is_read_to_its_end,
    "a server that steps down ends the run": Checks.a_server_that_is_a_replica_for_a_while_is_waited_for,
}


Make = Callable[[], Checks]


@pytest.fixture
def make_checks(valkey: ValkeyServer, memory: Path) -> Iterator[Make]:
    """Each with a folder of its own."""
    made: list[Checks] = []

    def make() -> Checks:
        folder = memory / str(len(made))
        folder.mkdir()
        made.append(Checks(valkey, folder))
        return made[-1]

    yield make
    for ledger in (ledger for checks in made for ledger in checks.opened):
        ledger.close()


@pytest.mark.parametrize("name", CLIENT_MUTANTS)
def test_the_planted_bug_is_found(name: str, make_checks: Make) -> None:
    """And only the bug: without it the check passes."""
    FINDS[name](make_checks())
    checks = make_checks()
    with CLIENT_MUTANTS[name].planted(), pytest.raises(FOUND):
        FINDS[name](checks)
