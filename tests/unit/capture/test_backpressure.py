"""Backpressure: bounded, with hysteresis, and never a deadlock with features that wait for a checkpoint."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest

from paceline.capture.backpressure import Backpressure, Watermarks, check_feasible
from paceline.errors import ConfigError, FencedError
from paceline.features.store import Usage, Written
from paceline.ledger.facts import CHECKPOINT_WANTED
from paceline.ledger.ledger import Ledger
from paceline.ledger.producer_session import ProducerSession
from paceline.ledger.records import State
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.testing.ledger_calls import Training, capture, consumer_of, producer_of, refs_of
from paceline.testing.light_adapters import InMemoryLightFeatureStore, LightEngine
from paceline.testing.light_run import RunShape, build_producer
from paceline.testing.simulated_run import Shape, simulated_producer


@dataclass
class Room:
    """A feature store of which only the fill level matters."""

    resident: int = 0

    def usage(self) -> Usage:
        return Usage(self.resident, 0, 1000)


def backpressure(room: Room, session: ProducerSession) -> Backpressure:
    return Backpressure(room, session, Watermarks(budget_bytes=1000, group_bytes=200))  # type: ignore[arg-type]


def lost_ids(ledger: Ledger) -> list[str]:
    return [record.sample_id for record in ledger.find(state=State.LOST).values()]


def never() -> bool:
    return False


def test_there_is_credit_while_a_group_fits() -> None:
    """Up to budget less one group the producer does not wait."""
    pressure = backpressure(Room(resident=800), producer_of(SQLiteLedger()))
    assert pressure.wait_for_credit(never) is True
    assert pressure.blocked.seconds == 0


def test_the_time_without_room_is_counted_and_told_while_it_passes() -> None:
    """Exactly, by the clock; an event at most once a second however often the ledger wakes the producer."""
    now, told = 0.0, []
    pressure = Backpressure(
        room := Room(resident=1000),  # type: ignore[arg-type]
        session := producer_of(SQLiteLedger()),
        Watermarks(budget_bytes=1000, group_bytes=200),
        report=lambda event, **fields: told.append((now, event, fields["blocked_seconds"])),
        clock=lambda: now,
    )

    def pass_time(_: int, __: float) -> int:
        nonlocal now
        now += 0.25
        if now == 3.5:
            room.resident = 0
        return session.lsn()

    session.wait = pass_time  # type: ignore[method-assign]
    assert pressure.wait_for_credit(never) is True
    assert pressure.blocked.seconds == 3.5
    assert told == [(at, "blocked", at) for at in (0.25, 1.25, 2.25, 3.25)]
    now, room.resident = 100.0, 1000
    assert pressure.wait_for_credit(lambda: now > 101) is False
    assert pressure.blocked.seconds == 4.75, "the second wait is added, what lay between is not"
    assert told[4:] == [(100.0, "blocked", 3.5), (101.0, "blocked", 4.5)]


def test_a_paused_producer_goes_on_only_below_the_low_watermark() -> None:
    """Hysteresis: room for one more group is not enough to resume."""
    room = Room(resident=900)
    pressure = backpressure(room, producer_of(SQLiteLedger()))
    assert not pressure.has_credit()
    room.resident = 780
    assert not pressure.has_credit()
    room.resident = 750
    assert pressure.has_credit()
    room.resident = 800
    assert pressure.has_credit()


def test_a_stop_ends_the_wait() -> None:
    """Asked to stop, a paused producer returns without credit."""
    pressure = backpressure(Room(resident=1000), producer_of(SQLiteLedger()))
    assert pressure.wait_for_credit(lambda: True) is False


def test_a_release_in_another_thread_wakes_the_producer() -> None:
    """The wait ends with the ledger's change, not with a polling interval."""
    room, ledger = Room(resident=1000), SQLiteLedger()
    pressure, granted = backpressure(room, producer_of(ledger)), threading.Event()
    thread = threading.Thread(target=lambda: pressure.wait_for_credit(never) and granted.set())
    thread.start()
    room.resident = 0
    ledger.set_facts(None, {"released": True})
    assert granted.wait(timeout=60)
    thread.join()


def test_a_paused_producer_asks_for_a_checkpoint_that_would_free_bytes() -> None:
    """Provisional samples keep their bytes until a checkpoint; waiting for one silently could be for ever."""
    room, ledger = Room(resident=1000), SQLiteLedger()
    capture(producer := producer_of(ledger), 0, 1)
    pressure, training = backpressure(room, producer), Training(consumer_of(ledger))
    pressure._ask_for_checkpoint()
    assert CHECKPOINT_WANTED not in ledger.facts()
    training.step(0)
    pressure._ask_for_checkpoint()
    assert ledger.facts()[CHECKPOINT_WANTED] is True
    training.consumer.set_facts({CHECKPOINT_WANTED: False})
    training.checkpoint()
    pressure._ask_for_checkpoint()
    assert ledger.facts()[CHECKPOINT_WANTED] is False


