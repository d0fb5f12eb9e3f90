"""Conformance suite for ledgers when processes die, results get lost and samples cannot be trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

import pytest

from paceline.errors import FencedError, IllegalTransitionError, IntentRevokedError
from paceline.ledger.ledger import Ledger
from paceline.ledger.producer_session import ProducerSession
from paceline.ledger.records import (
    BegunStep,
    Lease,
    Order,
    PromptCounts,
    SourceBlock,
    State,
    StepAck,
    TrainedSample,
    TrainedStep,
    Wanted,
)
from paceline.testing.ledger_calls import (
    RUN_ID,
    Training,
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


class LedgerProtocolSuite(ABC):
    @abstractmethod
    def make(self) -> Ledger:
        """A new, empty ledger that archives as soon as anything is ready."""

    # -- workers that die ------------------------------------------------------------------

    def test_a_workers_start_takes_over_its_own_work_and_no_others(self) -> None:
        """Its leases return with a death on each, its intents are revoked; a second producer's stay."""
        ledger = self.make()
        dead, other = producer_of(ledger, "a"), producer_of(ledger, "b")
        dead.lease(2)
        other.lease(2)
        [gone], [stays] = refs_of(dead, 0), refs_of(other, 2)
        again = producer_of(ledger, "a")
        assert again.epoch == dead.epoch + 1
        assert ledger.snapshot().prompts == PromptCounts(pending=4, leased=2)
        assert again.lease(9) == [Lease(0, deaths=1), Lease(1, deaths=1), Lease(4), Lease(5)]
        with pytest.raises(FencedError):
            dead.commit([gone])
        with pytest.raises(IntentRevokedError):
            again.commit([gone])
        assert again.revoked() == [(gone.sample_id, gone.generation)]
        assert again.ownership().promised == {stays.generation: stays.sample_id}
        assert other.commit([stays]) == [stays]

    def test_bytes_of_no_worker_can_be_told_from_all_others(self) -> None:
        """A generation below the next one that is neither present nor promised is an orphan, for ever."""
        ledger = self.make()
        a, b = producer_of(ledger, "a"), producer_of(ledger, "b")
        a.lease(2)
        b.lease(1)
        present, orphan = refs_of(a, 0, 1)
        [promised] = refs_of(b, 2)
        a.commit([present])
        a = producer_of(ledger, "a")
        found = a.ownership()
        assert found.generations == {present.generation, promised.generation}
        assert orphan.generation < found.next_generation
        a.swept([orphan.generation, promised.generation])
        assert a.revoked() == []
        assert b.commit([promised]) == [promised], "a live intent is not swept"

    def test_a_new_consumer_inherits_no_provisional_ack(self) -> None:
        """The weights of provisional steps died with the consumer that made them."""
        ledger = self.make()
        capture(producer_of(ledger), 0, 1)
        training = Training(consumer_of(ledger))
        training.step(0)
        training.checkpoint()
        training.step(1)
        consumer_of(ledger)
        assert ledger.snapshot().usage.waiting_samples == 1
        assert ledger.snapshot().trained_step == 1
        assert ledger.find(ids_of(0, 1))[id_of(1)].step is None

    def test_deaths_in_a_step_are_counted(self) -> None:
        """Begun and neither acked nor left when the next consumer comes: that one died in it."""
        ledger = self.make()
        capture(producer_of(ledger), 0)
        plan = plan_of(1, 0)
        for deaths in (0, 1, 2):
            consumer = consumer_of(ledger)
            assert consumer.plan(plan) == BegunStep(plan, deaths)
        consumer.leave()
        consumer = consumer_of(ledger)
        assert consumer.plan(plan).deaths == 2
        consumer.ack(1, 0, [])
        consumer.write_ack()
        assert consumer_of(ledger).plan(plan).deaths == 0

    # -- results that get lost -------------------------------------------------------------

    def test_a_repeated_operation_returns_what_the_first_one_did(self) -> None:
        """After an unknown result the caller repeats it: nothing happens twice, the answer is the same."""
        ledger = self.make()
        p, consumer = producer_of(ledger).fence, consumer_of(ledger)
        c = consumer.fence
        leases = ledger.lease(p.call(2), 1)
        assert ledger.lease(p.call(2), 1) == leases == [Lease(0)]
        wanted = [Wanted(0, id_of(0), 1)]
        generations = ledger.reserve(p.call(3), wanted, None)
        assert generations is not None
        assert ledger.reserve(p.call(3), wanted, None) == generations
        ref = replace(sample_ref(0, ordinal=0), generation=generations[0])
        assert ledger.commit(p.call(4), [ref]) == ledger.commit(p.call(4), [ref]) == [True]
        assert ledger.lease(p.call(5), 1) == [Lease(1)]
        failed = [ledger.give_back(p.call(6), [1], failure="no") for _ in range(2)]
        assert failed == [[1], [1]]
        begun = [ledger.plan(c.call(1), plan_of(1, 0)) for _ in range(2)]
        assert begun == [BegunStep(plan_of(1, 0), 0)] * 2
        before = ledger.lsn()
        for _ in range(2):
            ledger.plan(c.call(2), None, StepAck(1, 0, (id_of(0),)))
        record = checkpoint_of([trained_step(1, 0)])
        for _ in range(2):
            ledger.head(c.call(3), record)
        assert ledger.lsn() == before + 2
        assert [ledger.fall_back(c.call(4), 1), ledger.fall_back(c.call(4), 1)] == [[], []]
        assert [ledger.retire(c.call(5), 9), ledger.retire(c.call(5), 9)] == [0, 0]

    def test_a_copy_of_an_operation_that_arrives_late_changes_nothing(self) -> None:
        """A delayed call, answered long ago, is told from a new one by its number."""
        ledger = self.make()
        p = producer_of(ledger).fence
        ledger.lease(p.call(2), 1)
        ledger.give_back(p.call(3), [0])
        before = ledger.lsn()
        with pytest.raises(FencedError, match="arrived after operation 3"):
            ledger.lease(p.call(2), 1)
        assert ledger.lsn() == before
        assert ledger.snapshot().prompts.leased == 0

    def test_operations_are_numbered_anew_in_each_epoch(self) -> None:
        """A successor's first call is no repetition of its predecessor's."""
        ledger = self.make()
        first = producer_of(ledger)
        first.lease(3)
        second = ProducerSession(ledger, RUN_ID, "0", order=Order.ORDINAL, attempt_max=5)
        second.acquire()
        assert refusal_of(lambda: second.extend([SourceBlock(0, 6, "6 prompts")])) == ""
        assert [lease.ordinal for lease in second.lease(2)] == [0, 1]

    # -- heads -----------------------------------------------------------------------------

    def test_a_checkpoint_makes_acks_up_to_its_step_durable(self) -> None:
        """The head is the commit point of every step it covers, and of no later one."""
        ledger = self.make()
        capture(producer_of(ledger), 0, 1, 2)
        training = Training(consumer_of(ledger))
        training.step(0)
        training.step(1)
        record = checkpoint_of(training.lineage)
        training.step(2)
        training.consumer.head(record)
        assert [r.durable for r in ledger.find(ids_of(0, 1, 2)).values()] == [True, True, False]
        assert ledger.snapshot().head == record
        assert ledger.snapshot().trained_step == 3

    def test_checkpoints_form_a_growing_chain(self) -> None:
        """A checkpoint behind the head is refused, and the head is never forgotten."""
        ledger = self.make()
        training = Training(consumer_of(ledger))
        one = training.step()
        first = training.checkpoint()
        training.step()
        second = training.checkpoint()
        training.consumer.head(second)  # a retry after an unknown result
        for behind in (first, checkpoint_of([one, trained_step(2)], name="another")):
            with pytest.raises(IllegalTransitionError):
                training.consumer.head(behind)
        training.consumer.retire(2)
        assert training.consumer.checkpoints() == (first, second)
        for keep in (1, 0):
            training.consumer.retire(keep)
            assert training.consumer.checkpoints() == (second,)

    def test_a_head_must_tell_the_story_of_the_plans(self) -> None:
        """A checkpoint whose chain is not that of the recorded plans never becomes head."""
        ledger = self.make()
        capture(producer_of(ledger), 0, 1, 2)
        training = Training(consumer_of(ledger))
        one = training.step(0)
        training.step(1, 2)
        with pytest.raises(IllegalTransitionError, match="plans on record"):
            training.consumer.head(checkpoint_of([one, trained_step(2, 1)]))
        assert training.checkpoint() == ledger.snapshot().head

    def test_falling_back_undoes_later_acks_and_asks_for_lost_features(self) -> None:
        """Samples released under a damaged head must be captured again, at their old places."""
        ledger = self.make()
        producer = producer_of(ledger, prompts=3)
        ids = capture(producer, 0, 1, 2)
        training = Training(consumer_of(ledger))
        training.step(0)
        first = training.checkpoint()
        training.step(1)
        training.checkpoint()
        ledger.release(training.consumer.fence.call(90), ids[:2], 0)
        assert ledger.fall_back(training.consumer.fence.call(91), 1) == [ids[1]]
        assert ledger.snapshot().checkpoints == (first,)
        assert [r.durable for r in ledger.find(ids).values()] == [True, False, False]
        assert [e.state for e in ledger.read(0, 3).entries] == [State.RELEASED, State.LOST, State.PRESENT]
        assert producer.lease(3) == [Lease(1)]
        [ref] = refs_of(producer, 1, num_bytes=8)
        assert producer.commit([ref]) == [ref]
        assert ledger.read(1, 2).entries[0].ref.estimated_bytes == 8

    # -- rolling forward -------------------------------------------------------------------

    def test_a_newer_checkpoint_rolls_the_ledger_forward(self) -> None:
        """Its lineage is entered: what the ledger had, and what it forgot."""
        ledger = self.make()
        producer = producer_of(ledger, prompts=4)
        ids = capture(producer, 0) + ids_of(1, 2)
        consumer = consumer_of(ledger)
        lineage = [trained_step(1, 0), trained_step(2, 1, 2)]
        consumer.adopt(checkpoint_of(lineage), lineage)
        assert [e.sample_id for e in ledger.read(0, 9).entries] == ids
        assert all(record.durable for record in ledger.find(ids).values())
        assert ledger.snapshot().trained_step == 2
        assert list(ledger.history()) == lineage
        assert list(producer.ownership().present) == ids[:1], "its features may be freed; others have none"
        assert [lease.ordinal for lease in producer.lease(9)] == [3]
        assert producer.commit(refs_of(producer, 1)) == []
        refs = refs_of(producer, 3)
        assert producer.commit(refs) == refs
        assert ledger.snapshot().prompts == PromptCounts(done=4)

    def test_a_ledger_that_forgot_its_order_takes_it_from_the_lineage(self) -> None:
        """Samples that came without prompts keep their turns of arrival, and others may follow."""
        ledger = self.make()
        samples = tuple(TrainedSample(place, id_of(place), None, True) for place in (0, 1))
        lineage = [TrainedStep(1, 0, samples)]
        consumer_of(ledger).adopt(checkpoint_of(lineage), lineage)
        assert ledger.snapshot().order == Order.ARRIVAL
        assert ledger.commit(None, [sample_ref(2)]) == [True]
        assert [entry.sample_id for entry in ledger.read(0, 9).entries] == ids_of(0, 1, 2)

    def test_what_a_forgotten_lineage_passed_over_stays_a_hole(self) -> None:
        """It had failed there, so it is not captured here, where its place has been read."""
        ledger = self.make()
        producer = producer_of(ledger, prompts=4)
        producer.lease(1)
        refs = refs_of(producer, 0)
        consumer = consumer_of(ledger)
        lineage = [trained_step(1, 2)]
        consumer.adopt(checkpoint_of(lineage), lineage)
        assert list(ledger.failed()) == [0, 1]
        assert "passed over" in ledger.failed()[0]
        assert producer.commit(refs) == []
        assert ledger.read(0, 9).settled == 3
        assert [lease.ordinal for lease in producer.lease(9)] == [3]

    def test_a_forgotten_sample_with_visits_left_is_captured_again(self) -> None:
        """Rolling forward needs its features once more."""
        ledger = self.make()
        producer = producer_of(ledger, prompts=2)
        lineage = [trained_step(1, 0, 1, finished=())]
        consumer_of(ledger).adopt(checkpoint_of(lineage), lineage)
        assert [record.sample_id for record in producer.lost()] == ids_of(0, 1)
        assert [lease.ordinal for lease in producer.lease(9)] == [0, 1]
        refs = refs_of(producer, 0, 1)
        assert producer.commit(refs) == refs
        assert ledger.snapshot().prompts == PromptCounts(done=2)

    def test_a_lineage_that_contradicts_the_ledger_is_refused(self) -> None:
        """Another plan, another place in the log, a gap, a wrong chain: nothing is changed."""
        ledger = self.make()
        capture(producer_of(ledger), 0, 1)
        consumer = consumer_of(ledger)
        consumer.plan(plan_of(1, 0))
        good = trained_step(1, 0)
        misplaced = TrainedStep(1, 0, (TrainedSample(1, id_of(0), 1, True),))
        twice = TrainedStep(2, 0, (TrainedSample(0, id_of(0), 0, True),))
        for lineage in ([trained_step(1, 1)], [misplaced], [good, trained_step(3, 1)], [good, twice]):
            with pytest.raises(IllegalTransitionError):
                consumer.adopt(checkpoint_of(lineage), lineage)
        with pytest.raises(IllegalTransitionError, match="chain"):
            consumer.adopt(checkpoint_of([good, trained_step(2, 1)]), [good, trained_step(2, 0)])
        assert (ledger.snapshot().checkpoints, ledger.snapshot().committed) == ((), 2)
        assert not any(record.durable for record in ledger.find(ids_of(0, 1)).values())
        consumer.adopt(checkpoint_of([good]), [good])

    def test_a_lineage_may_know_a_revision_that_the_ledger_forgot(self) -> None:
        """Power failed after the quarantine and before the revised plan was on the disk."""
        ledger = self.make()
        capture(producer_of(ledger), 0, 1)
        consumer = consumer_of(ledger)
        consumer.plan(plan_of(1, 0, 1))
        consumer.quarantine([id_of(1)], step=1, reason="bad")
        revised = trained_step(1, 0, rev=1)
        consumer.adopt(checkpoint_of([revised]), [revised])
        assert ledger.step_plan(1) == revised.plan
        consumer.plan(plan_of(2, rev=1))
        older = trained_step(2, 0)
        with pytest.raises(IllegalTransitionError, match="planned otherwise"):
            consumer.adopt(checkpoint_of([older], checkpoint_of([revised]).chain), [older])

    def test_adopted_weights_contain_what_their_lineage_says_and_nothing_else(self) -> None:
        """A provisional ack of a revision that they do not contain is undone."""
        ledger = self.make()
        capture(producer_of(ledger), 0, 1)
        training = Training(consumer_of(ledger))
        training.step(0, 1)
        revised = trained_step(1, 1, rev=1)
        training.consumer.adopt(checkpoint_of([revised]), [revised])
        assert [r.durable for r in ledger.find(ids_of(0, 1)).values()] == [False, True]

    # -- the archive -----------------------------------------------------------------------

    def test_history_is_archived_and_stays_readable(self) -> None:
        """What trained weights contain is never committed again, and told to people who ask."""
        ledger = self.make()
        producer = producer_of(ledger, prompts=4)
        ids = capture(producer, 0, 1, 2)
        training = Training(consumer_of(ledger))
        trained = training.step(1, 0)
        training.checkpoint(first_place=2)
        ledger.release(training.consumer.fence.call(90), ids[:2], 0)
        assert [ledger.retire(training.consumer.fence.call(op), 9) for op in (91, 92)] == [2, 0]
        assert list(ledger.find(ids)) == ids[2:]
        assert list(ledger.history()) == list(ledger.history(step=1)) == [trained]
        assert list(ledger.history(sample_id=ids[0])) == [trained]
        assert [e.sample_id for e in ledger.read(2, 9).entries] == ids[2:]
        assert producer.commit(refs_of(producer, 0)) == []
        assert ledger.snapshot().committed == 3
        assert ledger.snapshot().prompts == PromptCounts(pending=1, done=3)
        with pytest.raises(IllegalTransitionError, match="archived"):
            ledger.fall_back(training.consumer.fence.call(93), 0)
        with pytest.raises(IllegalTransitionError, match="archived"):
            training.consumer.ledger.plan(training.consumer.fence.call(94), plan_of(1, 0))
        assert producer.extend([SourceBlock(0, 4, "4 prompts"), SourceBlock(4, 1, "one")]) == 1

    def test_what_a_resume_would_read_is_not_archived(self) -> None:
        """Places from the oldest checkpoint's first one on keep their rows, trained or not."""
        ledger = self.make()
        ids = capture(producer_of(ledger), 0, 1, 2)
        training = Training(consumer_of(ledger))
        training.step(0, 1, 2)
        training.checkpoint(first_place=1)
        ledger.release(training.consumer.fence.call(90), ids, 0)
        ledger.retire(training.consumer.fence.call(91), 9)
        assert [e.sample_id for e in ledger.read(1, 9).entries] == ids[1:]

    def test_an_archived_visit_licenses_no_commit_of_a_sample_that_is_still_there(self) -> None:
        """In arrival order the archive is searched for ids, and holds those of lost samples, too."""
        ledger = self.make()
        producer = ProducerSession(ledger, RUN_ID, order=Order.ARRIVAL)
        producer.acquire()
        producer.extend([SourceBlock(0, 3, "3 prompts")])
        capture(producer, 0, 1)
        training = Training(consumer_of(ledger))
        training.step(0, 1)
        producer.report_lost([id_of(1)])
        training.checkpoint(first_place=2)
        ledger.release(training.consumer.fence.call(90), [id_of(0)], 0)
        ledger.retire(training.consumer.fence.call(91), 9)
        assert [step.step for step in ledger.history(sample_id=id_of(1))] == [1]
        [other] = refs_of(producer, 2)
        with pytest.raises(IntentRevokedError):
            producer.commit([replace(sample_ref(1, ordinal=1), generation=other.generation)])

    # -- samples that cannot be trained ----------------------------------------------------

    def test_a_quarantined_sample_is_terminal_and_keeps_its_reason(self) -> None:
        """It is waited for no more, not lost, not committed again, and listed."""
        ledger = self.make()
        producer = producer_of(ledger, prompts=2)
        ids = capture(producer, 0, 1)
        consumer = consumer_of(ledger)
        consumer.quarantine(ids[:1], step=1, reason="loss is nan")
        consumer.report_lost(ids[:1])
        [record] = ledger.find(state=State.QUARANTINED).values()
        assert (record.sample_id, record.step, record.reason) == (ids[0], 1, "loss is nan")
        assert ledger.snapshot().usage.waiting_samples == 1
        assert producer.lost() == []
        assert producer.commit(refs_of(producer, 0)) == []
        consumer_of(ledger)
        assert [e.state for e in ledger.read(0, 2).entries] == [State.QUARANTINED, State.PRESENT]

    def test_a_quarantined_samples_features_stay_until_a_checkpoint_covers_it(self) -> None:
        """Steps before the one that quarantined it may be replayed with it."""
        ledger = self.make()
        ids = capture(producer_of(ledger), 0, 1)
        training = Training(consumer_of(ledger))
        fence = training.consumer.fence
        training.consumer.quarantine(ids[:1], step=2, reason="x")
        training.consumer.quarantine(ids[1:], step=None, reason="never planned")
        assert list(ledger.release(fence, [], 9)) == ids[1:]
        training.step()
        training.checkpoint()
        with pytest.raises(IllegalTransitionError):
            ledger.release(fence.call(90), ids[:1], 0)
        ledger.plan(fence.call(91), plan_of(2))
        ledger.plan(fence.call(92), None, StepAck(2, 0, ()))
        ledger.head(fence.call(93), checkpoint_of([trained_step(1), trained_step(2)]))
        assert list(ledger.release(fence, [], 9)) == ids
        ledger.release(fence.call(94), ids, 0)
        assert ledger.ownership().present == {}
        assert len(ledger.find(state=State.QUARANTINED).values()) == 2

    def test_durable_weights_are_not_put_in_quarantine(self) -> None:
        """A sample that they contain is trained; that cannot be taken back."""
        ledger = self.make()
        ids = capture(producer_of(ledger), 0)
        training = Training(consumer_of(ledger))
        training.step(0)
        training.checkpoint()
        training.consumer.quarantine(ids, step=1, reason="too late")
        assert ledger.find(state=State.QUARANTINED) == {}

    def test_a_lost_sample_whose_prompt_fails_for_good_is_quarantined(self) -> None:
        """It will never come back, so no consumer must wait for it; its place is no hole."""
        ledger = self.make()
        producer = producer_of(ledger, prompts=1, attempt_max=1)
        [sample_id] = capture(producer, 0)
        producer.report_lost([sample_id])
        producer.lease(1)
        assert producer.fail([0], "the engine failed") == [0]
        [record] = ledger.find(state=State.QUARANTINED).values()
        assert (record.sample_id, record.reason) == (sample_id, "the engine failed")
        assert ledger.snapshot().usage.waiting_samples == 0
        assert [e.sample_id for e in ledger.read(0, 1).entries] == [sample_id]

    def test_a_lost_sample_that_weights_came_to_contain_does_not_fail_with_its_prompt(self) -> None:
        """Nothing needs it again, so its durable ack stands, and its group keeps its members."""
        ledger = self.make()
        producer = producer_of(ledger, prompts=1, attempt_max=1)
        [sample_id] = capture(producer, 0)
        training = Training(consumer_of(ledger))
        training.step(0)
        producer.report_lost([sample_id])
        producer.lease(1)
        training.checkpoint()
        assert producer.fail([0], "the engine failed") == []
        assert ledger.find([sample_id])[sample_id].state == State.RELEASED
        assert ledger.find([sample_id])[sample_id].durable
        assert ledger.failed() == {}
        assert producer.end_stream()

    def test_a_lost_sample_in_quarantine_is_not_captured_again(self) -> None:
        """Its prompt has not failed: other samples of its group are captured with it, as before."""
        ledger = self.make()
        producer = producer_of(ledger, prompts=1)
        ids = capture(producer, 0)
        producer.report_lost(ids)
        consumer_of(ledger).quarantine(ids, step=3, reason="damaged again and again")
        assert producer.lease(1) == []
        assert ledger.failed() == {}
        assert producer.end_stream()
