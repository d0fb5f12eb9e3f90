"""Conformance suite for ledgers. Subclass it, define `make`, and pytest runs the rest."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import pytest

from paceline.errors import ConfigError, FencedError, IllegalTransitionError, IntentRevokedError
from paceline.ledger.producer_session import ProducerSession
from paceline.ledger.records import (
    Lease,
    Order,
    PromptCounts,
    SourceBlock,
    State,
    StepAck,
    Wanted,
    producer_role,
)
from paceline.testing.ledger_bytes_suite import LedgerBytesSuite
from paceline.testing.ledger_calls import (
    RUN_ID,
    capture,
    checkpoint_of,
    consumer_of,
    id_of,
    ids_of,
    plan_of,
    producer_of,
    refs_of,
    refusal_of,
    trained_step,
)
from paceline.testing.samples import sample_ref
from paceline.types import SampleRef


class LedgerSuite(LedgerBytesSuite):
    # -- prompts ---------------------------------------------------------------------------

    def test_a_source_is_known_by_its_blocks(self) -> None:
        """A longer one extends it; one that differs, or leaves a gap, is refused and changes nothing."""
        producer = producer_of(self.make(), prompts=4)
        first, second = SourceBlock(0, 4, "4 prompts"), SourceBlock(4, 2, "more")
        assert producer.extend([first]) == 0
        assert producer.extend([first, second]) == 2
        assert producer.extend([SourceBlock(6, 1, "one")]) == 1
        for other in (SourceBlock(4, 2, "others"), SourceBlock(4, 3, "more"), SourceBlock(9, 1, "a gap")):
            with pytest.raises(ConfigError, match="not those"):
                producer.extend([SourceBlock(7, 1, "new"), other])
        assert producer.snapshot().prompts == PromptCounts(pending=7)
        assert producer.source_blocks(5) == [second, SourceBlock(6, 1, "one")]
        assert producer.source_blocks(0, 1) == [first]

    def test_nothing_is_missing_since_a_position_that_was_reached(self) -> None:
        """It is text that goes through a file; other text is refused."""
        ledger = self.make()
        positions = [ledger.position()]
        for number in range(3):
            ledger.set_facts(None, {"k": number})
            positions.append(ledger.position())
        assert len(set(positions)) == 4
        assert [ledger.missing_since(position) for position in positions] == [""] * 4
        with pytest.raises(ValueError):  # noqa: PT011 (whose text is Python's)
            ledger.missing_since("far")

    def test_prompts_on_which_nothing_hangs_can_be_forgotten(self) -> None:
        """Those that a dead producer leased, too: its successor ends its leases first. Others may follow."""
        ledger = self.make()
        dead = producer_of(ledger, prompts=4)
        dead.lease(2)
        [reserved] = refs_of(dead, 1)
        before = ledger.lsn()
        assert not ledger.forget_prompts(None)
        assert ledger.lsn() == before
        ledger.acquire(producer_role("0"), "its successor")
        assert ledger.forget_prompts(None)
        assert ledger.snapshot().prompts == PromptCounts()
        assert ledger.source_blocks() == []
        producer = producer_of(ledger, prompts=3)
        assert producer.lease(1) == [Lease(0)]
        assert producer.revoked() == [(reserved.sample_id, reserved.generation)]
        assert refs_of(producer, 0)[0].generation > reserved.generation

    def test_an_ended_stream_is_open_again_when_its_prompts_are_forgotten(self) -> None:
        """A source without prompts ends at once."""
        ledger = self.make()
        assert producer_of(ledger, prompts=0).end_stream()
        assert ledger.forget_prompts(None)
        assert not ledger.snapshot().closed

    @pytest.mark.parametrize("what", ["leased", "reserved", "failed", "committed", "planned", "covered"])
    def test_prompts_that_something_hangs_on_stay(self, what: str) -> None:
        """Their ordinals are those of samples, failures, plans or work that is going on."""
        ledger = self.make()
        producer, consumer = producer_of(ledger), consumer_of(ledger)
        if what in ("leased", "failed"):
            producer.lease(1)
        if what == "failed":
            producer.fail([0], "no", retryable=False)
        if what == "reserved":
            refs_of(producer, 0)
        if what == "committed":
            capture(producer, 0)
        if what in ("planned", "covered"):
            consumer.plan(plan_of(1))
        if what == "covered":
            consumer.ack(1, 0, [])
            consumer.write_ack()
            consumer.head(checkpoint_of([trained_step(1)]))
        known, before = ledger.source_blocks(), ledger.lsn()
        assert ledger.forget_prompts(None) is False
        assert (ledger.source_blocks(), ledger.lsn()) == (known, before)

    def test_prompts_are_leased_once_in_order(self) -> None:
        """No two workers hold the same prompt."""
        ledger = self.make()
        first, second = producer_of(ledger, "a", prompts=4), producer_of(ledger, "b", prompts=4)
        assert first.lease(2) == [Lease(0), Lease(1)]
        assert second.lease(9) == [Lease(2), Lease(3)]
        assert first.lease(1) == []
        assert ledger.snapshot().prompts == PromptCounts(leased=4)

    def test_a_lease_can_keep_to_one_group(self) -> None:
        """Capture groups are whole: a lease does not reach over the end of the first prompt's group."""
        producer = producer_of(self.make(), prompts=7)
        producer.lease(1)
        assert [x.ordinal for x in producer.lease(3, 3)] == [1, 2]
        assert [x.ordinal for x in producer.lease(3, 3)] == [3, 4, 5]

    def test_a_group_is_one_workers_at_a_time(self) -> None:
        """While one of its prompts is held nobody else gets another; its holder does."""
        ledger = self.make()
        first = producer_of(ledger, prompts=6)
        second = producer_of(ledger, worker="b")
        assert [x.ordinal for x in first.lease(2, 3)] == [0, 1]
        assert second.lease(3, 3) == []
        first.fail([0], "refused")
        assert second.lease(3, 3) == []
        assert [x.ordinal for x in first.lease(3, 3)] == [0, 2]
        assert [x.ordinal for x in second.lease(3, 3)] == [3, 4, 5]

    def test_failed_prompts_return_until_their_attempts_are_used_up(self) -> None:
        """A retryable failure requeues; the last one is final and keeps its reason."""
        producer = producer_of(self.make(), prompts=2, attempt_max=2)
        producer.lease(2)
        assert producer.fail([0], "first") == []
        assert producer.lease(1) == [Lease(0, attempt=1)]
        assert producer.fail([0], "second") == [0]
        assert producer.fail([1], "no text", retryable=False) == [1]
        assert producer.lease(1) == []
        assert producer.ledger.failed() == {0: "second", 1: "no text"}
        assert producer.ledger.failed(1, 2) == {1: "no text"}

    def test_a_lease_keeps_below_a_bound(self) -> None:
        """Also of prompts that are pending again; a lease that finds nothing changes nothing."""
        producer = producer_of(self.make(), prompts=9)
        assert [x.ordinal for x in producer.lease(3, 3, 2)] == [0, 1]
        assert [x.ordinal for x in producer.lease(3, 3, 5)] == [2]
        before = producer.lsn()
        assert producer.lease(3, 3, 3) == []
        producer.give_back([1])
        assert producer.lease(3, 3, 1) == []
        assert producer.lsn() == before + 1
        assert [x.ordinal for x in producer.lease(3, 3, 2)] == [1]

    def test_only_the_holder_ends_a_lease(self) -> None:
        """A worker can neither fail nor give back a prompt that another one holds."""
        ledger = self.make()
        holder, other = producer_of(ledger, "a"), producer_of(ledger, "b")
        holder.lease(1)
        assert other.fail([0], "not mine", retryable=False) == []
        other.give_back([0])
        assert ledger.snapshot().prompts.leased == 1

    def test_a_failure_takes_back_the_bytes_that_were_promised_for_it(self) -> None:
        """So does giving back; the names stay until the bytes are known to be gone."""
        producer = producer_of(self.make())
        producer.lease(2)
        zero, one = refs_of(producer, 0, 1)
        producer.fail([0], "no")
        producer.give_back([1])
        for ref in (zero, one):
            with pytest.raises(IntentRevokedError):
                producer.commit([ref])
        assert producer.revoked() == [(id_of(0), zero.generation), (id_of(1), one.generation)]
        assert producer.snapshot().usage.reserved_samples == 2
        producer.swept([zero.generation])
        assert producer.revoked() == [(id_of(1), one.generation)]
        [two] = refs_of(producer, 2)
        producer.swept([two.generation])  # its own, never written
        assert producer.snapshot().usage.reserved_samples == 1

    # -- the log ---------------------------------------------------------------------------

    def test_the_ordinal_is_the_place(self) -> None:
        """Whatever is committed first; readers see what is settled, and nothing behind a gap."""
        ledger = self.make()
        a, b = producer_of(ledger, "a"), producer_of(ledger, "b")
        a.lease(2)
        b.lease(2)
        b.commit(refs_of(b, 2, 3))
        assert (ledger.read(0, 9).entries, ledger.read(0, 9).settled) == ((), 0)
        a.commit(refs_of(a, 1))
        assert ledger.read(0, 9).settled == 0
        a.commit(refs_of(a, 0))
        page = ledger.read(0, 9)
        assert [(e.place, e.sample_id) for e in page.entries] == list(enumerate(ids_of(0, 1, 2, 3)))
        assert (page.settled, page.closed) == (4, False)
        assert [e.place for e in ledger.read(1, 3).entries] == [1, 2]

    def test_a_prompt_that_fails_is_a_hole_for_ever(self) -> None:
        """Readers pass it; a worker that comes late with its sample commits nothing."""
        ledger = self.make()
        slow, quick = producer_of(ledger, "a", prompts=3), producer_of(ledger, "b", prompts=3)
        slow.lease(1)
        [late] = refs_of(slow, 0)
        quick.lease(2)
        quick.commit(refs_of(quick, 1, 2))
        assert slow.ledger.read(0, 3).settled == 0
        producer_of(ledger, "a", prompts=3)
        quick.lease(1)
        [again] = refs_of(quick, 0)
        quick.fail([0], "no", retryable=False)
        assert [e.place for e in ledger.read(0, 3).entries] == [1, 2]
        assert ledger.read(0, 3).settled == 3
        with pytest.raises(FencedError):
            slow.commit([late])
        with pytest.raises(IntentRevokedError):
            quick.commit([again])
        assert quick.commit(refs_of(quick, 0)) == []
        assert ledger.snapshot().committed == 2

    def test_a_sample_has_one_place_and_a_place_one_sample(self) -> None:
        """Another prompt's place, a place that is taken, or none at all: refused, nothing is committed."""
        producer = producer_of(self.make(), prompts=3)
        producer.lease(2)
        zero, one = refs_of(producer, 0, 1)
        producer.commit([zero])
        [again] = refs_of(producer, 0)
        for wrong in (
            replace(one, ordinal=0),
            replace(one, ordinal=None),
            replace(one, ordinal=7),
            replace(again, ordinal=1),
        ):
            with pytest.raises(IllegalTransitionError, match="cannot be committed"):
                producer.commit([wrong])
        assert producer.snapshot().committed == 1

    def test_arrival_order_is_recorded(self) -> None:
        """What comes first is first, whatever its ordinal; the order is settled once for the run."""
        ledger = self.make()
        producer = ProducerSession(ledger, RUN_ID, order=Order.ARRIVAL)
        producer.acquire()
        producer.extend([SourceBlock(0, 3, "3 prompts")])
        producer.lease(3)
        producer.commit(refs_of(producer, 2))
        producer.commit(refs_of(producer, 0))
        assert [(e.place, e.sample_id) for e in ledger.read(0, 9).entries] == [(0, id_of(2)), (1, id_of(0))]
        assert ledger.read(0, 9).settled == 2
        producer.report_lost([id_of(2)])
        producer.give_back([1])
        assert [lease.ordinal for lease in producer.lease(3)] == [1, 2]
        with pytest.raises(ConfigError, match="arrival order"):
            ProducerSession(ledger, RUN_ID, "b", order=Order.ORDINAL).acquire()

    def test_a_commit_is_idempotent_on_the_sample(self) -> None:
        """A second one is not fresh and changes nothing."""
        producer = producer_of(self.make())
        producer.lease(2)
        one, two = refs_of(producer, 0, 1), refs_of(producer, 0, 1)
        assert producer.commit(one[:1]) == one[:1]
        assert producer.commit([two[0], two[1], two[1]]) == [two[1]]
        assert producer.commit([]) == []
        assert producer.find([id_of(0)])[id_of(0)].ref == one[0]
        assert producer.snapshot().committed == 2
        assert producer.ownership().present == {id_of(0): one[0].generation, id_of(1): two[1].generation}

    def test_a_ref_survives_the_ledger_unchanged(self) -> None:
        """Every field of a ref, nested specs included, comes back equal."""
        producer = producer_of(self.make())
        producer.lease(1)
        [ref] = refs_of(producer, 0)
        producer.commit([ref])
        [entry] = producer.read(0, 1).entries
        assert entry.ref == ref
        assert isinstance(entry.ref, SampleRef)
        assert entry.ref.feature_specs["hidden_states"].shape == (4, 8)

    def test_tensors_are_refused_and_nothing_is_written(self) -> None:
        """A tensor anywhere in a batch refuses the whole batch."""

        class Tensor:
            dtype, shape, device = "float32", (1,), "cpu"

        producer = producer_of(self.make())
        producer.lease(2)
        good, bad = refs_of(producer, 0, 1)
        smuggler = replace(bad, metadata={"deep": [{"er": Tensor()}]})
        with pytest.raises(TypeError, match="metadata only"):
            producer.commit([good, smuggler])
        assert producer.snapshot().committed == 0

    def test_unknown_samples_are_an_answer(self) -> None:
        """Asking for an unknown id is not an error."""
        assert self.make().find(["nothing"]) == {}

    def test_the_stream_ends_when_every_prompt_is_settled(self) -> None:
        """Not before, whoever asks; it opens again with new prompts, or when a producer says so."""
        ledger = self.make()
        a, b = producer_of(ledger, "a", prompts=3), producer_of(ledger, "b", prompts=3)
        capture(a, 0)
        a.lease(1)
        assert (a.end_stream(), b.end_stream()) == (False, False)
        b.lease(1)
        assert (a.end_stream(), b.end_stream()) == (False, False)
        a.commit(refs_of(a, 1))
        assert b.end_stream() is False
        b.commit(refs_of(b, 2))
        assert b.end_stream() is True
        assert ledger.read(0, 9).closed
        assert ledger.end_stream(None, False) is False
        assert not ledger.read(0, 9).closed
        assert a.end_stream() is True
        assert a.extend([SourceBlock(3, 1, "one more")]) == 1
        assert not ledger.read(0, 9).closed

    # -- facts -----------------------------------------------------------------------------

    def test_facts_are_small_json_values(self) -> None:
        """Facts are written together and come back as they were."""
        consumer = consumer_of(self.make())
        consumer.set_facts({"a": {"b": [1, None, "x"]}, "c": True})
        consumer.set_facts({"c": False})
        facts = consumer.facts()
        assert (facts["a"], facts["c"]) == ({"b": [1, None, "x"]}, False)
        assert consumer.snapshot().facts == facts

    def test_of_two_that_settle_a_fact_the_first_one_does(self) -> None:
        """All of it or nothing: two first starts with different configurations, at the same moment."""
        ledger = self.make()
        wanted = {"config": (1, 2), "prompts": "a"}
        assert ledger.set_facts(None, wanted, settle=True) == {"config": [1, 2], "prompts": "a"}
        assert ledger.set_facts(None, {"config": 3, "more": 4}, settle=True) == {"config": [1, 2]}
        assert ledger.facts() == {"config": [1, 2], "prompts": "a"}

    # -- waiting ---------------------------------------------------------------------------

    def test_waiting_ends_with_the_next_change(self) -> None:
        """A waiter hears of a change that another thread makes."""
        ledger = self.make()
        seen, woken = ledger.lsn(), []
        waiter = threading.Thread(target=lambda: woken.append(ledger.wait(seen, timeout_s=60.0)))
        waiter.start()
        ledger.set_facts(None, {"x": 1})
        waiter.join(timeout=60.0)
        assert woken == [seen + 1]

    def test_waiting_returns_at_once_when_it_is_late(self) -> None:
        """A change between the look and the wait is not missed."""
        ledger = self.make()
        seen = ledger.lsn()
        ledger.set_facts(None, {"x": 1})
        assert ledger.wait(seen, timeout_s=60.0) == seen + 1
        assert ledger.wait(seen + 1, timeout_s=0.0) == seen + 1

    def test_close_is_idempotent(self) -> None:
        """Closing twice is closing."""
        ledger = self.make()
        ledger.close()
        ledger.close()

    # -- the rights of one epoch -----------------------------------------------------------

    def test_an_old_epoch_is_fenced_on_every_change(self) -> None:
        """A process that was taken over cannot change anything any more."""
        ledger = self.make()
        ids = capture(producer_of(ledger), 0)
        p, c = producer_of(ledger).fence, consumer_of(ledger).fence
        producer_of(ledger)
        consumer_of(ledger)
        before = ledger.lsn()
        attempts: list[Callable[[], object]] = [
            lambda: ledger.extend(p.call(9), [SourceBlock(6, 1, "x")]),
            lambda: ledger.forget_prompts(p.call(9)),
            lambda: ledger.lease(p.call(9), 1),
            lambda: ledger.give_back(p.call(9), [0]),
            lambda: ledger.give_back(p.call(9), [0], failure="no"),
            lambda: ledger.end_stream(p.call(9), True),
            lambda: ledger.reserve(p.call(9), [Wanted(1, "x", 1)], None),
            lambda: ledger.commit(p.call(9), [sample_ref(9, ordinal=1)]),
            lambda: ledger.swept(p.call(9), [1], 99),
            lambda: ledger.report_lost(p.call(9), ids),
            lambda: ledger.plan(c.call(9), plan_of(1, 0)),
            lambda: ledger.plan(c.call(9), None, StepAck(1, 0, tuple(ids))),
            lambda: ledger.plan(c.call(9), None),
            lambda: ledger.head(c.call(9), checkpoint_of([trained_step(1, 0)])),
            lambda: ledger.head(c.call(9), checkpoint_of([trained_step(1, 0)]), [trained_step(1, 0)]),
            lambda: ledger.fall_back(c.call(9), 0),
            lambda: ledger.retire(c.call(9), 1),
            lambda: ledger.quarantine(c.call(9), ids, step=1, reason="x"),
            lambda: ledger.release(c, [], 1),
            lambda: ledger.release(c.call(9), ids, 1),
            lambda: ledger.report_lost(c.call(9), ids),
            lambda: ledger.set_facts(c.call(9), {"x": 1}),
            lambda: ledger.set_facts(c.call(9), {"x": 1}, settle=True),
        ]
        for attempt in attempts:
            assert "has taken over" in refusal_of(attempt)
        assert ledger.lsn() == before
        assert ledger.snapshot().committed == 1
        assert ledger.snapshot().epochs == {producer_role("0"): 3, "consumer": 2}

    def test_every_state_can_be_listed(self) -> None:
        """By place, at most as many as asked for."""
        ledger = self.make()
        producer = producer_of(ledger)
        ids = capture(producer, 0, 1, 2)
        consumer = consumer_of(ledger)
        consumer.quarantine([ids[1]], step=None, reason="bad")
        producer.report_lost(ids)
        assert [r.sample_id for r in ledger.find(state=State.LOST).values()] == [ids[0], ids[2]]
        assert [r.sample_id for r in ledger.find(state=State.LOST, limit=1).values()] == [ids[0]]
        [quarantined] = ledger.find(state=State.QUARANTINED).values()
        assert (quarantined.sample_id, quarantined.reason, quarantined.step) == (ids[1], "bad", None)
        assert ledger.find(state=State.PRESENT) == {}
