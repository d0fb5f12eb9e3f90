"""Backpressure: bounded, with hysteresis, and never a deadlock with features that wait for a checkpoint."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest

from paceline import InMemoryMetadataStore
from paceline.capture.backpressure import Backpressure, Watermarks, check_feasible
from paceline.errors import ConfigError, FencedError
from paceline.features.store import Usage, Written
from paceline.ledger.facts import CHECKPOINT_WANTED
from paceline.ledger.records import CheckpointRecord
from paceline.testing.light_adapters import InMemoryLightFeatureStore, LightEngine
from paceline.testing.light_run import RunShape, build_producer
from paceline.testing.samples import sample_ref
from paceline.testing.simulated_run import Shape, simulated_producer


@dataclass
class Room:
    """A feature store of which only the fill level matters."""

    resident: int = 0

    def usage(self) -> Usage:
        return Usage(self.resident, 0, 1000)


def backpressure(room: Room, store: InMemoryMetadataStore) -> Backpressure:
    return Backpressure(room, store, Watermarks(budget_bytes=1000, group_bytes=200))  # type: ignore[arg-type]


def never() -> bool:
    return False


def test_there_is_credit_while_a_group_fits() -> None:
    """Up to budget less one group the producer does not wait."""
    pressure = backpressure(Room(resident=800), InMemoryMetadataStore())
    assert pressure.wait_for_credit(never, None) is True
    assert pressure.blocked.seconds == 0


def test_the_time_without_room_is_counted_and_told_while_it_passes() -> None:
    """Exactly, by the clock; an event at most once a second however often the ledger wakes the producer."""
    now, told = 0.0, []
    pressure = Backpressure(
        room := Room(resident=1000),  # type: ignore[arg-type]
        store := InMemoryMetadataStore(),
        Watermarks(budget_bytes=1000, group_bytes=200),
        report=lambda event, **fields: told.append((now, event, fields["blocked_seconds"])),
        clock=lambda: now,
    )

    def pass_time(_: int, __: float) -> int:
        nonlocal now
        now += 0.25
        if now == 3.5:
            room.resident = 0
        return store.lsn()

    store.wait = pass_time  # type: ignore[method-assign]
    assert pressure.wait_for_credit(never, None) is True
    assert pressure.blocked.seconds == 3.5
    assert told == [(at, "blocked", at) for at in (0.25, 1.25, 2.25, 3.25)]
    now, room.resident = 100.0, 1000
    assert pressure.wait_for_credit(lambda: now > 101, None) is False
    assert pressure.blocked.seconds == 4.75, "the second wait is added, what lay between is not"
    assert told[4:] == [(100.0, "blocked", 3.5), (101.0, "blocked", 4.5)]


def test_a_paused_producer_goes_on_only_below_the_low_watermark() -> None:
    """Hysteresis: room for one more group is not enough to resume."""
    room = Room(resident=900)
    pressure = backpressure(room, InMemoryMetadataStore())
    assert not pressure.has_credit()
    room.resident = 780
    assert not pressure.has_credit()
    room.resident = 750
    assert pressure.has_credit()
    room.resident = 800
    assert pressure.has_credit()


def test_a_stop_ends_the_wait() -> None:
    """Asked to stop, a paused producer returns without credit."""
    pressure = backpressure(Room(resident=1000), InMemoryMetadataStore())
    assert pressure.wait_for_credit(lambda: True, None) is False


def test_a_release_in_another_thread_wakes_the_producer() -> None:
    """The wait ends with the ledger's change, not with a polling interval."""
    room, store = Room(resident=1000), InMemoryMetadataStore()
    pressure, granted = backpressure(room, store), threading.Event()
    thread = threading.Thread(target=lambda: pressure.wait_for_credit(never, None) and granted.set())
    thread.start()
    room.resident = 0
    store.set_facts({"released": True})
    assert granted.wait(timeout=60)
    thread.join()


def test_a_paused_producer_asks_for_a_checkpoint_that_would_free_bytes() -> None:
    """Provisional samples keep their bytes until a checkpoint; waiting for one silently could be for ever."""
    room, store = Room(resident=1000), InMemoryMetadataStore()
    store.commit_samples([sample_ref(0), sample_ref(1)])
    pressure = backpressure(room, store)
    pressure._ask_for_checkpoint(None)
    assert CHECKPOINT_WANTED not in store.facts()
    store.record_train_ack(["run0:s0"], global_step=1, optimizer_durable=False)
    pressure._ask_for_checkpoint(None)
    assert store.facts()[CHECKPOINT_WANTED] is True
    store.set_facts({CHECKPOINT_WANTED: False})
    store.record_checkpoint(CheckpointRecord(1, "c", "d", 1))
    pressure._ask_for_checkpoint(None)
    assert store.facts()[CHECKPOINT_WANTED] is False


