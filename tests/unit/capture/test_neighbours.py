"""Several producers: the silent are given up, the slow hold nobody up for long, and all know when it ends."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from paceline.capture.backpressure import LOW, Watermarks, check_feasible
from paceline.capture.neighbours import SLOWER_BY, Neighbours
from paceline.capture.producer import Producer
from paceline.errors import EngineError, FencedError, StoreError
from paceline.ledger.facts import producers_in
from paceline.ledger.ledger import Ledger
from paceline.ledger.producer_session import ProducerSession
from paceline.ledger.records import SourceBlock, producer_role
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.testing.ledger_calls import RUN_ID, refs_of
from paceline.testing.light_adapters import InMemoryLightFeatureStore, LightEngine
from paceline.testing.simulated_run import RUN_ID as SIMULATED
from paceline.testing.simulated_run import Shape, simulated_producer

GROUP, TIMEOUT_S = 2, 10.0


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Worker:
    """A producer's session, what it sees of the others, and a clock of its own."""

    def __init__(self, ledger: Ledger, name: str, groups_ahead: int = 2) -> None:
        self.clock, self.told = Clock(), list[dict[str, Any]]()
        self.session = ProducerSession(ledger, RUN_ID, name)
        self.session.acquire()
        self.session.extend([SourceBlock(0, 20, "twenty")])
        self.neighbours = Neighbours(
            self.session,
            timeout_s=TIMEOUT_S,
            group_size=GROUP,
            groups_ahead=groups_ahead,
            in_background=False,
            report=lambda event, **fields: self.told.append({"event": event, **fields}),
            clock=self.clock,
        )
        self.neighbours.begin()

    def watch(self, seconds: float) -> None:
        """Time passes, and it finds nothing to do."""
        for _ in range(round(seconds)):
            self.neighbours.look(is_idle=True)
            self.clock.now += 1
        self.neighbours.look(is_idle=True)

    def lease(self) -> list[int]:
        leases = self.session.lease(GROUP, GROUP, self.neighbours.bound())
        ordinals = [lease.ordinal for lease in leases]
        self.neighbours.holds(ordinals[:1])
        return ordinals

    def commit(self, *ordinals: int) -> None:
        self.session.commit(refs_of(self.session, *ordinals))
        self.neighbours.holds([])


@pytest.fixture
def ledger() -> SQLiteLedger:
    return SQLiteLedger()


def test_the_work_of_a_silent_producer_returns_after_the_time_out_of_the_observers_clock(
    ledger: SQLiteLedger,
) -> None:
    """However wrong the other clock is; the silent one is refused from then on, and may come again."""
    dead, observer = Worker(ledger, "1"), Worker(ledger, "0")
    dead.clock.now = -1e9
    assert dead.lease() == [0, 1]
    observer.watch(TIMEOUT_S - 1)
    assert ledger.snapshot().prompts.leased == GROUP
    observer.watch(1)
    assert [told["worker"] for told in observer.told] == ["1"]
    assert observer.lease() == [0, 1]
    with pytest.raises(FencedError):
        dead.commit(0, 1)
    again = Worker(ledger, "1")
    assert again.lease() == [2, 3]
    assert set(producers_in(ledger.facts())) == {"0", "1"}


def test_a_producer_that_gives_a_sign_of_life_keeps_its_work(ledger: SQLiteLedger) -> None:
    """Its capture may take as long as it likes."""
    busy, observer = Worker(ledger, "1"), Worker(ledger, "0")
    busy.lease()
    for _ in range(20):
        observer.watch(TIMEOUT_S - 1)
        busy.clock.now += TIMEOUT_S - 1
        busy.neighbours.look(is_idle=False)
    busy.commit(0, 1)
    assert observer.told == []


def test_an_observer_that_was_away_itself_takes_nobody_for_dead(ledger: SQLiteLedger) -> None:
    """After a long capture, or a server that was away for all: the others may just not have spoken yet."""
    other, observer = Worker(ledger, "1"), Worker(ledger, "0")
    other.lease()
    observer.watch(1)
    observer.clock.now += 100 * TIMEOUT_S
    observer.watch(TIMEOUT_S - 1)
    assert observer.told == []
    observer.watch(1)
    assert [told["worker"] for told in observer.told] == ["1"]


