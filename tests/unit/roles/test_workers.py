"""The producers of a run by name: who joins takes a free one, and the dead and the distant are told apart."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from paceline.config.load import load_run_config
from paceline.config.run import RunConfig
from paceline.errors import ConfigError, FencedError, RunBusyError, StoreError, UnknownResultError
from paceline.ledger.facts import PRODUCERS_STARTED, producers_in
from paceline.ledger.ledger import Ledger
from paceline.ledger.locks import RoleLock
from paceline.ledger.producer_session import ProducerSession
from paceline.ledger.records import Fence, SourceBlock
from paceline.roles import workers
from paceline.roles.binding import others_kept_out
from paceline.roles.feature_folder import take_folder
from paceline.roles.plan import processors_of_roles, spare_processors
from paceline.roles.snapshot import take_snapshot
from paceline.roles.workers import (
    JOINING,
    KeptName,
    about_this_process,
    elsewhere,
    join,
    known_roles,
    role_of,
    take_from,
    take_from_killed,
    take_from_the_dead,
    worker_of,
)
from paceline.testing.tiny_run import TinyRun

FAR = {"host": "far away", "pid": 1, "boot": "another"}


@pytest.fixture
def config(tmp_path: Path) -> Iterator[RunConfig]:
    run = TinyRun(tmp_path, tmp_path / "model", machine={"producers": 2, "producer_threads": 2})
    yield load_run_config(run.run_file)
    run.free()


@pytest.fixture
def ledger(config: RunConfig) -> Ledger:
    return config.open_ledger()


def producer(ledger: Ledger, worker: str, about: dict[str, Any]) -> ProducerSession:
    """One that has leased the next prompt, and told of itself."""
    session = ProducerSession(ledger, "run", worker)
    session.acquire()
    session.extend([SourceBlock(0, 9, "nine")])
    session.tell({**about, "beat": 1, "holds": [[session.lease(1)[0].ordinal, 12.3]], "aside": 0})
    return session


def test_a_worker_and_its_role_name_each_other() -> None:
    """The first producer of a run has the name that the only one always had."""
    assert [role_of(worker) for worker in ("0", "1", "12")] == ["producer", "producer-1", "producer-12"]
    assert [worker_of(role_of(worker)) for worker in ("0", "1", "12")] == ["0", "1", "12"]


def test_who_joins_takes_a_name_that_nobody_has_here_or_elsewhere(config: RunConfig, ledger: Ledger) -> None:
    """Above those that `paceline train` starts; at most one process chooses at a time."""
    producer(ledger, "3", FAR)
    first, second = join(config), join(config)
    assert [first.role, second.role] == ["producer-2", "producer-4"]
    assert known_roles(config.run.directory) == ["producer", "producer-2", "producer-4", "consumer"]
    first.release()
    assert join(config).role == "producer-2"


def test_producers_that_join_at_the_same_moment_take_turns(
    config: RunConfig, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who chooses is done in a moment; a start that changes what binds the run may take longer."""
    choosing = RoleLock(config.run.directory, JOINING)
    monkeypatch.setattr(workers, "sleep", lambda _: choosing.release())
    assert join(config).role == "producer-2"
    choosing = RoleLock(config.run.directory, JOINING)
    monkeypatch.setattr(workers, "CHOOSING_S", -1.0)
    with pytest.raises(RunBusyError, match="choosing a producer's name"):
        join(config)
    choosing.release()


def test_nobody_joins_a_run_that_has_not_begun_or_is_complete(config: RunConfig) -> None:
    """There is nothing to help with."""
    with pytest.raises(ConfigError, match="There is no ledger"):
        join(config)
    config.open_ledger().set_facts(None, {"completed_step": 3})
    with pytest.raises(ConfigError, match="is complete"):
        join(config)