def test_a_budget_that_could_deadlock_is_refused_at_the_start() -> None:
    """One group and one batch must fit below the low watermark; the message names the budget needed."""
    sizes = {"sample_bytes": 1 << 20, "group_size": 64, "window_size": 8}
    check_feasible(budget_bytes=97 << 20, **sizes)
    with pytest.raises(ConfigError, match="budget_mib to 97"):
        check_feasible(budget_bytes=95 << 20, **sizes)


def test_bytes_that_are_only_promised_count() -> None:
    """Of several producers each reserves before it captures, so together they keep to the budget."""
    store = InMemoryMetadataStore()
    pressure = backpressure(Room(), store)
    generations = store.reserve({"a": 400, "b": 401})
    assert not pressure.has_credit()
    store.revoke(list(generations.values()))
    assert pressure.has_credit()


def test_samples_can_be_limited_like_bytes() -> None:
    """The same hysteresis, in samples."""
    store = InMemoryMetadataStore()
    marks = Watermarks(1000, 200, budget_samples=8, group_samples=2)
    pressure = Backpressure(Room(), store, marks)  # type: ignore[arg-type]
    store.commit_samples([sample_ref(n, num_bytes=1) for n in range(6)])
    assert pressure.has_credit()
    store.commit_sample(sample_ref(6, num_bytes=1))
    assert not pressure.has_credit()
    store.record_train_ack(["run0:s0"], global_step=1, optimizer_durable=True)
    store.record_released(["run0:s0"])
    assert pressure.has_credit(), "six are the low watermark"


def test_a_sample_budget_that_could_deadlock_is_refused_at_the_start() -> None:
    """The message names the least that works, and the least works."""
    sizes = {"budget_bytes": 1 << 30, "sample_bytes": 1, "group_size": 4, "window_size": 5}
    with pytest.raises(ConfigError, match="budget_samples to 13"):
        check_feasible(budget_samples=12, **sizes)
    check_feasible(budget_samples=13, **sizes)


def test_bytes_that_a_restored_ledger_knows_nothing_of_are_swept() -> None:
    """They lie under generations that it never gave out; kept, they would take all the room for ever."""
    shape = Shape(prompts=8, group=2)
    lost, features, engine = InMemoryMetadataStore(), InMemoryLightFeatureStore(), LightEngine()
    simulated_producer(shape, lost, features, engine, lambda *_, **__: None).run()
    assert len(features.written()) == 8
    restored = InMemoryMetadataStore()
    simulated_producer(shape, restored, features, engine, lambda *_, **__: None).run(max_rounds=1)
    assert sorted(features.held) == sorted(restored.present_ids())
    assert min(restored.present_generations().values()) > 8, "no number is given out twice"


def test_a_late_look_at_the_store_frees_nothing_of_a_successor() -> None:
    """A producer that was taken over finds bytes that its ledger never gave out: the ledger judges whose."""
    shape, engine = Shape(prompts=4, group=2), LightEngine()
    store = InMemoryMetadataStore()

    class SlowlyListed(InMemoryLightFeatureStore):
        def written(self) -> list[Written]:
            self.written = super().written  # type: ignore[method-assign]
            simulated_producer(shape, store, self, engine, lambda *_, **__: None).run()
            return super().written()

    features = SlowlyListed()
    with pytest.raises(FencedError):
        simulated_producer(shape, store, features, engine, lambda *_, **__: None).run()
    assert sorted(features.held) == shape.sample_ids


def test_a_sample_lost_while_the_producer_waits_for_room_is_captured_again() -> None:
    """Else the consumer would wait for the sample, and the producer for the consumer."""
    shape = RunShape(prompts=20, group=2, batch=2, tight=True)
    store, features = InMemoryMetadataStore(), InMemoryLightFeatureStore(shape.budget_bytes)
    producer = build_producer(shape, store, features)
    needed = shape.sample_ids[0]
    lost: list[str] = []

    def should_stop() -> bool:
        """Asked before every wait: the first time the consumer finds its next sample gone."""
        full = store.usage().resident_samples + shape.group > (shape.budget_samples or 0)
        if full and not lost:
            lost.append(needed)
            features.free([(needed, 0)])
            store.report_lost([needed])
        return bool(lost) and needed not in store.lost_ids()

    producer.run(should_stop=should_stop)
    assert needed in features.held
    assert store.usage().resident_samples <= (shape.budget_samples or 0)
