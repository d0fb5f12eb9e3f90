"""The supervisor: it starts again what dies, as long as anything moves, and tells why it stopped."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

from paceline.errors import LedgerError, PacelineError, RanksError
from paceline.ledger.isolation import Isolation
from paceline.ledger.records import CheckpointRecord
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.roles import supervisor as supervisor_module
from paceline.roles.child import RoleFailedError
from paceline.roles.supervisor import Supervisor
from paceline.testing.ledger_calls import capture, producer_of


class Ended:
    """A process that has ended with `code`, after it had said `error`."""

    def __init__(self, code: int, error: RoleFailedError | None = None) -> None:
        self.code, self.said = code, error
        self.role = "of its own"

    def poll(self) -> int:
        return self.code

    def error(self) -> RoleFailedError | None:
        return self.said


@pytest.fixture
def supervisor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Supervisor:
    """Of a run that allows two restarts; starting a role only counts."""
    supervised = object.__new__(Supervisor)
    supervised._ledger = SQLiteLedger()
    supervised._config = SimpleNamespace(  # type: ignore[assignment]
        machine=SimpleNamespace(restarts_max=2), run=SimpleNamespace(directory=tmp_path)
    )
    supervised._restarts = {}
    supervised._children = {}
    monkeypatch.setattr(supervised, "_start", lambda _: None)
    return supervised


def ended(supervisor: Supervisor, role: str, code: int, error: RoleFailedError | None = None) -> None:
    supervisor._children[role] = Ended(code, error)  # type: ignore[assignment]
    supervisor._look_after(role)


def test_restarts_without_progress_come_to_an_end(supervisor: Supervisor) -> None:
    """What kills the role again and again at the same place is not waited out for ever."""
    for _ in range(2):
        ended(supervisor, "consumer", -9)
    with pytest.raises(PacelineError, match=r"3 times by SIGKILL.* without progress.*lack of memory"):
        ended(supervisor, "consumer", -9)


def test_many_producers_that_are_killed_at_once_are_all_started_again(supervisor: Supervisor) -> None:
    """Each role's restarts count for themselves: one machine out of memory is not a kill at every start."""
    for _ in range(2):
        for number in range(1, 6):
            ended(supervisor, f"producer-{number}", -9)
    with pytest.raises(PacelineError, match="producer-3 ended 3 times"):
        ended(supervisor, "producer-3", -9)


