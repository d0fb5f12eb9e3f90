"""The earlier stores: commit once, ack one by one, release what is durable."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from paceline import InMemoryMetadataStore, MetadataStore, RedisMetadataStore, SQLiteMetadataStore
from paceline.errors import IllegalTransitionError
from paceline.testing.samples import sample_ref
from paceline.testing.valkey_server import ValkeyServer


@pytest.fixture(params=["memory", "sqlite", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path, valkey: ValkeyServer) -> Iterator[MetadataStore]:
    made: MetadataStore
    if request.param == "redis":
        made = RedisMetadataStore(valkey.url, uuid.uuid4().hex)
    else:
        made = InMemoryMetadataStore() if request.param == "memory" else SQLiteMetadataStore(tmp_path / "db")
    yield made
    made.close()


def commit(store: MetadataStore, *numbers: int) -> list[str]:
    refs = [sample_ref(number) for number in numbers]
    store.commit_samples(refs)
    return [ref.sample_id for ref in refs]


def test_commit_is_idempotent_on_sample_id(store: MetadataStore) -> None:
    """A second commit of an id is not fresh and changes nothing."""
    assert store.commit_sample(sample_ref(0)) is True
    assert store.commit_sample(sample_ref(0, num_bytes=7)) is False
    assert store.committed_count() == 1
    assert store.get_committed("run0:s0") == sample_ref(0)


def test_commit_reports_freshness_of_each_ref(store: MetadataStore) -> None:
    """One batch may mix new refs, old refs and the same ref twice."""
    store.commit_sample(sample_ref(1))
    refs = [sample_ref(0), sample_ref(1), sample_ref(2), sample_ref(2)]
    assert store.commit_samples(refs) == [True, False, True, False]
    assert store.commit_samples([]) == []


def test_committed_ids_come_in_commit_order(store: MetadataStore) -> None:
    """The committed log is the stream, so its order is the order of commit."""
    commit(store, 3, 1, 2)
    assert store.all_committed_ids() == ["run0:s3", "run0:s1", "run0:s2"]
    entries = store.read_committed(0)
    assert [e.ref.sample_id for e in entries] == store.all_committed_ids()
    assert store.read_committed(entries[0].place + 1, 1) == entries[1:2]
    assert store.read_committed(entries[-1].place + 1) == ()


def test_unknown_samples_are_not_committed(store: MetadataStore) -> None:
    """Asking for an unknown id is an answer, not an error."""
    assert not store.is_committed("nothing")
    assert store.get_committed("nothing") is None


def test_tensors_are_refused_and_nothing_is_written(store: MetadataStore) -> None:
    """A tensor anywhere in a batch refuses the whole batch."""

    class Tensor:
        dtype, shape, device = "float32", (1,), "cpu"

    smuggler = dataclasses.replace(sample_ref(1), metadata={"deep": [{"er": Tensor()}]})
    with pytest.raises(TypeError, match="metadata only"):
        store.commit_samples([sample_ref(0), smuggler])
    assert store.committed_count() == 0


def test_a_durable_ack_is_marked(store: MetadataStore) -> None:
    """The marker names the durable ids, their step, and that they are durable."""
    ids = commit(store, 0, 1, 2)
    store.record_train_ack(ids[:2], global_step=5, optimizer_durable=True)
    assert store.durable_marker() == {"acked": set(ids[:2]), "global_step": 5, "optimizer_durable": True}


def test_an_ack_may_name_no_step(store: MetadataStore) -> None:
    """Then no checkpoint covers it; a durable one still does."""
    ids = commit(store, 0, 1)
    store.record_train_ack(ids[:1], global_step=None, optimizer_durable=False)
    assert store.durable_marker() == {"acked": {ids[0]}, "global_step": None, "optimizer_durable": False}
    store.record_train_ack(ids, global_step=None, optimizer_durable=True)
    assert store.durable_marker() == {"acked": set(ids), "global_step": None, "optimizer_durable": True}


def test_a_provisional_ack_is_not_durable(store: MetadataStore) -> None:
    """Before any durable ack the marker says that nothing is safe to release."""
    ids = commit(store, 0)
    assert store.durable_marker() == {"acked": set(), "global_step": None, "optimizer_durable": False}
    store.record_train_ack(ids, global_step=1, optimizer_durable=False)
    assert store.durable_marker() == {"acked": set(ids), "global_step": 1, "optimizer_durable": False}


def test_a_later_provisional_ack_never_undoes_a_durable_one(store: MetadataStore) -> None:
    """Acks are judged one by one, for other ids and for the same id."""
    a, b = commit(store, 0, 1)
    store.record_train_ack([a], global_step=1, optimizer_durable=True)
    store.record_train_ack([b], global_step=2, optimizer_durable=False)
    store.record_train_ack([a], global_step=2, optimizer_durable=False)
    assert store.durable_marker() == {"acked": {a}, "global_step": 1, "optimizer_durable": True}


def test_a_durable_ack_covers_only_what_it_names(store: MetadataStore) -> None:
    """A provisional ack does not become durable because another one is."""
    a, b = commit(store, 0, 1)
    store.record_train_ack([a], global_step=1, optimizer_durable=False)
    store.record_train_ack([b], global_step=2, optimizer_durable=True)
    assert store.durable_marker()["acked"] == {b}


def test_an_id_may_be_of_a_kind_of_text(store: MetadataStore) -> None:
    """numpy's, for instance: text is text."""

    class Text(str):
        __slots__ = ()

    ids = [Text(i) for i in commit(store, 0)]
    store.record_train_ack(ids, global_step=1, optimizer_durable=True)
    store.record_released(ids)
    assert store.present_ids() == []


def test_a_failed_ack_leaves_the_store_usable(store: MetadataStore) -> None:
    """An error in the middle of an ack rolls the whole ack back and leaves nothing open."""
    ids = commit(store, 0, 1)
    with pytest.raises(TypeError):
        store.record_train_ack([ids[0], object()], global_step=1, optimizer_durable=True)  # type: ignore[list-item]
    assert store.durable_marker()["acked"] == set()
    assert store.commit_sample(sample_ref(2)) is True


def test_release_waits_for_a_durable_ack(store: MetadataStore) -> None:
    """No feature is freed before a durable checkpoint covers it."""
    ids = commit(store, 0, 1)
    store.record_train_ack(ids, global_step=1, optimizer_durable=False)
    with pytest.raises(IllegalTransitionError, match="durable checkpoint"):
        store.record_released(ids)
    store.record_train_ack(ids, global_step=1, optimizer_durable=True)
    store.record_released(ids)
    assert (store.present_ids(), store.is_committed(ids[0])) == ([], True)


def test_a_second_connection_sees_what_the_first_committed(tmp_path: Path) -> None:
    """Two processes share one file."""
    one, other = SQLiteMetadataStore(tmp_path / "db"), SQLiteMetadataStore(tmp_path / "db")
    commit(one, 0, 1)
    assert other.all_committed_ids() == ["run0:s0", "run0:s1"]
    assert (InMemoryMetadataStore.durable, SQLiteMetadataStore.durable) == (False, True)