def test_whoever_changes_what_binds_a_run_keeps_every_producer_out(config: RunConfig, ledger: Ledger) -> None:
    """One that joined counts, one that is joining counts, and one on another host is refused from then on."""
    distant = producer(ledger, "3", FAR)
    joined = join(config)
    with others_kept_out(config, None, ledger) as alone:
        assert not alone
    joined.release()
    choosing = RoleLock(config.run.directory, JOINING)
    with others_kept_out(config, None, ledger) as alone:
        assert not alone
    choosing.release()
    distant.set_facts({"still": "there"})
    with others_kept_out(config, None, ledger) as alone:
        assert alone
        with pytest.raises(FencedError):
            distant.lease(1)
    assert elsewhere(ledger.facts(), config.run.directory) == []


def test_a_start_returns_the_work_of_dead_producers_of_this_host(config: RunConfig, ledger: Ledger) -> None:
    """A lock says that they have no process. Of other hosts it says nothing."""
    here = about_this_process(config.run.directory)
    for worker, about in (("0", here), ("2", here), ("3", here), ("4", FAR)):
        producer(ledger, worker, about)
    live = RoleLock(config.run.directory, role_of("3"))
    take_from_the_dead(config, ledger)
    now = ledger.snapshot()
    assert set(producers_in(now.facts)) == {"3", "4"}
    assert now.epochs == {"producer:0": 1, "producer:2": 2, "producer:3": 1, "producer:4": 1}
    assert now.prompts.leased == 3, "the first producer starts now, and returns its own leases"
    live.release()


def test_the_work_of_a_killed_producer_returns_at_once_if_another_one_can_do_it(
    config: RunConfig, ledger: Ledger
) -> None:
    """Neither its own next load of the target nor the others' time-out is waited for; who lives keeps all."""
    here = about_this_process(config.run.directory)
    killed = producer(ledger, "0", here)
    take_from_killed(config, ledger, "producer")
    assert ledger.snapshot().prompts.leased == 1, "there is nobody else: its next process returns it"
    other = producer(ledger, "1", here)
    live = RoleLock(config.run.directory, role_of("1"))
    take_from_killed(config, ledger, "producer-1")
    assert ledger.snapshot().prompts.leased == 2, "another process has that name now"
    take_from_killed(config, ledger, "producer")
    assert set(producers_in(ledger.facts())) == {"1"}
    [lease] = other.lease(1)
    assert (lease.ordinal, lease.deaths) == (0, 1), "and the death counts, once"
    with pytest.raises(FencedError):
        killed.lease(1)
    live.release()


def test_who_joins_says_that_it_lives_while_it_loads_its_target(config: RunConfig, ledger: Ledger) -> None:
    """For as long as it has the name, and not once it has begun."""
    ledger.set_facts(None, {"config": {}})
    lock = join(config)
    beats = set()
    with KeptName(ledger, "2", timeout_s=0.05) as kept:
        while len(beats) < 4:
            beats.add(producers_in(ledger.facts())["2"].get("beat"))
            ledger.wait(ledger.lsn(), timeout_s=60.0)
        kept.end()
        begun = producer(ledger, "2", about_this_process(config.run.directory))
        mark = ledger.lsn()
    assert (ledger.lsn(), begun.lease(1)[0].ordinal) == (mark, 1)
    lock.release()


def test_a_name_that_was_given_to_another_one_is_not_taken_back(config: RunConfig, ledger: Ledger) -> None:
    """A process that was stopped for long may wake up at any time."""
    lock = join(config)
    with KeptName(ledger, "2", timeout_s=0.05) as kept:
        ledger.set_facts(None, {"producer.2": {**FAR, "claim": "of another one"}})
        kept._thread.join(timeout=60.0)
        assert not kept._thread.is_alive()
    assert producers_in(ledger.facts())["2"] == {**FAR, "claim": "of another one"}
    lock.release()