def test_only_a_producer_that_was_killed_has_its_work_returned(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that ended has given it back; one that was taken for dead has none any more."""
    taken = list[str]()
    monkeypatch.setattr(supervisor_module, "take_from_killed", lambda *given: taken.append(given[-1]))
    for role, code in (("producer-1", -9), ("producer-2", 0), ("producer-3", 11), ("consumer", -9)):
        ended(supervisor, role, code)
    ended(supervisor, "producer-4", 1, RoleFailedError("KeyError", "why", "next", 1))
    assert taken == ["producer-1", "producer-4"]


def test_want_of_memory_is_suspected_only_of_a_kill(supervisor: Supervisor) -> None:
    """A crash of a library is another matter, and an end without an error still another one."""
    for code, words in ((-11, "by SIGSEGV"), (0, "without an error")):
        supervisor._restarts = {}
        for _ in range(2):
            ended(supervisor, "consumer", code)
        with pytest.raises(PacelineError, match=f"3 times {words}") as caught:
            ended(supervisor, "consumer", code)
        assert "lack of memory" not in str(caught.value)


def test_an_error_that_comes_twice_without_progress_is_not_met_a_third_time(supervisor: Supervisor) -> None:
    """It is told in the role's own words; a load of the model each would only delay that."""
    error = RoleFailedError("KeyError: 'weight_map'", "why", "next", 1)
    ended(supervisor, "producer", 1, error)
    capture(producer_of(supervisor._ledger), 0)
    ended(supervisor, "producer", 1, error)
    with pytest.raises(RoleFailedError, match="weight_map"):
        ended(supervisor, "producer", 1, error)


def test_an_error_of_pacelines_own_ends_the_run_at_once(supervisor: Supervisor) -> None:
    """With the role's exit code, message and advice."""
    with pytest.raises(RoleFailedError) as caught:
        ended(supervisor, "consumer", 4, RoleFailedError("no model", "it is needed", "make model", 4))
    assert (caught.value.what, caught.value.next, caught.value.exit_code) == ("no model", "make model", 4)


def test_ranks_that_only_lost_one_another_are_started_again_as_after_a_kill(supervisor: Supervisor) -> None:
    """Their words are the same each time, and name no cause; restarts_max bounds them."""
    error = RoleFailedError("A rank was lost", "why", "next", RanksError.exit_code)
    for _ in range(2):
        ended(supervisor, "consumer", RanksError.exit_code, error)
    with pytest.raises(RoleFailedError, match="A rank was lost"):
        ended(supervisor, "consumer", RanksError.exit_code, error)


def test_a_run_whose_every_prompt_failed_ends_with_the_reason(supervisor: Supervisor) -> None:
    """Its consumer ends without an error, and would be started for ever."""
    producer = producer_of(supervisor._ledger, prompts=2)
    producer.lease(2)
    producer.fail([0, 1], "no text", retryable=False)
    with pytest.raises(PacelineError, match=r"None of the 2 prompts.*no text"):
        ended(supervisor, "consumer", 0)


def test_restarts_do_not_count_while_the_run_moves(supervisor: Supervisor) -> None:
    """A week of training may meet many kills; each with progress behind it starts the count anew."""
    producer = producer_of(supervisor._ledger, prompts=9)
    for number in range(9):
        capture(producer, number)
        supervisor._restart("producer", -9)


def test_there_is_a_producer_that_watches_the_others_until_every_lease_has_ended(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lost sample of a stream that had ended is captured again, by one that joined on another host. If that
    one dies, only a producer that is alive can take it for dead."""
    started = list[str]()
    monkeypatch.setattr(supervisor, "_start", started.append)
    producer, joined = (
        producer_of(supervisor._ledger, prompts=1),
        producer_of(supervisor._ledger, "9", prompts=1),
    )
    sample_ids = capture(producer, 0)
    assert producer.end_stream()
    ended(supervisor, "producer", 0)
    assert started == []
    producer.report_lost(sample_ids)
    joined.lease(1)
    ended(supervisor, "producer", 0)
    assert started == ["producer"]


def test_isolation_is_progress(supervisor: Supervisor) -> None:
    """It takes a death a halving; every halving brings the run closer to going on without the sample."""
    session = producer_of(supervisor._ledger)

    def dies(_: object) -> bool:
        raise KeyboardInterrupt

    for _ in range(6):
        with pytest.raises(KeyboardInterrupt):
            Isolation(session, "capture.0", list("abcdefgh")).run(dies)
        supervisor._restart("producer", -9)


def test_a_ledger_that_is_removed_or_replaced_stops_the_run(supervisor: Supervisor, tmp_path: Path) -> None:
    """What the roles recorded from then on would be lost with the file that they have open."""
    ledger = tmp_path / "ledger.db"
    supervisor._ledger, supervisor._show = SQLiteLedger(ledger), lambda _: None
    supervisor._signals = SimpleNamespace(count=0)  # type: ignore[assignment]
    ledger.rename(tmp_path / "aside")
    with pytest.raises(LedgerError, match="deleted or replaced"):
        supervisor._watch()
    ledger.touch()
    with pytest.raises(LedgerError, match="deleted or replaced"):
        supervisor._watch()


class Measuring:
    """An evaluator that runs until the test ends it."""

    started: ClassVar[list[Measuring]] = []

    def __init__(self, role: str, _: Path, __: object, threads: int, *arguments: str) -> None:
        self.what = (role, threads, *arguments)
        self.code: int | None = None
        self.yields = False
        self.started.append(self)

    def run_in_the_background(self, _: object) -> None:
        self.yields = True

    def poll(self) -> int | None:
        return self.code

    def error(self) -> None:
        """It said nothing."""

    def end(self, _: float) -> None:
        assert self.code is not None


class Schedule:
    """Every other checkpoint is due; a measurement stops training if the test says so."""

    reason = ""

    def is_due(self, head: CheckpointRecord) -> bool:
        return head.step % 2 == 0

    def begun(self, _: object) -> None:
        """The supervisor counts for itself."""

    def ended(self, _: int, __: object) -> str:
        return self.reason


def head(step: int) -> CheckpointRecord:
    return CheckpointRecord(step, f"step-{step}", "")


@pytest.fixture
def measuring(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> Supervisor:
    Measuring.started.clear()
    monkeypatch.setattr("paceline.roles.supervisor.Child", Measuring)
    monkeypatch.setattr("paceline.roles.supervisor.spare_processors", lambda _: [2, 3])
    supervisor._run_file = Path("run.yaml")
    supervisor._schedule = Schedule()  # type: ignore[assignment]
    supervisor._signals = SimpleNamespace(count=0)  # type: ignore[assignment]
    supervisor._tell = lambda _: None
    return supervisor


def test_one_measurement_at_a_time_runs_beside_training(measuring: Supervisor) -> None:
    """On the processors that the roles leave, yielding to everything."""
    for step in (1, 2, 4):
        measuring._measure(head(step))
    [first] = Measuring.started
    assert first.what == ("evaluator", 2, "beside")
    assert first.yields
    first.code = 0
    measuring._measure(head(5))
    assert "evaluator" not in measuring._children
    measuring._measure(head(6))
    assert len(Measuring.started) == 2


def test_a_measurement_that_the_end_overtakes_is_left_out(measuring: Supervisor) -> None:
    """It may have had no processor to itself for long; the end is measured by itself."""
    told: list[str] = []
    measuring._tell = told.append
    measuring._measure(head(2))
    measuring._ledger.set_facts(None, {"completed_step": 4})
    measuring._end_measuring()
    assert told == ["training is complete; the measurement that was going on beside it is left out"]
    Measuring.started[0].code = 0
    measuring._end_measuring()
    measuring._measure(head(4))
    assert (len(told), len(Measuring.started)) == (1, 1)


def test_a_flat_curve_becomes_a_fact_that_the_trainer_reads(measuring: Supervisor) -> None:
    """Once: the reason on record is the one that ended training."""
    for reason in ("flat", "flatter"):
        measuring._schedule.reason = reason  # type: ignore[attr-defined]
        measuring._measure(head(2))
        Measuring.started[-1].code = 0
        measuring._measure(None)
    assert measuring._ledger.facts()["stopped_flat"] == "flat"
