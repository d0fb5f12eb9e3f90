"""What every metadata store must do when processes die, results get lost and samples are poison."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import pytest

from paceline.errors import FencedError, IllegalTransitionError, IntentRevokedError
from paceline.ledger.records import (
    BegunStep,
    CheckpointRecord,
    Intent,
    StepAck,
    StepPlan,
    TrainedSample,
    TrainedStep,
    chain_of,
)
from paceline.ledger.store import MetadataStore
from paceline.testing.samples import sample_ref


def trained(step: int, *numbers: int, finished: bool = True) -> TrainedStep:
    """Step `step` of samples `numbers`, whose seqs are number + 1."""
    samples = [TrainedSample(n + 1, f"run0:s{n}", f"task-{n}", finished) for n in numbers]
    return TrainedStep(step, 0, max(numbers) + 1, tuple(samples))


def checkpoint_of(lineage: Sequence[TrainedStep], before: str = "") -> CheckpointRecord:
    last = lineage[-1]
    chain = chain_of(before, [step.plan for step in lineage])
    return CheckpointRecord(last.step, f"step-{last.step}", f"digest-{last.step}", last.last_seq, chain)


class MetadataProtocolSuite(ABC):
    @abstractmethod
    def make(self) -> MetadataStore:
        """A new, empty store."""

    # -- byte intents ----------------------------------------------------------------------

    def test_bytes_are_reserved_before_they_are_written(self) -> None:
        """An intent counts as occupied, names a generation of its own, and ends with the commit."""
        store = self.make()
        generations = store.reserve({"run0:s0": 10, "run0:s1": 20})
        assert len(set(generations.values())) == 2
        assert store.intents() == [
            Intent(generations["run0:s0"], "run0:s0", 10),
            Intent(generations["run0:s1"], "run0:s1", 20),
        ]
        assert (store.usage().reserved_samples, store.usage().reserved_bytes) == (2, 30)
        assert store.commit_sample(replace(sample_ref(0), generation=generations["run0:s0"]))
        assert [intent.sample_id for intent in store.intents()] == ["run0:s1"]
        assert store.present_generations() == {"run0:s0": generations["run0:s0"]}

    def test_a_generation_is_never_used_twice(self) -> None:
        """Also not after the intent was revoked, or the role taken over."""
        store = self.make()
        first = store.reserve({"a": 1})["a"]
        store.revoke([first])
        second = store.reserve({"a": 1})["a"]
        store.acquire_role("producer", "next")
        assert first < second < store.reserve({"a": 1})["a"]

    def test_a_commit_of_a_revoked_intent_is_refused_whole(self) -> None:
        """Its bytes may be deleted by now; nothing of the batch counts, not even what is sound."""
        store = self.make()
        generations = store.reserve({"run0:s0": 1, "run0:s1": 1})
        refs = [replace(sample_ref(n), generation=generations[f"run0:s{n}"]) for n in (0, 1)]
        store.revoke([refs[1].generation])
        with pytest.raises(IntentRevokedError, match="run0:s1"):
            store.commit_samples(refs)
        assert store.committed_count() == 0
        assert len(store.intents()) == 1

    def test_an_intent_is_of_one_sample(self) -> None:
        """Another sample cannot be committed under it."""
        store = self.make()
        generation = store.reserve({"run0:s0": 1})["run0:s0"]
        with pytest.raises(IntentRevokedError):
            store.commit_sample(replace(sample_ref(1), generation=generation))

    def test_a_new_producer_inherits_no_intents(self) -> None:
        """A dead producer's bytes are given up in the very transaction that replaces it."""
        store = self.make()
        fence = store.acquire_role("producer", "first")
        generation = store.reserve({"run0:s0": 1}, fence=fence)["run0:s0"]
        store.acquire_role("producer", "second")
        assert store.intents() == []
        with pytest.raises(IntentRevokedError):
            store.commit_sample(replace(sample_ref(0), generation=generation))

    def test_a_second_commit_under_a_new_generation_loses(self) -> None:
        """The first bytes stay the sample's; the loser's intent ends, its bytes are an orphan."""
        store = self.make()
        one, two = store.reserve({"run0:s0": 1})["run0:s0"], store.reserve({"run0:s0": 1})["run0:s0"]
        assert store.commit_sample(replace(sample_ref(0), generation=one)) is True
        assert store.commit_sample(replace(sample_ref(0), generation=two)) is False
        assert store.present_generations() == {"run0:s0": one}
        assert store.intents() == []

    def test_a_late_retry_of_a_lost_samples_commit_does_not_bring_it_back(self) -> None:
        """The ref of bytes that were reported lost is not fresh; one of a new generation is."""
        store = self.make()
        old = replace(sample_ref(0), generation=store.reserve({"run0:s0": 1})["run0:s0"])
        store.commit_sample(old)
        store.report_lost([old.sample_id])
        assert store.commit_sample(old) is False
        assert store.lost_ids() == [old.sample_id]
        new = replace(old, generation=store.reserve({"run0:s0": 1})["run0:s0"])
        assert store.commit_sample(new) is True
        assert store.present_generations() == {new.sample_id: new.generation}

    def test_a_lost_sample_that_weights_came_to_contain_is_not_committed_again(self) -> None:
        """Its bytes were read before they were lost; those captured again would never be freed."""
        store = self.make()
        store.add_tasks(["task-0"])
        store.commit_sample(sample_ref(0))
        store.report_lost(["run0:s0"])
        new = replace(sample_ref(0), generation=store.reserve({"run0:s0": 1})["run0:s0"])
        store.record_train_ack(["run0:s0"], global_step=1, optimizer_durable=True)
        assert store.commit_sample(new) is False
        assert (store.lost_ids(), store.present_ids(), store.intents()) == ([], [], [])
        assert store.task_counts()["done"] == 1

    def test_generations_that_an_older_copy_never_gave_out_are_skipped(self) -> None:
        """A ledger was restored from a backup, and the bytes that were reserved since are still there."""
        store = self.make()
        old = store.acquire_role("producer", "old")
        fence = store.acquire_role("producer", "new")
        assert store.skip_generations(41, fence=fence) == replace(fence, generation=42)
        assert store.reserve({"run0:s0": 1}, fence=fence) == {"run0:s0": 42}
        assert store.skip_generations(7, fence=fence).generation == 43
        with pytest.raises(FencedError):
            store.skip_generations(99, fence=old)

    def test_of_two_who_settle_a_fact_the_first_one_does(self) -> None:
        """All of it or nothing: two first starts with different configurations, at the same moment."""
        store = self.make()
        old = store.acquire_role("producer", "old")
        fence = store.acquire_role("producer", "new")
        with pytest.raises(FencedError):
            store.settle_facts({"config": 0}, fence=old)
        assert store.settle_facts({"config": (1, 2), "prompts": "a"}, fence=fence) == {
            "config": [1, 2],
            "prompts": "a",
        }
        assert store.settle_facts({"config": 3, "more": 4}) == {"config": [1, 2]}
        assert store.facts() == {"config": [1, 2], "prompts": "a"}

    # -- op ids ----------------------------------------------------------------------------

    def test_a_repeated_call_returns_what_the_first_one_did(self) -> None:
        """After an unknown result the caller repeats it: nothing happens twice, the answer is the same."""
        store = self.make()
        store.add_tasks(["a", "b"])
        leases = store.lease_tasks("w", 1, op_id="op-1")
        generations = store.reserve({"run0:s0": 1}, op_id="op-2")
        fresh = store.commit_samples([sample_ref(0)], op_id="op-3")
        begun = store.begin_step(StepPlan(1, ("run0:s0",), 1), op_id="op-4")
        store.ack_step(StepAck(1, 0, ("run0:s0",)), op_id="op-5")
        before = store.lsn()
        assert store.lease_tasks("w", 1, op_id="op-1") == leases
        assert store.reserve({"run0:s0": 1}, op_id="op-2") == generations
        assert store.commit_samples([sample_ref(0)], op_id="op-3") == fresh == [True]
        assert store.begin_step(StepPlan(1, ("run0:s0",), 1), op_id="op-4") == begun
        store.ack_step(StepAck(1, 0, ("run0:s0",)), op_id="op-5")
        assert store.lsn() == before
        assert store.task_counts()["leased"] == 1

    # -- steps -----------------------------------------------------------------------------

    def test_steps_are_acked_one_after_another(self) -> None:
        """An ack that skips, repeats, or names another revision than planned is refused."""
        store = self.make()
        for step in (1, 2):
            store.begin_step(StepPlan(step, (f"s{step}",), step))
        with pytest.raises(IllegalTransitionError, match="step 2"):
            store.ack_step(StepAck(2, 0, ("s2",)))
        with pytest.raises(IllegalTransitionError, match="revision"):
            store.ack_step(StepAck(1, 1, ("s1",)))
        store.ack_step(StepAck(1, 0, ("s1",)))
        assert store.trained_step() == 1
        with pytest.raises(IllegalTransitionError):
            store.ack_step(StepAck(1, 0, ("s1",)))
        store.ack_step(StepAck(2, 0, ("s2",)))
        with pytest.raises(IllegalTransitionError, match="none"):
            store.ack_step(StepAck(3, 0, ()))

    def test_an_ack_goes_with_the_plan_of_the_next_step(self) -> None:
        """In one transaction: both, or, if either is refused, neither; repeated, once."""
        store = self.make()
        store.commit_samples([sample_ref(0), sample_ref(1)])
        old = store.acquire_role("consumer", "old")
        fence = store.acquire_role("consumer", "new")
        first, second = (StepPlan(n, (f"run0:s{n - 1}",), 2) for n in (1, 2))
        store.begin_step(first, fence=fence)
        with pytest.raises(IllegalTransitionError, match="revision"):
            store.begin_step(second, ack=StepAck(1, 1, ("run0:s0",)), fence=fence)
        with pytest.raises(FencedError):
            store.begin_step(second, ack=StepAck(1, 0, ("run0:s0",)), fence=old)
        assert (store.trained_step(), store.get_plan(2)) == (0, None)
        ack, before = StepAck(1, 0, ("run0:s0",)), store.lsn()
        begun = store.begin_step(second, ack=ack, fence=fence, op_id="op-1")
        assert store.begin_step(second, ack=ack, fence=fence, op_id="op-1") == begun == BegunStep(second, 0)
        assert (store.trained_step(), store.lsn()) == (1, before + 1)
        assert store.durable_marker()["acked"] == {"run0:s0"}
        assert store.usage().waiting_samples == 1
        store.acquire_role("consumer", "next")
        assert [store.begin_step(plan).deaths for plan in (first, second)] == [0, 1]

    def test_a_new_consumer_trains_on_from_the_head(self) -> None:
        """Steps after the head are to be acked again."""
        store = self.make()
        for step in (1, 2):
            store.begin_step(StepPlan(step, (f"s{step}",), step))
            store.ack_step(StepAck(step, 0, (f"s{step}",)))
            if step == 1:
                store.record_checkpoint(CheckpointRecord(1, "one", "d", 1))
        store.acquire_role("consumer", "next")
        assert store.trained_step() == 1
        store.ack_step(StepAck(2, 0, ("s2",)))

    def test_a_revised_plan_replaces_the_one_before(self) -> None:
        """Without the poison; not backwards, and not once the step is acked."""
        store = self.make()
        first, revised = StepPlan(1, ("a", "b"), 2), StepPlan(1, ("a",), 2, rev=1)
        store.begin_step(first)
        assert store.begin_step(revised).plan == revised
        assert store.begin_step(first).plan == revised
        assert revised.digest != StepPlan(1, ("a",), 2).digest
        store.ack_step(StepAck(1, 1, ("a",)))
        assert store.begin_step(StepPlan(1, (), 2, rev=2)).plan == revised

    def test_deaths_in_a_step_are_counted(self) -> None:
        """Begun and neither acked nor left when the next consumer comes: that one died in it."""
        store = self.make()
        plan = StepPlan(1, ("a",), 1)
        for deaths in (0, 1, 2):
            store.acquire_role("consumer", "c")
            assert store.begin_step(plan) == BegunStep(plan, deaths)
        store.leave_step(1)
        store.acquire_role("consumer", "c")
        assert store.begin_step(plan).deaths == 2
        store.ack_step(StepAck(1, 0, ("a",)))
        store.acquire_role("consumer", "c")
        assert store.begin_step(plan).deaths == 0

    def test_deaths_with_a_lease_are_counted(self) -> None:
        """A prompt whose capture kills the process shows in its lease; one handed back does not."""
        store = self.make()
        store.add_tasks(["a", "b"])
        store.acquire_role("producer", "p")
        store.lease_tasks("w", 2)
        store.return_tasks("w", ["b"])
        store.return_tasks("somebody else", ["a"])
        store.acquire_role("producer", "p")
        assert [(x.task_id, x.deaths) for x in store.lease_tasks("w", 2)] == [("a", 1), ("b", 0)]

    # -- heads -----------------------------------------------------------------------------

    def test_a_head_must_tell_the_story_of_the_plans(self) -> None:
        """A checkpoint whose chain is not that of the recorded plans never becomes head."""
        store = self.make()
        store.commit_samples([sample_ref(n) for n in range(3)])
        one, two = trained(1, 0), trained(2, 1, 2)
        for step in (one, two):
            store.begin_step(step.plan)
            store.ack_step(StepAck(step.step, 0, tuple(s.sample_id for s in step.samples)))
        with pytest.raises(IllegalTransitionError, match="plans on record"):
            store.record_checkpoint(checkpoint_of([one, trained(2, 1)]))
        head = checkpoint_of([one, two])
        store.record_checkpoint(head)
        store.record_checkpoint(head)  # a retry after an unknown result
        assert store.checkpoints() == [head]

    def test_a_newer_checkpoint_rolls_the_ledger_forward(self) -> None:
        """Its lineage is entered: what the ledger had, and what it forgot."""
        store = self.make()
        store.add_tasks([f"task-{n}" for n in range(4)])
        store.commit_samples([sample_ref(0)])
        lineage = [trained(1, 0), trained(2, 1, 2)]
        store.adopt_checkpoint(checkpoint_of(lineage), lineage)
        ids = [f"run0:s{n}" for n in range(3)]
        assert store.all_committed_ids() == ids
        assert store.durable_marker() == {"acked": set(ids), "global_step": 2, "optimizer_durable": True}
        assert store.trained_step() == 2
        assert list(store.plans()) == [step.plan for step in lineage]
        assert store.present_ids() == ids[:1], "its features may be freed; the others have none"
        assert [lease.task_id for lease in store.lease_tasks("w", 9)] == ["task-3"]
        assert store.commit_sample(sample_ref(1)) is False
        assert store.commit_sample(sample_ref(3)) is True
        assert store.all_committed_ids()[3] == "run0:s3"

    def test_a_forgotten_sample_with_visits_left_is_captured_again(self) -> None:
        """Rolling forward needs its features once more."""
        store = self.make()
        store.add_tasks(["task-0", "task-1"])
        lineage = [trained(1, 0, 1, finished=False)]
        store.adopt_checkpoint(checkpoint_of(lineage), lineage)
        assert store.lost_ids() == ["run0:s0", "run0:s1"]
        assert [lease.ordinal for lease in store.lease_tasks("w", 9)] == [0, 1]
        assert store.commit_samples([sample_ref(0), sample_ref(1)]) == [True, True]
        assert store.task_counts() == {"pending": 0, "leased": 0, "done": 2, "failed": 0}

    def test_a_lineage_that_contradicts_the_ledger_is_refused(self) -> None:
        """Another plan, another place in the log, a gap, a wrong chain: nothing is changed."""
        store = self.make()
        store.commit_samples([sample_ref(0), sample_ref(1)])
        store.begin_step(StepPlan(1, ("run0:s0",), 1))
        good = trained(1, 0)
        misplaced = TrainedStep(1, 0, 1, (TrainedSample(2, "run0:s0", None, True),))
        for lineage in ([trained(1, 1)], [misplaced], [good, trained(3, 1)], [good, trained(2, 3)]):
            with pytest.raises(IllegalTransitionError):
                store.adopt_checkpoint(checkpoint_of(lineage), lineage)
        with pytest.raises(IllegalTransitionError, match="chain"):
            store.adopt_checkpoint(checkpoint_of([good, trained(2, 1)]), [good, trained(2, 0)])
        assert store.checkpoints() == []
        assert store.committed_count() == 2
        assert store.durable_marker()["acked"] == set()
        store.adopt_checkpoint(checkpoint_of([good]), [good])

    def test_a_lineage_may_know_a_revision_that_the_ledger_forgot(self) -> None:
        """Power failed after the quarantine and before the revised plan was on the disk."""
        store = self.make()
        store.commit_samples([sample_ref(0), sample_ref(1)])
        store.begin_step(StepPlan(1, ("run0:s0", "run0:s1"), 2))
        store.quarantine(["run0:s1"], step=1, reason="poison")
        revised = TrainedStep(1, 1, 2, trained(1, 0).samples)
        store.adopt_checkpoint(checkpoint_of([revised]), [revised])
        assert store.get_plan(1) == revised.plan
        older = TrainedStep(2, 0, 2, trained(2, 0).samples)
        store.begin_step(StepPlan(2, (), 2, rev=1))
        with pytest.raises(IllegalTransitionError, match="planned otherwise"):
            store.adopt_checkpoint(checkpoint_of([older], checkpoint_of([revised]).chain), [older])

    # -- poison ----------------------------------------------------------------------------

    def test_a_quarantined_sample_is_terminal_and_keeps_its_reason(self) -> None:
        """It is waited for no more, not lost, not committed again, and listed."""
        store = self.make()
        store.add_tasks(["task-0", "task-1"])
        store.lease_tasks("w", 2)
        store.commit_samples([sample_ref(0), sample_ref(1)])
        store.quarantine(["run0:s0"], step=1, reason="loss is nan")
        store.report_lost(["run0:s0"])
        assert store.quarantined() == {"run0:s0": "loss is nan"}
        assert store.quarantined(among=["run0:s0", "run0:s1"]) == {"run0:s0": "loss is nan"}
        assert store.quarantined(among=["run0:s1"]) == store.quarantined(among=[]) == {}
        assert store.usage().waiting_samples == 1
        assert store.lost_ids() == []
        assert store.commit_sample(sample_ref(0)) is False
        record = store.sample_record("run0:s0")
        assert record is not None
        assert (record.state, record.step, record.reason) == ("quarantined", 1, "loss is nan")
        assert [e.quarantined for e in store.read_committed(0, 2)] == [True, False]
        store.acquire_role("consumer", "next")
        assert list(store.quarantined()) == ["run0:s0"]

    def test_a_quarantined_samples_features_stay_until_a_checkpoint_covers_it(self) -> None:
        """Steps before the one that convicted it may be replayed with it."""
        store = self.make()
        store.commit_samples([sample_ref(0), sample_ref(1)])
        store.quarantine(["run0:s0"], step=2, reason="x")
        store.quarantine(["run0:s1"], step=None, reason="never planned")
        assert store.releasable(9) == ["run0:s1"]
        store.record_checkpoint(CheckpointRecord(1, "one", "d", 1))
        with pytest.raises(IllegalTransitionError):
            store.record_released(["run0:s0"])
        store.record_checkpoint(CheckpointRecord(2, "two", "d", 2))
        assert store.begin_release(9) == {"run0:s0": 0, "run0:s1": 0}
        store.record_released(["run0:s0", "run0:s1"])
        assert store.present_ids() == []
        assert len(store.quarantined()) == 2

    def test_durable_weights_are_not_put_in_quarantine(self) -> None:
        """A sample that they contain is trained; that cannot be taken back."""
        store = self.make()
        store.commit_sample(sample_ref(0))
        store.record_train_ack(["run0:s0"], global_step=1, optimizer_durable=True)
        store.quarantine(["run0:s0"], step=1, reason="too late")
        assert store.quarantined() == {}

    def test_a_lost_sample_whose_prompt_fails_for_good_is_quarantined(self) -> None:
        """It will never come back, so nobody must wait for it."""
        store = self.make()
        store.add_tasks(["task-0"])
        store.lease_tasks("w", 1)
        store.commit_sample(sample_ref(0))
        store.report_lost(["run0:s0"])
        store.lease_tasks("w", 1)
        assert store.fail_tasks("w", ["task-0"], reason="the engine failed", attempt_max=1) == ["task-0"]
        assert store.quarantined() == {"run0:s0": "the engine failed"}
        assert store.usage().waiting_samples == 0

    def test_a_lost_sample_of_no_prompt_is_lost(self) -> None:
        """Also if somebody else committed it for a prompt, which he then has done."""
        store = self.make()
        store.add_tasks(["task-0"])
        assert store.commit_sample(replace(sample_ref(0), source_task_id=None))
        assert not store.commit_sample(sample_ref(0))
        store.report_lost(["run0:s0"])
        assert store.lost_ids() == ["run0:s0"]

    def test_a_lost_sample_in_quarantine_is_not_captured_again(self) -> None:
        """Its prompt is set aside with the same reason."""
        store = self.make()
        store.add_tasks(["task-0"])
        store.lease_tasks("w", 1)
        store.commit_sample(sample_ref(0))
        store.report_lost(["run0:s0"])
        store.quarantine(["run0:s0"], step=3, reason="damaged again and again")
        assert store.lease_tasks("w", 1) == []
        assert store.failed_tasks() == {"task-0": "damaged again and again"}