def test_an_observer_that_captures_for_long_watches_meanwhile(ledger: SQLiteLedger) -> None:
    """Its thread does; the first look after the capture takes the dead one's work."""
    dead = Worker(ledger, "1")
    dead.lease()
    clock, told = Clock(), list[Any]()
    session = ProducerSession(ledger, RUN_ID, "0")
    session.acquire()
    observer = Neighbours(
        session,
        timeout_s=0.05,
        group_size=GROUP,
        groups_ahead=2,
        report=lambda event, **fields: told.append((event, fields["worker"])),
        clock=clock,
    )
    observer.begin()
    for _ in range(6):
        clock.now += 0.02
        while observer._watched_at != clock.now:
            ledger.wait(ledger.lsn(), timeout_s=60.0)  # its own beat ends the wait
    assert told == []
    observer.look(is_idle=False)
    assert told == [("taken_over", "1")]
    observer.end()


def test_a_thread_gives_the_signs_of_life_of_a_producer_that_captures(ledger: SQLiteLedger) -> None:
    """Until it leaves; then nothing stays of it."""
    session = ProducerSession(ledger, RUN_ID, "3")
    session.acquire()
    neighbours = Neighbours(session, timeout_s=0.05, group_size=GROUP, groups_ahead=1, about={"host": "b"})
    neighbours.begin()
    beats = set()
    while len(beats) < 4:
        told = producers_in(ledger.facts())["3"]
        assert told["host"] == "b"
        beats.add(told["beat"])
        ledger.wait(ledger.lsn(), timeout_s=60.0)
    neighbours.end()
    assert producers_in(ledger.facts()) == {}


def test_no_producer_runs_further_ahead_than_the_budget_can_hold(ledger: SQLiteLedger) -> None:
    """Whoever holds the group that everybody waits for may go on; the others keep room for it."""
    slow, quick = Worker(ledger, "1"), Worker(ledger, "0")
    assert slow.lease() == [0, 1]
    assert quick.lease() == [2, 3]
    quick.commit(2, 3)
    assert quick.lease() == []
    assert slow.neighbours.bound() is None
    slow.commit(0, 1)
    assert quick.lease() == [4, 5]
    slow.neighbours.end()
    assert quick.neighbours.bound() is None, "there is nobody else"


def test_a_group_that_is_much_older_than_the_rest_is_taken_from_its_holder_once(ledger: SQLiteLedger) -> None:
    """Its holder lives, but is many times slower than the producer that waits for it."""
    slow, quick = Worker(ledger, "1"), Worker(ledger, "0")

    def wait(seconds: float) -> None:
        for _ in range(round(seconds)):
            slow.clock.now += 1
            slow.neighbours._tell()
            quick.watch(1)
        quick.neighbours.look(is_idle=True)

    slow.lease()
    quick.lease()
    quick.clock.now += TIMEOUT_S
    quick.commit(2, 3)
    wait(0)
    for _ in range(SLOWER_BY - 1):
        wait(TIMEOUT_S)
    assert quick.told == []
    wait(TIMEOUT_S)
    assert [told["event"] for told in quick.told] == ["taken_over"]
    slow = Worker(ledger, "1")
    assert slow.lease() == [0, 1]
    for _ in range(3 * SLOWER_BY):
        wait(TIMEOUT_S)
    assert len(quick.told) == 1, "else a group that is slow for everybody would go round for ever"


def test_a_producer_that_has_captured_nothing_yet_takes_no_group_for_old(ledger: SQLiteLedger) -> None:
    """It cannot know how long one takes."""
    slow, fresh = Worker(ledger, "1"), Worker(ledger, "0")
    slow.lease()
    for _ in range(100):
        slow.neighbours._tell()
        fresh.watch(1)
    assert fresh.told == []


@pytest.mark.parametrize("budget_samples", [None, 60, 100])
def test_whatever_runs_ahead_leaves_room_for_the_group_that_all_wait_for(budget_samples: int | None) -> None:
    """The groups ahead, full, beside a full window of the consumer's: a paused producer has credit again."""
    for group, window, times in ((4, 11, 1.0), (8, 24, 1.7), (16, 20, 3.0), (3, 9, 10.0)):
        size, budget = 100, int((group + window) * 100 / LOW * times) + 1
        check = {"budget_bytes": budget, "sample_bytes": size, "budget_samples": budget_samples}
        check_feasible(group_size=group, window_size=window, **check)  # type: ignore[arg-type]
        marks = Watermarks(
            budget,
            group * size,
            budget_samples=budget_samples,
            group_samples=group,
            window_samples=window,
        )
        ahead = marks.groups_ahead
        most = (ahead - 1) * group + window
        assert most * size <= marks.resume_bytes
        assert budget_samples is None or most <= marks.resume_samples
        assert ahead >= 1