def test_who_is_overtaken_while_it_takes_a_role_leaves_what_the_faster_one_tells(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It forgets the dead worker's word under its own epoch, so never a successor's."""
    acquire = ledger.acquire

    def overtaken(*args: Any) -> Fence:
        fence = acquire(*args)
        monkeypatch.setattr(ledger, "acquire", acquire)
        producer(ledger, "1", FAR)
        return fence

    monkeypatch.setattr(ledger, "acquire", overtaken)
    take_from(ledger, ["1"], "it was not heard of")
    assert producers_in(ledger.facts())["1"]["host"] == FAR["host"]


def test_a_start_whose_answer_is_lost_writes_again(
    config: RunConfig, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a server a connection may break at any moment of a start."""
    producer(ledger, "1", about_this_process(config.run.directory))
    written, write = list[Any](), ledger.set_facts

    def lost_at_first(fence: Fence | None, facts: dict[str, Any], **how: Any) -> dict[str, Any]:
        found = write(fence, facts, **how)
        written.append(facts)
        if len(written) in (1, 3):
            raise UnknownResultError("lost")
        return found

    monkeypatch.setattr(ledger, "set_facts", lost_at_first)
    take_from(ledger, ["1"], "it was not heard of")
    take_from_the_dead(config, ledger)
    assert [list(facts) for facts in written] == 2 * [["producer.1"]] + 2 * [[PRODUCERS_STARTED]]


def test_who_wakes_up_in_the_middle_of_a_word_writes_nothing_over_its_successor(
    config: RunConfig, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was stopped after it had read that the name is its own, until others had given it away."""
    lock, facts = join(config), ledger.facts
    successor = {**FAR, "claim": "of another one"}
    kept = KeptName(ledger, "2", timeout_s=0.05)

    def stopped_for_long() -> dict[str, Any]:
        found = facts()
        take_from(ledger, ["2"], "it was not heard of")
        ledger.set_facts(None, {"producer.2": successor})
        return found

    monkeypatch.setattr(ledger, "facts", stopped_for_long)
    with kept:
        kept._thread.join(timeout=60.0)
        assert not kept._thread.is_alive()
    assert producers_in(facts())["2"] == successor
    lock.release()


def test_a_name_that_was_given_away_before_it_was_kept_is_not_kept(config: RunConfig, ledger: Ledger) -> None:
    """Its process found its features' folder too late; the successor's word is not taken for its own."""
    lock = join(config)
    take_from(ledger, ["2"], "it was not heard of")
    ledger.set_facts(None, {"producer.2": {**FAR, "claim": "of another one"}})
    mark = ledger.lsn()
    with KeptName(ledger, "2", timeout_s=0.05) as kept:
        assert kept._thread.ident is None
    assert ledger.lsn() == mark
    lock.release()


def test_a_start_returns_leases_of_which_no_fact_is_left(config: RunConfig, ledger: Ledger) -> None:
    """An earlier start was killed while it cleared up; nobody else would ever return them."""
    producer(ledger, "5", about_this_process(config.run.directory)).tell(None)
    take_from_the_dead(config, ledger)
    assert ledger.snapshot().prompts.leased == 0


def test_who_joins_takes_no_name_of_the_producers_that_were_started(
    config: RunConfig, ledger: Ledger
) -> None:
    """Though one of them is being started again, and the run's recorded settings name fewer of them."""
    more = config.model_copy(update={"machine": config.machine.model_copy(update={"producers": 5})})
    take_from_the_dead(more, ledger)
    assert join(config).role == "producer-5"


def test_a_producer_that_joins_from_another_folder_or_mount_is_refused(
    config: RunConfig, ledger: Ledger
) -> None:
    """It would move the features away from the consumer of a run that is going on."""
    take_folder(config, ledger)
    take_folder(config, ledger, joins=True)
    lies = {**ledger.facts()["features_lie"], "device": -1}
    ledger.set_facts(None, {"features_lie": lies})
    with pytest.raises(StoreError, match="would keep its own"):
        take_folder(config, ledger, joins=True)
    assert ledger.facts()["features_lie"] == lies


def test_status_names_the_group_that_training_waits_for_and_its_holder(
    config: RunConfig, ledger: Ledger
) -> None:
    """By what the holder has told; producers of other hosts are listed, too."""
    ledger.set_facts(None, {"config": {"capture.group_size": 4}})
    directory = config.run.directory
    assert take_snapshot(directory, ledger).waits_for == ""
    producer(ledger, "7", FAR)
    snapshot = take_snapshot(directory, ledger)
    assert snapshot.waits_for == "group 0, held by producer-7 on host far away for 12 s"
    assert snapshot.away["producer-7"]["pid"] == 1
    assert snapshot.is_live


class Waits:
    """In place of `Ledger.wait`: time passes on the ledger's clock, and the far producer may speak."""

    def __init__(self, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.speak = 0.0, lambda: None
        monkeypatch.setattr(ledger, "clock", lambda: self.now)
        monkeypatch.setattr(ledger, "wait", self)

    def __call__(self, seen_lsn: int, timeout_s: float) -> int:
        self.now += timeout_s
        self.speak()
        return seen_lsn


def test_a_producer_cannot_join_from_a_host_whose_memory_the_consumer_does_not_read(
    config: RunConfig, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its features would be lost samples to the consumer, again and again. A stop ends the wait."""
    waits = Waits(ledger, monkeypatch)
    take_folder(config, ledger)
    ledger.set_facts(None, {"features_lie": {**ledger.facts()["features_lie"], "boot": FAR["boot"]}})
    far = producer(ledger, "7", FAR)
    with pytest.raises(StoreError, match="on host far away"):
        take_folder(config, ledger, should_stop=lambda: True)
    waits.speak = lambda: far.tell({**FAR, "beat": waits.now})
    with pytest.raises(StoreError, match="on host far away"):
        take_folder(config, ledger)
    waits.speak = lambda: far.tell(None)
    take_folder(config, ledger)


def test_a_run_goes_on_on_another_host_when_the_first_was_killed_with_all_that_ran_there(
    config: RunConfig, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a new container, under another name: once the dead were silent for the time-out."""
    waits, told = Waits(ledger, monkeypatch), list[str]()
    take_folder(config, ledger)
    ledger.set_facts(None, {"features_lie": {**ledger.facts()["features_lie"], "boot": FAR["boot"]}})
    dead = producer(ledger, "0", FAR)
    take_folder(config, ledger, told.append)
    assert waits.now == config.machine.producer_timeout_s
    assert told == ["waiting up to 60 s for a sign of life of producer on host far away"]
    assert ledger.snapshot().prompts.leased == 0
    with pytest.raises(FencedError):
        dead.lease(1)


def test_every_started_role_has_processors_of_its_own_if_there_are_enough(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else all roles share all of them."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    assert processors_of_roles(config) == {"producer": [0, 1], "producer-1": [2, 3], "consumer": [4]}
    assert spare_processors(config) == [5]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    assert set(map(tuple, processors_of_roles(config).values())) == {(0, 1, 2, 3)}


def test_a_supervisor_starts_a_producer_again_that_was_taken_for_dead(
    config: RunConfig, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A consumer that is replaced ends the run: another one trains."""
    from paceline.roles.child import RoleFailedError
    from paceline.roles.supervisor import Supervisor

    supervisor, started = object.__new__(Supervisor), list[str]()
    supervisor._ledger, supervisor._config = ledger, config
    supervisor._restarts = {}
    monkeypatch.setattr(supervisor, "_start", started.append)
    error = RoleFailedError("taken over", "why", "next", FencedError.exit_code)
    ended: Any = SimpleNamespace(poll=lambda: FencedError.exit_code, error=lambda: error)
    supervisor._children = {"producer-1": ended, "consumer": ended}
    supervisor._look_after("producer-1")
    assert started == ["producer-1"]
    with pytest.raises(RoleFailedError):
        supervisor._look_after("consumer")
