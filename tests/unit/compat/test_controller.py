"""DataFlowController: two processes, one durable store; nothing lost, nothing trained twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from paceline import DataFlowController, SQLiteMetadataStore
from paceline.errors import FencedError, LedgerError
from paceline.testing.memory_features import InMemoryFeatureStore
from paceline.testing.samples import sample_ref

REFS = [sample_ref(number) for number in range(5)]
IDS = [ref.sample_id for ref in REFS]


class RecordingFeatureStore:
    """As the seed knows one."""

    def __init__(self) -> None:
        self.aborted: list[str] = []

    def abort(self, sample_id: str, reason: str = "") -> None:
        assert reason
        self.aborted.append(sample_id)


@pytest.fixture
def db(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


def controller(db: Path) -> DataFlowController:
    return DataFlowController("run0", metadata_store=SQLiteMetadataStore(db))


def test_commits_are_shared_and_deduplicated_across_processes(db: Path) -> None:
    """What the producer commits, the consumer's own connection sees, once."""
    producer, consumer = controller(db), controller(db)
    assert producer.commit_samples("w0", REFS) == REFS
    assert producer.commit_samples("w0", REFS) == []
    assert consumer.commit_samples("w1", [REFS[0]]) == []
    assert consumer.store.all_committed_ids() == IDS
    assert producer.commit_samples("w0", []) == []


def test_reconcile_releases_durable_and_requeues_the_rest(db: Path) -> None:
    """Durably acked samples are freed and never trained again; all others are."""
    controller(db).commit_samples("w0", REFS)
    consumer = controller(db)
    consumer.ack_train_refs("t0", IDS[:3], global_step=3, optimizer_durable=True)
    features = RecordingFeatureStore()
    restarted = controller(db)
    result = restarted.reconcile_on_restart(features)
    assert result == {
        "released": IDS[:3],
        "requeued": IDS[3:],
        "global_step": 3,
        "optimizer_durable": True,
    }
    assert features.aborted == IDS[:3]
    assert restarted.reconcile_on_restart(features) == result


def test_reconcile_without_a_durable_step_requeues_everything(db: Path) -> None:
    """An optimizer step that no checkpoint covers never happened."""
    consumer = controller(db)
    consumer.commit_samples("w0", REFS)
    consumer.ack_train_refs("t0", IDS, global_step=None, optimizer_durable=False)
    features = RecordingFeatureStore()
    result = controller(db).reconcile_on_restart(features)
    assert (result["released"], result["requeued"], features.aborted) == ([], IDS, [])


def test_reconcile_judges_acks_one_by_one(db: Path) -> None:
    """Neither a later provisional ack nor a later durable one changes the others (hole B4)."""
    consumer = controller(db)
    consumer.commit_samples("w0", REFS)
    consumer.ack_train_refs("t0", IDS[:1], global_step=1, optimizer_durable=True)
    consumer.ack_train_refs("t0", IDS[1:2], global_step=2, optimizer_durable=False)
    assert controller(db).reconcile_on_restart()["released"] == IDS[:1]
    consumer.ack_train_refs("t0", IDS[2:3], global_step=3, optimizer_durable=True)
    result = controller(db).reconcile_on_restart()
    assert result["released"] == [IDS[0], IDS[2]]
    assert result["requeued"] == [IDS[1], IDS[3], IDS[4]]


def test_release_frees_only_what_a_checkpoint_covers(db: Path) -> None:
    """Bytes go when, and only when, the durable ack is on record."""
    consumer = controller(db)
    consumer.commit_samples("w0", REFS)
    consumer.ack_train_refs("t0", IDS[:2], global_step=1, optimizer_durable=True)
    consumer.ack_train_refs("t0", IDS[2:4], global_step=2, optimizer_durable=False)
    features = InMemoryFeatureStore(1 << 20)
    for sample_id in IDS:
        features.put(sample_id, {"x": torch.zeros(1)})
    assert consumer.release(features) == 2
    assert [sample_id for sample_id, _ in features.written()] == IDS[2:]
    assert consumer.release(features) == 0


def test_prompts_keep_their_order_and_ids_over_a_restart(db: Path) -> None:
    """Ingesting the same prompts again is idempotent, and a committed prompt is not leased again."""
    prompts = [{"task_id": f"task-{n}", "payload": {"prompt": f"p{n}"}} for n in range(3)]
    first = controller(db)
    assert first.ingest_prompts(prompts) == ["task-0", "task-1", "task-2"]
    first.take_role("producer")
    assert [t.task_id for t in first.lease_prompt_tasks("w0", 2)] == ["task-0", "task-1"]
    first.commit_samples("w0", REFS[:1])
    second = controller(db)
    second.ingest_prompts(prompts)
    second.take_role("producer")
    leased = second.lease_prompt_tasks("w0", 9)
    assert [(t.task_id, t.ordinal, t.payload["prompt"]) for t in leased] == [
        ("task-1", 1, "p1"),
        ("task-2", 2, "p2"),
    ]
    with pytest.raises(FencedError):
        first.commit_samples("w0", REFS[1:2])


def test_prompts_without_ids_get_stable_ones(db: Path) -> None:
    """The place in the list is the identity, so a restart does not double the prompts."""
    prompts = [{"prompt": "a"}, {"prompt": "b"}]
    ids = controller(db).ingest_prompts(prompts)
    restarted = controller(db)
    assert restarted.ingest_prompts(prompts) == ids
    assert restarted.status()["prompts"] == 2
    assert restarted.lease_prompt_tasks("w", 1)[0].payload == {"prompt": "a"}


def test_a_failing_prompt_is_retried_a_bounded_number_of_times(tmp_path: Path) -> None:
    """Then it fails with its reason, and the others go on (holes A5, A9)."""
    flow = DataFlowController("run0", attempt_max=2)
    flow.ingest_prompts([{"task_id": "bad"}, {"task_id": "good"}])
    flow.lease_prompt_tasks("w", 2)
    assert flow.fail_prompt_tasks("w", ["bad"], "boom", True) == []
    assert [t.attempt for t in flow.lease_prompt_tasks("w", 2)] == [1]
    assert flow.fail_prompt_tasks("w", ["bad"], "boom", True) == ["bad"]
    assert flow.fail_prompt_tasks("w", ["good"], "not text", False) == ["good"]
    assert flow.store.failed_tasks() == {"bad": "boom", "good": "not text"}
    assert flow.status()["prompts_failed"] == 2


def test_leasing_an_unknown_prompt_says_what_to_do(db: Path) -> None:
    """A process that never read the prompt file cannot capture from it."""
    controller(db).ingest_prompts([{"task_id": "a"}])
    with pytest.raises(LedgerError, match="ingest_prompts"):
        controller(db).lease_prompt_tasks("w", 1)


def test_a_store_of_another_run_is_refused(db: Path) -> None:
    """Two runs cannot be mixed in one ledger (hole B19)."""
    controller(db)
    with pytest.raises(LedgerError, match="belongs to run 'run0'"):
        DataFlowController("run1", metadata_store=SQLiteMetadataStore(db))


def test_no_store_means_a_private_one() -> None:
    """Without a store two controllers share nothing."""
    one, other = DataFlowController("run0"), DataFlowController("run0")
    one.commit_samples("w", REFS)
    assert other.status()["samples_committed"] == 0
    assert one.status()["samples_committed"] == 5
