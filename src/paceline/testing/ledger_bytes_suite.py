"""The part of the ledger suite about bytes, acks and steps (ledger_suite.py)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

import pytest

from paceline.errors import IllegalTransitionError, IntentRevokedError
from paceline.ledger.ledger import Ledger
from paceline.ledger.records import (
    Budget,
    Lease,
    PromptCounts,
    StepAck,
    Wanted,
)
from paceline.testing.ledger_calls import (
    Training,
    capture,
    consumer_of,
    id_of,
    ids_of,
    plan_of,
    producer_of,
    refs_of,
)
from paceline.testing.samples import sample_ref


class LedgerBytesSuite(ABC):
    @abstractmethod
    def make(self) -> Ledger:
        """A new, empty ledger that archives as soon as anything is ready."""

    # -- bytes -----------------------------------------------------------------------------

    def test_bytes_are_promised_before_they_are_written(self) -> None:
        """An intent counts as occupied, has a generation of its own, and ends with the commit."""
        ledger = self.make()
        producer = producer_of(ledger)
        producer.lease(2)
        zero, one = refs_of(producer, 0, 1)
        assert zero.generation != one.generation
        assert producer.ownership().promised == {zero.generation: id_of(0), one.generation: id_of(1)}
        usage = ledger.snapshot().usage
        assert (usage.reserved_samples, usage.reserved_bytes) == (2, 200)
        producer.commit([zero])
        assert producer.ownership().promised == {one.generation: id_of(1)}
        assert producer.ownership().generations == {zero.generation, one.generation}
        assert producer.ownership().next_generation > one.generation

    def test_the_budget_is_kept_by_all_workers_together(self) -> None:
        """What does not fit beside what the others hold is not promised, and nothing changes."""
        ledger = self.make()
        a, b = producer_of(ledger, "a"), producer_of(ledger, "b")
        budget = Budget(300, num_samples=3)
        assert a.reserve([Wanted(0, id_of(0), 100), Wanted(1, id_of(1), 100)], budget) is not None
        before = ledger.lsn()
        assert b.reserve([Wanted(2, id_of(2), 101)], budget) is None
        assert b.reserve([Wanted(2, id_of(2), 1), Wanted(3, id_of(3), 1)], budget) is None
        assert ledger.lsn() == before
        assert b.reserve([Wanted(2, id_of(2), 100)], budget) is not None

    def test_an_intent_is_of_one_sample_and_one_worker(self) -> None:
        """Another sample cannot be committed under it, nor its own by another worker."""
        ledger = self.make()
        a, b = producer_of(ledger, "a"), producer_of(ledger, "b")
        a.lease(2)
        [ref] = refs_of(a, 0)
        with pytest.raises(IntentRevokedError):
            a.commit([replace(sample_ref(1, ordinal=1), generation=ref.generation)])
        with pytest.raises(IntentRevokedError):
            b.commit([ref])
        with pytest.raises(IntentRevokedError):
            a.commit([sample_ref(1, ordinal=1)])
        assert ledger.snapshot().committed == 0

    def test_a_revoked_intent_refuses_the_whole_commit(self) -> None:
        """Its bytes may be deleted by now; nothing of the batch counts, not even what is sound."""
        producer = producer_of(self.make())
        producer.lease(2)
        refs = refs_of(producer, 0, 1)
        producer.give_back([1])
        with pytest.raises(IntentRevokedError, match=id_of(1)):
            producer.commit(refs)
        assert producer.snapshot().committed == 0

    def test_a_generation_is_never_used_twice(self) -> None:
        """Also not after it was revoked, or the role taken over, or skipped over."""
        ledger = self.make()
        producer = producer_of(ledger)
        producer.lease(1)
        [first] = refs_of(producer, 0)
        producer.give_back([0])
        producer.swept([first.generation], skip_through=41)
        producer = producer_of(ledger)
        [second] = refs_of(producer, 0)
        assert second.generation == 42
        producer.swept([], skip_through=7)
        assert refs_of(producer, 0)[0].generation == 43

    # -- acks and features -----------------------------------------------------------------

    def test_release_waits_for_a_durable_ack(self) -> None:
        """No feature is freed before a checkpoint covers it."""
        ledger = self.make()
        ids = capture(producer_of(ledger), 0, 1, 2)
        training = Training(consumer_of(ledger))
        training.step(0, 1)
        fence = training.consumer.fence
        assert ledger.release(fence, [], 10) == {}
        with pytest.raises(IllegalTransitionError, match="durable checkpoint"):
            ledger.release(fence.call(90), ids[:2], 10)
        training.checkpoint()
        assert list(ledger.release(fence, [], 10)) == ids[:2]
        assert list(ledger.release(fence.call(91), ids[:1], 10)) == ids[1:2]
        assert ledger.release(fence.call(92), ids[1:2], 10) == {}
        assert list(ledger.ownership().present) == ids[2:]

    def test_bytes_are_counted_while_features_are_resident(self) -> None:
        """Commit adds, release subtracts; provisional is the part a checkpoint would free."""
        ledger = self.make()
        capture(producer_of(ledger), 0, 1, 2)
        training = Training(consumer_of(ledger))
        training.step(0, 1)
        usage = ledger.snapshot().usage
        assert (usage.resident_samples, usage.resident_bytes) == (3, 300)
        assert (usage.provisional_samples, usage.waiting_samples) == (2, 1)
        training.checkpoint()
        ledger.release(training.consumer.fence.call(90), ids_of(0, 1), 0)
        usage = ledger.snapshot().usage
        assert (usage.resident_bytes, usage.provisional_samples, usage.waiting_samples) == (100, 0, 1)

    def test_a_lost_sample_is_captured_again_but_a_durable_one_is_not(self) -> None:
        """A lost feature is a cache miss; one that durable weights contain is not needed."""
        ledger = self.make()
        producer = producer_of(ledger, prompts=2)
        ids = capture(producer, 0, 1)
        training = Training(consumer_of(ledger))
        training.step(0)
        training.checkpoint()
        training.consumer.report_lost(ids)
        assert [record.sample_id for record in producer.lost()] == ids[1:]
        assert ledger.read(0, 2).settled == 2, "its place stays settled"
        assert producer.lease(2) == [Lease(1)]
        [ref] = refs_of(producer, 1)
        assert producer.commit([ref]) == [ref]
        assert (producer.lost(), producer.ownership().present[ids[1]]) == ([], ref.generation)

    def test_a_late_retry_of_a_lost_samples_commit_does_not_bring_it_back(self) -> None:
        """The ref of bytes that were reported lost is not fresh; one of a new generation is."""
        producer = producer_of(self.make())
        producer.lease(1)
        [old] = refs_of(producer, 0)
        producer.commit([old])
        producer.report_lost([old.sample_id])
        assert producer.commit([old]) == []
        assert [record.sample_id for record in producer.lost()] == [old.sample_id]

    def test_a_lost_sample_that_weights_came_to_contain_is_not_committed_again(self) -> None:
        """Its bytes were read before they were lost; those captured again would never be freed."""
        ledger = self.make()
        producer = producer_of(ledger, prompts=1)
        capture(producer, 0)
        training = Training(consumer_of(ledger))
        training.step(0)
        producer.report_lost([id_of(0)])
        producer.lease(1)
        refs = refs_of(producer, 0)
        training.checkpoint()
        assert producer.commit(refs) == []
        assert (producer.lost(), producer.ownership().generations) == ([], set())
        assert ledger.snapshot().prompts == PromptCounts(done=1)

    # -- steps -----------------------------------------------------------------------------

    def test_the_first_plan_of_a_step_wins(self) -> None:
        """A step is planned once; a replay gets the plan on record."""
        ledger = self.make()
        capture(producer_of(ledger), 0, 1)
        consumer = consumer_of(ledger)
        first = plan_of(1, 0, 1)
        assert consumer.plan(first).plan == first
        assert consumer.plan(plan_of(1, 1)).plan == first
        assert (consumer.step_plan(1), consumer.step_plan(2)) == (first, None)

    def test_a_revised_plan_replaces_the_one_before(self) -> None:
        """Without the bad sample; not backwards, and not once the step is acked."""
        consumer = consumer_of(self.make())
        first, revised = plan_of(1, 0, 1), plan_of(1, 0, rev=1)
        consumer.plan(first)
        assert consumer.plan(revised).plan == revised
        assert consumer.plan(first).plan == revised
        assert revised.digest != plan_of(1, 0).digest
        consumer.ack(1, 1, [])
        consumer.write_ack()
        assert consumer.plan(plan_of(1, rev=2)).plan == revised

    def test_steps_are_acked_one_after_another(self) -> None:
        """An ack that skips, repeats, or names another revision than planned is refused."""
        ledger = self.make()
        consumer = consumer_of(ledger)
        fence = consumer.fence
        for step in (1, 2):
            consumer.plan(plan_of(step, step))
        with pytest.raises(IllegalTransitionError, match="step 2"):
            ledger.plan(fence.call(50), None, StepAck(2, 0, ()))
        with pytest.raises(IllegalTransitionError, match="revision"):
            ledger.plan(fence.call(51), None, StepAck(1, 1, ()))
        ledger.plan(fence.call(52), None, StepAck(1, 0, ()))
        assert ledger.snapshot().trained_step == 1
        with pytest.raises(IllegalTransitionError):
            ledger.plan(fence.call(53), None, StepAck(1, 0, ()))
        ledger.plan(fence.call(54), None, StepAck(2, 0, ()))
        with pytest.raises(IllegalTransitionError, match="none"):
            ledger.plan(fence.call(55), None, StepAck(3, 0, ()))

    def test_an_ack_goes_with_the_plan_of_the_next_step(self) -> None:
        """In one transaction: both, or, if either is refused, neither."""
        ledger = self.make()
        capture(producer_of(ledger), 0, 1)
        consumer = consumer_of(ledger)
        consumer.plan(plan_of(1, 0))
        with pytest.raises(IllegalTransitionError, match="revision"):
            ledger.plan(consumer.fence.call(50), plan_of(2, 1), StepAck(1, 1, ()))
        assert (ledger.snapshot().trained_step, ledger.step_plan(2)) == (0, None)
        before = ledger.lsn()
        ledger.plan(consumer.fence.call(51), plan_of(2, 1), StepAck(1, 0, (id_of(0),)))
        assert (ledger.snapshot().trained_step, ledger.lsn()) == (1, before + 1)
        assert ledger.snapshot().usage.waiting_samples == 1

    def test_a_step_is_told_with_its_samples(self) -> None:
        """For people: by step, by sample, archived or not."""
        ledger = self.make()
        capture(producer_of(ledger), 0, 1)
        training = Training(consumer_of(ledger))
        one, two = training.step(0, 1, finished=[1]), training.step(0)
        assert list(ledger.history()) == [one, two]
        assert list(ledger.history(step=2)) == [two]
        assert list(ledger.history(sample_id=id_of(1))) == [one]

    def test_the_last_of_two_visits_in_one_step_finishes_the_sample(self) -> None:
        """With several passes a sample may come twice in a step; archived or not, it is finished once."""
        ledger = self.make()
        capture(producer_of(ledger), 0, 1)
        consumer = consumer_of(ledger)
        plan = plan_of(1, 0, 1, 0)
        consumer.plan(plan)
        consumer.ack(1, 0, ids_of(0, 1))
        consumer.write_ack()
        [step] = ledger.history()
        assert [sample.finished for sample in step.samples] == [False, True, True]