def test_a_budget_that_could_deadlock_is_refused_at_the_start() -> None:
    """One group and one batch must fit below the low watermark; the message names the budget needed."""
    sizes = {"sample_bytes": 1 << 20, "group_size": 64, "window_size": 8}
    check_feasible(budget_bytes=97 << 20, **sizes)
    with pytest.raises(ConfigError, match="budget_mib to 97"):
        check_feasible(budget_bytes=95 << 20, **sizes)


def test_bytes_that_are_only_promised_count() -> None:
    """Of several producers each reserves before it captures, so together they keep to the budget."""
    other = producer_of(ledger := SQLiteLedger(), "b")
    pressure = backpressure(Room(), producer_of(ledger))
    other.lease(2)
    refs = [*refs_of(other, 0, num_bytes=400), *refs_of(other, 1, num_bytes=401)]
    assert not pressure.has_credit()
    other.swept([ref.generation for ref in refs])
    assert pressure.has_credit()


def test_samples_can_be_limited_like_bytes() -> None:
    """The same hysteresis, in samples."""
    producer = producer_of(ledger := SQLiteLedger(), prompts=7)
    marks = Watermarks(10_000, 200, budget_samples=8, group_samples=2)
    pressure = Backpressure(Room(), producer, marks)  # type: ignore[arg-type]
    capture(producer, *range(6))
    assert pressure.has_credit()
    capture(producer, 6)
    assert not pressure.has_credit()
    training = Training(consumer_of(ledger))
    training.step(0)
    training.checkpoint()
    assert training.consumer.release(InMemoryLightFeatureStore()) == 1
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
    lost, features, engine = SQLiteLedger(), InMemoryLightFeatureStore(), LightEngine()
    simulated_producer(shape, "0", lost, features, engine, lambda *_, **__: None).run()
    assert len(features.written()) == 8
    restored = SQLiteLedger()
    simulated_producer(shape, "0", restored, features, engine, lambda *_, **__: None).run(max_rounds=1)
    present = restored.ownership().present
    assert sorted(features.held) == sorted(present)
    assert min(present.values()) > 8, "no number is given out twice"


def test_a_late_look_at_the_store_frees_nothing_of_a_successor() -> None:
    """A producer that was taken over finds bytes that its ledger never gave out: the ledger judges whose."""
    shape, engine = Shape(prompts=4, group=2), LightEngine()
    ledger = SQLiteLedger()

    class SlowlyListed(InMemoryLightFeatureStore):
        def written(self) -> list[Written]:
            self.written = super().written  # type: ignore[method-assign]
            simulated_producer(shape, "0", ledger, self, engine, lambda *_, **__: None).run()
            return super().written()

    features = SlowlyListed()
    with pytest.raises(FencedError):
        simulated_producer(shape, "0", ledger, features, engine, lambda *_, **__: None).run()
    assert sorted(features.held) == shape.sample_ids


def test_what_a_store_without_a_list_holds_is_neither_freed_nor_called_lost() -> None:
    """A second producer goes on with the samples of the first."""

    class Unlisted(InMemoryLightFeatureStore):
        def written(self) -> None:  # type: ignore[override]
            return None

    shape, engine = Shape(prompts=4, group=2), LightEngine()
    ledger, features = SQLiteLedger(), Unlisted()
    simulated_producer(shape, "0", ledger, features, engine, lambda *_, **__: None).run(max_rounds=1)
    simulated_producer(shape, "0", ledger, features, engine, lambda *_, **__: None).run()
    assert sorted(features.held) == shape.sample_ids
    assert len(engine.captured) == 2, "no group was captured twice"


def test_a_sample_lost_while_the_producer_waits_for_room_is_captured_again() -> None:
    """Else the consumer would wait for the sample, and the producer for the consumer."""
    shape = RunShape(prompts=20, group=2, batch=2, tight=True)
    ledger, features = SQLiteLedger(), InMemoryLightFeatureStore(shape.budget_bytes)
    producer = build_producer(shape, ledger, features)
    needed = shape.sample_ids[0]
    lost: list[str] = []

    def should_stop() -> bool:
        """Asked before every wait: the first time the consumer finds its next sample gone."""
        full = ledger.snapshot().usage.resident_samples + shape.group > (shape.budget_samples or 0)
        if full and not lost:
            lost.append(needed)
            features.free([(needed, 0)])
            ledger.report_lost(None, [needed])
        return bool(lost) and needed not in lost_ids(ledger)

    producer.run(should_stop=should_stop)
    assert needed in features.held
    assert ledger.snapshot().usage.resident_samples <= (shape.budget_samples or 0)