def test_producers_whose_every_prompt_fails_all_end_with_the_reason(ledger: SQLiteLedger) -> None:
    """Each keeps its failures aside until something is captured; none waits for the others' for ever."""

    def refuse(_: object) -> None:
        raise RuntimeError("index out of range")

    shape = Shape(prompts=6, group=2, producers=2)
    features, errors = InMemoryLightFeatureStore(), list[BaseException]()

    def produce(worker: str) -> None:
        try:
            simulated_producer(
                shape, worker, ledger, features, LightEngine(refuse), lambda *_, **__: None
            ).run()
        except EngineError as error:
            errors.append(error)

    threads = [threading.Thread(target=produce, args=(worker,)) for worker in ("0", "1")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    assert errors
    assert all("index out of range" in str(error) for error in errors)
    assert ledger.snapshot().prompts.leased == 0


def a_producer(
    ledger: Ledger, shape: Shape, features: Any = None, refuses: Any = None, groups_ahead: int = 1
) -> Producer:
    """Producer 0 of a run that has another one, with room for that many groups ahead."""
    producer = simulated_producer(
        shape,
        "0",
        ledger,
        features or InMemoryLightFeatureStore(),
        LightEngine(refuses),
        lambda *_, **__: None,
    )
    assert producer._neighbours is not None
    producer._neighbours._groups_ahead = groups_ahead
    return producer


def test_who_has_just_captured_the_group_that_all_waited_for_is_bound_again(
    ledger: SQLiteLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one is held by another producer now, and needs its room."""
    other = ProducerSession(ledger, SIMULATED, "1")
    producer = a_producer(ledger, Shape(prompts=6, group=2, producers=2))
    other.acquire()
    other.tell({"beat": 1})
    begin = producer._begin

    def other_leases_too(*group: Any) -> None:
        begin(*group)
        other.lease(2, 2)

    monkeypatch.setattr(producer, "_begin", other_leases_too)
    assert producer.run(max_rounds=2) == 2
    assert ledger.snapshot().settled == 2


def test_groups_that_fail_whole_at_the_start_do_not_end_a_run_that_has_more(ledger: SQLiteLedger) -> None:
    """A later group shows that the engine works: their producer may go beyond the bound for it."""
    bad = {f"{SIMULATED}:{ordinal}" for ordinal in range(4)}

    def refuse(ids: list[str]) -> None:
        if bad >= set(ids):
            raise RuntimeError("index out of range")

    other = ProducerSession(ledger, SIMULATED, "1")
    other.acquire()
    other.tell({"beat": 1})
    assert a_producer(ledger, Shape(prompts=6, group=2, producers=2), refuses=refuse).run() == 2
    assert ledger.snapshot().prompts.failed == 4
    assert ledger.snapshot().closed


def test_a_producer_that_an_error_ended_leaves_what_it_held_to_the_others(ledger: SQLiteLedger) -> None:
    """They take it for dead after the time-out; had it said that it left, nobody would."""
    shape, features = Shape(prompts=6, group=2, producers=2), InMemoryLightFeatureStore()

    def fail(*_: object, **__: object) -> None:
        raise StoreError("the disk is gone", why="it was removed", next="put it back")

    features.put = fail  # type: ignore[method-assign]
    with pytest.raises(StoreError):
        a_producer(ledger, shape, features).run()
    assert ledger.snapshot().prompts.leased == 2
    assert set(producers_in(ledger.facts())) == {"0"}


def test_a_producer_that_stays_for_its_memory_keeps_its_name(ledger: SQLiteLedger) -> None:
    """Until a sample is lost, which it may capture again; one that was taken for dead is refused."""
    store, shape = InMemoryLightFeatureStore(), Shape(producers=2)
    producer = simulated_producer(shape, "1", ledger, store, LightEngine(), lambda *_, **__: None)
    producer.run()
    assert set(producers_in(ledger.facts())) == set()
    told = list[set[str]]()

    def stop() -> bool:
        told.append(set(producers_in(ledger.facts())))
        return True

    assert not producer.stay(stop)
    assert told == [{"1"}], "who joins is given another name"
    assert set(producers_in(ledger.facts())) == set()
    lost, *_ = ledger.find()
    producer.session.report_lost([lost])
    assert producer.stay(lambda: False)
    producer.run()

    def taken_over() -> bool:
        ledger.acquire(producer_role("1"), "another")
        return False

    with pytest.raises(FencedError):
        producer.stay(taken_over)
