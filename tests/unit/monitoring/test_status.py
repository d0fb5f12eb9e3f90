"""The status document: waits are measured from what the processes tell, and the page is current."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from paceline.cli.main import app
from paceline.ledger.facts import CONFIG
from paceline.ledger.locks import RoleLock
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.monitoring.doing import doing_of
from paceline.monitoring.reference import BEGIN, status_tables
from paceline.monitoring.schema import Process, RunStatus
from paceline.monitoring.shares import WINDOW_S, Window
from paceline.monitoring.status import _estimated_steps, read_status
from paceline.monitoring.waiting import waiting_of
from paceline.telemetry import EventLog

ROOT = Path(__file__).parents[3]
STARTED = {"event": "role_started", "time": 100.0, "pid": 1}


def step(time: float, blocked: float, **fields: float) -> dict[str, Any]:
    return {"event": "step", "time": time, "blocked_seconds": blocked, "samples": 4, **fields}


def written(run: Path, role: str, *events: dict[str, Any]) -> None:
    log = EventLog(run / "events" / f"{role}.jsonl")
    for event in events:
        log.write(**event)
    log.close()


def document(run: Path) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["status", str(run), "--json"])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.output)
    return found


# -- shares --------------------------------------------------------------------------------


def test_loading_a_model_is_no_wait() -> None:
    """The consumer waited 40 s for its first samples, and half of the ten seconds since."""
    events = [STARTED, {"event": "blocked", "time": 139.0, "blocked_seconds": 39.0}, step(140.0, 40.0)]
    window = Window.of([*events, step(150.0, 45.0)], "step", 150.0, is_live=True)
    assert (window.seconds, window.share("blocked_seconds")) == (10.0, 0.5)
    assert window.rate("step", "samples") == 0.4
    assert Window.of(events[:2], "step", 150.0, is_live=True).share("blocked_seconds") is None


def test_only_the_newest_seconds_count() -> None:
    """An hour of waits at the beginning does not hide that the run flows now."""
    long_ago = [step(1000.0 + 10 * number, 5.0 * number) for number in range(100)]
    now = long_ago[-1]["time"] + WINDOW_S
    flowing = [step(now - WINDOW_S + second, 495.0) for second in (10.0, 30.0, 60.0)]
    window = Window.of([*long_ago, *flowing], "step", now, is_live=True)
    assert window.share("blocked_seconds") == 0.0
    assert Window.of(long_ago, "step", now, is_live=True).count("step") == 0


def test_a_dead_process_has_the_shares_of_its_last_seconds() -> None:
    """Else every stopped run would look idle."""
    window = Window.of([STARTED, step(101.0, 0.0), step(111.0, 8.0)], "step", 9e9, is_live=False)
    assert window.share("blocked_seconds") == 0.8


# -- words ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lacks", "full", "stalls", "limits", "words"),
    [
        (0.38, 0.0, 0.0, "capture", "the trainer waits 38 % of the time for samples: add a producer"),
        (
            0.38,
            0.4,
            0.0,
            "room",
            "capture 40 % for room, which a checkpoint frees: raise features.budget_mib",
        ),
        (0.02, 0.6, 0.0, "training", "capture waits 60 % of the time for room: training takes the time"),
        (0.02, 0.6, 0.3, "checkpoints", "30 % of the time for checkpoints: raise checkpoint.interval_steps"),
        (0.02, 0.03, 0.0, "nothing", "both sides are busy"),
    ],
)
def test_what_limits_a_run_is_said_with_advice(
    lacks: float, full: float, stalls: float, limits: str, words: str
) -> None:
    """The worst wait decides."""
    consumer = Process(role="consumer", state="live", waiting_share=lacks)
    producers = [Process(role=role, state="live", waiting_share=full) for role in ("producer", "producer-1")]
    told = waiting_of(consumer, producers, stalls, all_captured=False)
    assert told.limits == limits
    assert words in told.words
    assert waiting_of(consumer, producers, 0.0, all_captured=True).limits == "training"


def test_a_producer_that_holds_the_others_up_is_no_reason_for_one_more() -> None:
    """Prompts have an order, and the others wait for their turn."""
    consumer = Process(role="consumer", state="live", waiting_share=0.6)
    producers = [Process(role="producer-1", state="live", waiting_share=0.0, idle_share=0.7)]
    told = waiting_of(consumer, producers, 0.0, all_captured=False)
    assert told.limits == "turn"
    assert "add a producer" not in told.words


def test_nobody_is_advised_about_a_run_that_has_ended() -> None:
    """Its shares stay, as they were at its end."""
    consumer = Process(role="consumer", state="ended", waiting_share=0.5)
    told = waiting_of(consumer, [], None, all_captured=False)
    assert (told.consumer_share, told.words, told.limits) == (0.5, "", "")


@pytest.mark.parametrize(
    ("role", "last", "doing"),
    [
        ("producer", {"event": "blocked", "time": 199.0}, "waits for room"),
        ("consumer", {"event": "blocked", "time": 199.0}, "waits for samples"),
        ("producer-1", {"event": "idle", "time": 199.0}, "waits for its turn"),
        ("producer", {"event": "blocked", "time": 150.0}, "captures"),
        ("consumer", {"event": "first_weights", "time": 150.0, "samples": 8}, "makes the first weights"),
        ("consumer", {"event": "waiting_for_recapture", "time": 199.0}, "waits for a sample to be captured"),
        (
            "evaluator",
            {"event": "measured", "time": 1.0, "prompts": 3, "of": 12, "what": "x"},
            "measures x: 3 of",
        ),
    ],
)
def test_what_a_process_does_is_what_it_told_last(role: str, last: dict[str, Any], doing: str) -> None:
    """A wait that was told of long ago is over: who waits says so every second."""
    events = [STARTED, {"event": "group", "time": 120.0}, last]
    assert doing_of(role, events, 200.0, is_live=True).startswith(doing)


# -- the document --------------------------------------------------------------------------


def test_the_document_has_the_numbers_of_the_text(run: Path) -> None:
    """Of samples, prompts, checkpoint and step."""
    written(run, "consumer", STARTED, step(101.0, 0.5, step=1, loss=2.5, acceptance_length_estimate=1.5))
    found, text = document(run), CliRunner().invoke(app, ["status", str(run)], env={"COLUMNS": "200"}).output
    samples, prompts = found["samples"], found["prompts"]
    assert f"{samples['committed']} committed, {samples['trained']} trained" in text
    assert f"{prompts['pending']} pending, {prompts['leased']} leased, {prompts['done']} done" in text
    assert f"step {found['checkpoint']['step']}" in text
    assert f"step {found['step']['number']}: loss {found['step']['loss']:.3f}" in text
    assert (samples["committed"], samples["trained"], samples["waiting"], found["state"]) == (
        4,
        2,
        2,
        "stopped",
    )


def test_the_status_says_how_states_are_stored(run: Path) -> None:
    """By the settings that the run is bound to; of a run of before it is not known."""
    ledger = SQLiteLedger(run / "ledger.db")
    for recorded, transfer in (({}, ""), ({"method.transfer": "float8"}, "float8")):
        ledger.set_facts(None, {CONFIG: recorded})
        assert document(run)["features"]["transfer"] == transfer
        text = CliRunner().invoke(app, ["status", str(run)], env={"COLUMNS": "200"}).output
        assert ("the states that the draft reads in float8" in text) == (transfer == "float8")
    ledger.close()


def test_a_live_run_says_so_and_names_its_processes(run: Path) -> None:
    """By their locks, which no crash leaves taken."""
    written(run, "consumer", STARTED, {"event": "resumed", "time": 101.0, "step": 1})
    lock = RoleLock(run, "consumer")
    live = document(run)
    lock.release()
    assert (live["state"], document(run)["state"]) == ("live", "stopped")
    consumer = live["processes"][-1]
    assert (consumer["state"], consumer["doing"]) == ("live", "trains")
    assert consumer["pid"] is not None


def test_a_run_that_ended_with_an_error_tells_it(run: Path) -> None:
    """Until it is started again."""
    written(
        run, "consumer", STARTED, {"event": "error", "time": 102.0, "message": "no memory", "exit_code": 8}
    )
    found = document(run)
    assert (found["state"], found["error"]) == ("failed", "no memory")
    written(run, "consumer", {**STARTED, "time": 200.0})
    assert document(run)["state"] == "stopped"


def test_nothing_in_the_document_is_obeyed_or_believed(run: Path) -> None:
    """Events may be anybody's: control characters, numbers that are none, values of other types."""
    odd = ["x", None, float("nan"), 10**400, {"a": 1}, [1]]
    for value in odd:
        fields = dict.fromkeys(("loss", "blocked_seconds", "samples", "step", "num_tokens"), value)
        written(run, "consumer", {"event": "step", "time": 100.0, **fields}, {"event": "step", "time": value})
    written(run, "producer", {"event": "error", "time": 9.0, "message": "\x1b]0;owned\x07"})
    result = CliRunner().invoke(app, ["status", str(run), "--json"])
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output
    assert json.loads(result.output)["step"]["loss"] is None


