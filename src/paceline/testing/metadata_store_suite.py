"""What every metadata store must do. Subclass it, give `make`, and pytest runs the rest."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace

import pytest

from paceline.errors import FencedError, IllegalTransitionError
from paceline.ledger.records import CheckpointRecord, SampleRecord, StepAck, StepPlan
from paceline.ledger.store import MetadataStore
from paceline.testing.samples import sample_ref
from paceline.types import SampleRef


def commit(store: MetadataStore, *numbers: int) -> list[str]:
    refs = [sample_ref(number) for number in numbers]
    store.commit_samples(refs)
    return [ref.sample_id for ref in refs]


def checkpoint(step: int) -> CheckpointRecord:
    return CheckpointRecord(step, f"step-{step}", f"digest-{step}", last_seq=step)


class MetadataStoreSuite(ABC):
    @abstractmethod
    def make(self) -> MetadataStore:
        """A new, empty store."""

    # -- samples ---------------------------------------------------------------------------

    def test_commit_is_idempotent_on_sample_id(self) -> None:
        """A second commit of an id is not fresh and changes nothing."""
        store = self.make()
        assert store.commit_sample(sample_ref(0)) is True
        assert store.commit_sample(sample_ref(0, num_bytes=7)) is False
        assert store.committed_count() == 1
        assert store.get_committed("run0:s0") == sample_ref(0)

    def test_commit_reports_freshness_of_each_ref(self) -> None:
        """One batch may mix new refs, old refs and the same ref twice."""
        store = self.make()
        store.commit_sample(sample_ref(1))
        refs = [sample_ref(0), sample_ref(1), sample_ref(2), sample_ref(2)]
        assert store.commit_samples(refs) == [True, False, True, False]
        assert store.commit_samples([]) == []

    def test_committed_ids_come_in_commit_order(self) -> None:
        """The committed log is the stream, so its order is the order of commit."""
        store = self.make()
        commit(store, 3, 1, 2)
        assert store.all_committed_ids() == ["run0:s3", "run0:s1", "run0:s2"]
        entries = store.read_committed(0, 10)
        assert [e.ref.sample_id for e in entries] == store.all_committed_ids()
        assert [e.seq for e in entries] == sorted(e.seq for e in entries)
        assert store.read_committed(entries[0].seq, 1) == entries[1:2]
        assert store.read_committed(entries[-1].seq, 10) == []

    def test_unknown_samples_are_not_committed(self) -> None:
        """Asking for an unknown id is an answer, not an error."""
        store = self.make()
        assert not store.is_committed("nobody")
        assert store.get_committed("nobody") is None

    def test_a_ref_survives_the_store_unchanged(self) -> None:
        """Every field of a ref, nested specs included, comes back equal."""
        store = self.make()
        ref = sample_ref(5)
        store.commit_sample(ref)
        got = store.get_committed(ref.sample_id)
        assert got == ref
        assert isinstance(got, SampleRef)
        assert got.feature_specs["hidden_states"].shape == (4, 8)

    def test_tensors_are_refused_and_nothing_is_written(self) -> None:
        """A tensor anywhere in a batch refuses the whole batch."""
        import dataclasses

        class Tensor:
            dtype, shape, device = "float32", (1,), "cpu"

        store = self.make()
        smuggler = dataclasses.replace(sample_ref(1), metadata={"deep": [{"er": Tensor()}]})
        with pytest.raises(TypeError, match="metadata only"):
            store.commit_samples([sample_ref(0), smuggler])
        assert store.committed_count() == 0

    # -- acks ------------------------------------------------------------------------------

    def test_a_durable_ack_is_marked(self) -> None:
        """The marker names the durable ids, their step, and that they are durable."""
        store = self.make()
        ids = commit(store, 0, 1, 2)
        store.record_train_ack(ids[:2], global_step=5, optimizer_durable=True)
        assert store.durable_marker() == {"acked": set(ids[:2]), "global_step": 5, "optimizer_durable": True}

    def test_a_provisional_ack_is_not_durable(self) -> None:
        """Before any durable ack the marker says that nothing is safe to release."""
        store = self.make()
        ids = commit(store, 0)
        assert store.durable_marker() == {"acked": set(), "global_step": None, "optimizer_durable": False}
        store.record_train_ack(ids, global_step=1, optimizer_durable=False)
        assert store.durable_marker() == {"acked": set(ids), "global_step": 1, "optimizer_durable": False}

    def test_a_later_provisional_ack_never_undoes_a_durable_one(self) -> None:
        """Acks are judged one by one, for other ids and for the same id."""
        store = self.make()
        a, b = commit(store, 0, 1)
        store.record_train_ack([a], global_step=1, optimizer_durable=True)
        store.record_train_ack([b], global_step=2, optimizer_durable=False)
        store.record_train_ack([a], global_step=2, optimizer_durable=False)
        assert store.durable_marker() == {"acked": {a}, "global_step": 1, "optimizer_durable": True}

    def test_a_durable_ack_covers_only_what_it_names(self) -> None:
        """A provisional ack does not become durable because another one is."""
        store = self.make()
        a, b = commit(store, 0, 1)
        store.record_train_ack([a], global_step=1, optimizer_durable=False)
        store.record_train_ack([b], global_step=2, optimizer_durable=True)
        assert store.durable_marker()["acked"] == {b}

    def test_an_id_may_be_of_a_kind_of_text(self) -> None:
        """numpy's, for instance: text is text."""

        class Text(str):
            __slots__ = ()

        store = self.make()
        ids = [Text(i) for i in commit(store, 0)]
        store.record_train_ack(ids, global_step=1, optimizer_durable=True)
        store.record_released(ids)
        assert store.present_ids() == []

    def test_a_failed_ack_leaves_the_store_usable(self) -> None:
        """An error in the middle of an ack rolls the whole ack back and leaves nothing open."""
        store = self.make()
        ids = commit(store, 0, 1)
        with pytest.raises(TypeError):
            store.record_train_ack([ids[0], object()], global_step=1, optimizer_durable=True)  # type: ignore[list-item]
        assert store.durable_marker()["acked"] == set()
        assert store.commit_sample(sample_ref(2)) is True

    # -- roles -----------------------------------------------------------------------------

    def test_an_old_epoch_is_fenced_on_every_mutation(self) -> None:
        """A process that was taken over cannot change anything any more."""
        store = self.make()
        ids = commit(store, 0)
        store.add_tasks(["t"])
        old_p, old_c = store.acquire_role("producer", "a"), store.acquire_role("consumer", "a")
        store.acquire_role("producer", "b")
        store.acquire_role("consumer", "b")
        before = store.lsn()
        attempts: list[Callable[[], object]] = [
            lambda: store.commit_samples([sample_ref(9)], fence=old_p),
            lambda: store.lease_tasks("w", 1, fence=old_p),
            lambda: store.fail_tasks("w", ["t"], reason="", attempt_max=None, fence=old_p),
            lambda: store.record_train_ack(ids, global_step=1, optimizer_durable=True, fence=old_c),
            lambda: store.begin_step(StepPlan(1, tuple(ids), 1), fence=old_c),
            lambda: store.record_checkpoint(checkpoint(1), fence=old_c),
            lambda: store.forget_checkpoint(1, fence=old_c),
            lambda: store.fall_back(0, fence=old_c),
            lambda: store.record_released(ids, fence=old_c),
            lambda: store.report_lost(ids, fence=old_c),
            lambda: store.set_facts({"x": 1}, fence=old_c),
            lambda: store.reserve({"s": 1}, fence=old_p),
            lambda: store.revoke([1], fence=old_p),
            lambda: store.add_tasks(["u"], fence=old_p),
            lambda: store.return_tasks("w", ["t"], fence=old_p),
            lambda: store.ack_step(StepAck(1, 0, tuple(ids)), fence=old_c),
            lambda: store.leave_step(1, fence=old_c),
            lambda: store.adopt_checkpoint(checkpoint(1), [], fence=old_c),
            lambda: store.quarantine(ids, step=1, reason="x", fence=old_c),
            lambda: store.begin_release(1, fence=old_c),
            lambda: store.compact(fence=old_c),
        ]
        for attempt in attempts:
            with pytest.raises(FencedError, match="taken over"):
                attempt()
        assert store.lsn() == before
        assert store.committed_count() == 1

    def test_a_new_consumer_inherits_no_provisional_ack(self) -> None:
        """The weights of provisional steps died with the consumer that made them."""
        store = self.make()
        a, b = commit(store, 0, 1)
        store.acquire_role("consumer", "first")
        store.record_train_ack([a], global_step=1, optimizer_durable=True)
        store.record_train_ack([b], global_step=2, optimizer_durable=False)
        store.acquire_role("consumer", "second")
        assert store.usage().waiting_samples == 1
        assert store.durable_marker()["acked"] == {a}
        assert store.role_epochs() == {"consumer": 2}

    # -- prompt tasks ----------------------------------------------------------------------

    def test_tasks_are_leased_once_in_order(self) -> None:
        """Two workers never hold the same task, and ordinals follow the order of adding."""
        store = self.make()
        assert store.add_tasks(["a", "b", "c"]) == 3
        assert store.add_tasks(["b", "c", "d"]) == 1
        first, second = store.lease_tasks("w0", 2), store.lease_tasks("w1", 9)
        assert [(lease.task_id, lease.ordinal) for lease in first] == [("a", 0), ("b", 1)]
        assert [(lease.task_id, lease.ordinal) for lease in second] == [("c", 2), ("d", 3)]
        assert store.lease_tasks("w0", 1) == []

    def test_a_lease_can_keep_to_one_group(self) -> None:
        """Capture groups are whole: a lease does not reach over the end of the first task's group."""
        store = self.make()
        store.add_tasks(list("abcdefg"))
        store.lease_tasks("w0", 1)
        grouped = store.lease_tasks("w1", 3, group_size=3)
        assert [lease.task_id for lease in grouped] == ["b", "c"]
        assert [lease.task_id for lease in store.lease_tasks("w1", 3, group_size=3)] == ["d", "e", "f"]

    def test_a_commit_ends_its_tasks_lease(self) -> None:
        """A committed sample's prompt is done, also for a producer that comes later."""
        store = self.make()
        store.add_tasks(["task-0", "task-1"])
        store.acquire_role("producer", "first")
        store.lease_tasks("w0", 2)
        commit(store, 0)
        store.acquire_role("producer", "second")
        assert [lease.task_id for lease in store.lease_tasks("w0", 2)] == ["task-1"]
        assert store.task_counts() == {"pending": 0, "leased": 1, "done": 1, "failed": 0}

    def test_failed_tasks_return_until_their_attempts_are_used_up(self) -> None:
        """A retryable failure requeues; the last one is final and keeps its reason."""
        store = self.make()
        store.add_tasks(["a"])
        store.lease_tasks("w", 1)
        assert store.fail_tasks("w", ["a"], reason="first", attempt_max=2) == []
        [lease] = store.lease_tasks("w", 1)
        assert lease.attempt == 1
        assert store.fail_tasks("w", ["a"], reason="second", attempt_max=2) == ["a"]
        assert store.lease_tasks("w", 1) == []
        assert store.failed_tasks() == {"a": "second"}

    def test_only_the_holder_may_fail_a_task(self) -> None:
        """A worker cannot give back a lease of another."""
        store = self.make()
        store.add_tasks(["a"])
        store.lease_tasks("w0", 1)
        assert store.fail_tasks("w1", ["a"], reason="not mine", attempt_max=None) == []
        assert store.task_counts()["leased"] == 1

    # -- plans and checkpoints -------------------------------------------------------------

    def test_the_first_plan_of_a_step_wins(self) -> None:
        """A step is planned once; a replay gets the plan on record."""
        store = self.make()
        first = StepPlan(1, ("a", "b"), 2)
        assert store.begin_step(first).plan == first
        assert store.begin_step(StepPlan(1, ("x",), 9)).plan == first
        assert store.get_plan(1) == first
        assert store.get_plan(2) is None

    def test_a_checkpoint_makes_acks_up_to_its_step_durable(self) -> None:
        """The head is the commit point of every step it covers, and of no later one."""
        store = self.make()
        ids = commit(store, 0, 1, 2)
        for step, sample_id in enumerate(ids, start=1):
            store.record_train_ack([sample_id], global_step=step, optimizer_durable=False)
        store.record_checkpoint(checkpoint(2))
        assert store.durable_marker() == {"acked": set(ids[:2]), "global_step": 2, "optimizer_durable": True}
        assert store.releasable(10) == ids[:2]

    def test_checkpoints_form_a_growing_chain(self) -> None:
        """A checkpoint behind the head is refused, and the head is never forgotten."""
        store = self.make()
        store.record_checkpoint(checkpoint(3))
        for behind in (checkpoint(2), replace(checkpoint(3), name="another")):
            with pytest.raises(IllegalTransitionError):
                store.record_checkpoint(behind)
        store.record_checkpoint(checkpoint(6))
        with pytest.raises(IllegalTransitionError):
            store.forget_checkpoint(6)
        store.forget_checkpoint(3)
        assert store.checkpoints() == [checkpoint(6)]

    def test_falling_back_undoes_later_acks_and_asks_for_lost_features(self) -> None:
        """Samples released under a damaged head must be captured again, under their old seq."""
        store = self.make()
        store.add_tasks(["task-0", "task-1", "task-2"])
        store.lease_tasks("w", 3)
        ids = commit(store, 0, 1, 2)
        store.record_train_ack(ids[:1], global_step=1, optimizer_durable=False)
        store.record_checkpoint(checkpoint(1))
        store.record_train_ack(ids[1:2], global_step=2, optimizer_durable=False)
        store.record_checkpoint(checkpoint(2))
        store.record_released(ids[:2])
        assert store.fall_back(1) == store.lost_ids() == [ids[1]]
        assert store.checkpoints() == [checkpoint(1)]
        assert store.durable_marker()["acked"] == {ids[0]}
        assert [e.present for e in store.read_committed(0, 3)] == [True, False, True]
        [lease] = store.lease_tasks("w", 3)
        assert lease.ordinal == 1
        assert store.commit_sample(sample_ref(1, num_bytes=8)) is True
        assert store.all_committed_ids() == ids
        assert store.read_committed(1, 1)[0].ref.estimated_bytes == 8

    # -- features --------------------------------------------------------------------------

    def test_release_waits_for_a_durable_ack(self) -> None:
        """No feature is given up before a durable checkpoint covers it."""
        store = self.make()
        ids = commit(store, 0, 1)
        store.record_train_ack(ids, global_step=1, optimizer_durable=False)
        assert store.releasable(10) == []
        with pytest.raises(IllegalTransitionError, match="durable checkpoint"):
            store.record_released(ids)
        store.record_checkpoint(checkpoint(1))
        store.record_released(ids)
        assert store.releasable(10) == []

    def test_bytes_are_counted_while_features_are_resident(self) -> None:
        """Commit adds, release subtracts; provisional is the part a checkpoint would free."""
        store = self.make()
        ids = commit(store, 0, 1, 2)
        store.record_train_ack(ids[:2], global_step=1, optimizer_durable=False)
        usage = store.usage()
        assert (usage.resident_samples, usage.resident_bytes) == (3, 300)
        assert (usage.provisional_samples, usage.provisional_bytes, usage.waiting_samples) == (2, 200, 1)
        store.record_checkpoint(checkpoint(1))
        store.record_released(ids[:2])
        usage = store.usage()
        assert (usage.resident_bytes, usage.provisional_bytes, usage.waiting_samples) == (100, 0, 1)

    def test_a_lost_sample_is_captured_again_but_a_durable_one_is_not(self) -> None:
        """A lost feature is a cache miss; one that durable weights contain is not needed."""
        store = self.make()
        store.add_tasks(["task-0", "task-1"])
        store.lease_tasks("w", 2)
        ids = commit(store, 0, 1)
        store.record_train_ack(ids[:1], global_step=1, optimizer_durable=True)
        store.report_lost(ids)
        assert (store.present_ids(), store.lost_ids()) == (ids[:1], ids[1:])
        assert [lease.task_id for lease in store.lease_tasks("w", 2)] == ["task-1"]

    def test_history_is_folded_and_stays_readable(self) -> None:
        """What trained weights contain is known for ever: never committed again, and told to who asks."""
        store = self.make()
        tasks = [f"task-{n}" for n in range(4)]
        store.add_tasks(tasks)
        store.lease_tasks("w", 3)
        ids = commit(store, 0, 1, 2)
        plan = StepPlan(1, (ids[1], ids[0]), 2)
        store.begin_step(plan)
        store.ack_step(StepAck(1, 0, tuple(ids[:2])))
        store.record_checkpoint(checkpoint(1))
        store.record_released(ids[:2])
        assert store.compact() == 2
        assert store.compact() == 0
        assert store.commit_sample(sample_ref(0)) is False
        assert store.all_committed_ids() == ids
        small = store.get_committed(ids[0])
        assert small is not None
        assert (small.sample_id, small.source_task_id, small.feature_specs) == (ids[0], "task-0", {})
        assert store.sample_record(ids[1]) == SampleRecord(ids[1], 2, "released", "task-1", 1, durable=True)
        assert store.get_plan(1) == plan
        assert list(store.plans()) == [plan]
        entries = store.read_committed(0, 10)
        assert [(e.seq, e.ref.sample_id) for e in entries] == list(enumerate(ids, start=1))
        assert store.read_committed(1, 1)[0].ref.sample_id == ids[1]
        assert store.durable_marker()["acked"] == set(ids[:2])
        assert store.add_tasks(tasks) == 0
        assert store.add_tasks([*tasks, "task-4"]) == 1
        assert store.task_counts() == {"pending": 2, "leased": 0, "done": 3, "failed": 0}
        with pytest.raises(IllegalTransitionError, match="folded"):
            store.fall_back(0)

    # -- run -------------------------------------------------------------------------------

    def test_facts_are_small_json_values(self) -> None:
        """Facts are written together and come back as they were."""
        store = self.make()
        store.set_facts({"a": {"b": [1, None, "x"]}, "c": True})
        store.set_facts({"c": False})
        assert store.facts() == {"a": {"b": [1, None, "x"]}, "c": False}

    def test_waiting_ends_with_the_next_mutation(self) -> None:
        """A waiter is woken by a change that another thread makes; no polling interval is involved."""
        store = self.make()
        seen, woken = store.lsn(), []
        waiter = threading.Thread(target=lambda: woken.append(store.wait(seen, timeout_s=60.0)))
        waiter.start()
        store.set_facts({"x": 1})
        waiter.join(timeout=60.0)
        assert woken == [seen + 1]

    def test_waiting_returns_at_once_when_it_is_late(self) -> None:
        """A change between the look and the wait is not missed."""
        store = self.make()
        seen = store.lsn()
        store.set_facts({"x": 1})
        assert store.wait(seen, timeout_s=60.0) == seen + 1
        assert store.wait(seen + 1, timeout_s=0.0) == seen + 1

    def test_close_is_idempotent(self) -> None:
        """Closing twice is closing."""
        store = self.make()
        store.close()
        store.close()
