"""Every bug planted in the scripts of the ledger on a server is found, each by the test named for it."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from paceline.errors import IllegalTransitionError, LedgerRegressedError
from paceline.ledger.ledger import Ledger
from paceline.ledger.stores.redis import RedisLedger
from paceline.ledger.stores.redis.scripts import keys_of
from paceline.testing.broken_link import BrokenLink, Moment
from paceline.testing.ledger_calls import producer_of, refs_of
from paceline.testing.ledger_protocol_suite import LedgerProtocolSuite
from paceline.testing.ledger_subjects import RedisSubject
from paceline.testing.ledger_suite import LedgerSuite
from paceline.testing.ledger_under_faults import Strikes, compare
from paceline.testing.lua_mutants import LUA_MUTANTS
from paceline.testing.valkey_server import ValkeyServer

FOUND = (AssertionError, pytest.fail.Exception)  # what a check itself says; an error may be anything


class Suite(LedgerSuite, LedgerProtocolSuite):
    """The conformance suite, and what can only be seen on a server."""

    def __init__(self, server: ValkeyServer, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.opened: list[Ledger] = []

    def make(self) -> RedisLedger:
        return self.open(self.server.url, uuid.uuid4().hex)

    def open(self, url: str, name: str) -> RedisLedger:
        ledger = RedisLedger(url, name, durability="head")
        ledger.archive_from = 1
        self.opened.append(ledger)
        return ledger

    def close(self) -> None:
        for ledger in self.opened:
            ledger.close()

    def test_calls_over_a_broken_connection(self) -> None:
        """Repeated, delivered twice, and late: as the specification has it."""
        link = BrokenLink(self.folder / "link.sock", self.server.socket)
        try:
            strikes = Strikes(link, 0, (Moment.AFTER, Moment.TWICE, Moment.LATE))
            compare(self.open(link.url(10.0), uuid.uuid4().hex), 0, 300, strikes)
        finally:
            link.close()

    def test_a_refused_commit_leaves_nothing(self) -> None:
        producer = producer_of(self.make(), prompts=2)
        refs = refs_of(producer, 0, 5)
        before = producer.snapshot()
        with pytest.raises(IllegalTransitionError):
            producer.commit(refs)
        assert producer.snapshot() == before

    def test_an_older_copy_is_noticed(self) -> None:
        subject = RedisSubject(self.server)
        ledger = self.open(self.server.url, subject.name)
        subject.save()
        ledger.set_facts(None, {"a": 1})
        subject.restore()
        with pytest.raises(LedgerRegressedError):
            ledger.lsn()

    def test_an_older_copy_is_noticed_although_the_server_went_on(self) -> None:
        """Under another process of it, to as many changes."""
        with ValkeyServer(self.folder) as server:
            subject = RedisSubject(server)
            ledger = self.open(server.url, subject.name)
            subject.save()
            for value in range(3):
                ledger.set_facts(None, {"a": value})
            subject.restore()
            server.kill()
            server.start()
            other = self.open(server.url, subject.name)
            for value in range(5):
                other.set_facts(None, {"b": value})
            with pytest.raises(LedgerRegressedError):
                ledger.lsn()

    def test_another_ledger_is_noticed(self) -> None:
        name = uuid.uuid4().hex
        ledger = self.open(self.server.url, name)
        with self.server.client() as client:
            client.delete(*keys_of(name))
        self.open(self.server.url, name)
        with pytest.raises(LedgerRegressedError):
            ledger.lsn()


BROKEN = Suite.test_calls_over_a_broken_connection
FINDS: dict[str, Callable[[Suite], None]] = {
    "fence not checked in one operation": Suite.test_an_old_epoch_is_fenced_on_every_change,
    "a late call is made": Suite.test_a_copy_of_an_operation_that_arrives_late_changes_nothing,
    "operation number forgotten": BROKEN,
    "result forgotten": BROKEN,
    "numbers outlive the holder": Suite.test_operations_are_numbered_anew_in_each_epoch,
    "acquisitions not recognised": BROKEN,
    "epochs stand still": Suite.test_an_old_epoch_is_fenced_on_every_change,
    "prefix read past a hole": Suite.test_the_ordinal_is_the_place,
    "lease given twice": Suite.test_prompts_are_leased_once_in_order,
    "a neighbour's group is leased": Suite.test_a_group_is_one_workers_at_a_time,
    "budget not checked where it is reserved": Suite.test_the_budget_is_kept_by_all_workers_together,
    "reservations not counted": Suite.test_the_budget_is_kept_by_all_workers_together,
    "intents not checked": Suite.test_a_revoked_intent_refuses_the_whole_commit,
    "intents of anybody": Suite.test_an_intent_is_of_one_sample_and_one_worker,
    "a start revokes nobody's intents": Suite.test_a_revoked_intent_refuses_the_whole_commit,
    "a start ends everybody's work": Suite.test_a_workers_start_takes_over_its_own_work_and_no_others,
    "acks inherited": Suite.test_a_new_consumer_inherits_no_provisional_ack,
    "acks in any order": Suite.test_steps_are_acked_one_after_another,
    "acks of any revision": Suite.test_steps_are_acked_one_after_another,
    "the newer plan wins": Suite.test_the_first_plan_of_a_step_wins,
    "a head may be older": Suite.test_checkpoints_form_a_growing_chain,
    "a head makes nothing durable": Suite.test_durable_weights_are_not_put_in_quarantine,
    "freed at ack": Suite.test_release_waits_for_a_durable_ack,
    "fall back keeps acks": Suite.test_falling_back_undoes_later_acks_and_asks_for_lost_features,
    "a durable sample may be lost": Suite.test_a_lost_sample_is_captured_again_but_a_durable_one_is_not,
    "generations reused": Suite.test_bytes_are_promised_before_they_are_written,
    "the stream ends early": Suite.test_the_stream_ends_when_every_prompt_is_settled,
    "a loss is not noticed": Suite.test_an_older_copy_is_noticed,
    "a loss under a former process is not noticed": (
        Suite.test_an_older_copy_is_noticed_although_the_server_went_on
    ),
    "another ledger is taken for this one": Suite.test_another_ledger_is_noticed,
    "a refusal leaves half a change": Suite.test_a_refused_commit_leaves_nothing,
}


@pytest.fixture
def suite(valkey: ValkeyServer, memory: Path) -> Iterator[Suite]:
    made = Suite(valkey, memory)
    yield made
    made.close()


@pytest.mark.parametrize("find", dict.fromkeys(FINDS.values()), ids=lambda find: find.__name__)
def test_the_scripts_pass(find: Callable[[Suite], None], suite: Suite) -> None:
    """Without a bug."""
    find(suite)


@pytest.mark.parametrize("name", LUA_MUTANTS)
def test_the_planted_bug_is_found(name: str, suite: Suite) -> None:
    with LUA_MUTANTS[name].planted(), pytest.raises(FOUND) as found:
        FINDS[name](suite)
    assert "refused a call" not in str(found.value), "the script itself is broken"


def test_there_are_enough_of_them() -> None:
    """Of every part of the protocol."""
    assert len(LUA_MUTANTS) >= 30