def test_looking_writes_nothing(run: Path) -> None:
    """Not a file, not a byte."""
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert isinstance(read_status(run), RunStatus)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


# -- the page ------------------------------------------------------------------------------


def test_every_generated_page_is_current() -> None:
    """`make reference` writes them anew."""
    spec = importlib.util.spec_from_file_location("write_reference", ROOT / "scripts" / "write_reference.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for name, write in script.GENERATED.items():
        assert (ROOT / "docs" / name).read_text() == script.written(name, write), f"make reference: {name}"
    assert BEGIN in (ROOT / "docs" / "status.md").read_text()


def test_every_field_is_described() -> None:
    """A number without a meaning is no document."""
    bare = [line for line in status_tables().splitlines() if line.endswith("|  |")]
    allowed = {"processes", "waiting", "prompts", "samples", "features", "step", "checkpoint", "evaluation"}
    allowed |= {"loss", "learning_rate", "grad_norm"}
    assert {line.split("`")[1] for line in bare} <= allowed


def test_where_steps_are_cut_by_tokens_their_number_follows_from_the_share_that_is_done() -> None:
    """The most that the run file allows bounds it, and is all that is known at first."""
    at = {"step": 30, "progress": 0.25}
    assert [_estimated_steps(at, most) for most in (None, 500, 100)] == [120, 120, 100]
    assert [_estimated_steps({}, most) for most in (None, 100)] == [None, 100]
