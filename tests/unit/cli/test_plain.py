"""What comes from outside is shown letter by letter: reasons, ids, paths and names are no markup."""

from __future__ import annotations

from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from paceline.cli.main import app
from paceline.cli.plain import table
from paceline.cli.progress import describe
from paceline.cli.screen import screen
from paceline.errors import EngineError
from paceline.ledger.facts import RUN_ID
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.monitoring.status import status_of
from paceline.roles.snapshot import open_run, take_snapshot
from paceline.testing.ledger_calls import capture, consumer_of, producer_of

OUTSIDE = ["template error near '[/INST]'", "[red]odd[/red] token", "a :cat: and [b]", "[link=x]\\[/]"]


def told(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.exception
    return result.output


@pytest.mark.parametrize("outside", OUTSIDE)
def test_a_reason_an_id_and_a_name_are_shown_as_they_are(tmp_path: Path, outside: str) -> None:
    """By status and by inspect, of a run that is called like that, too."""
    ledger = SQLiteLedger(tmp_path / "ledger.db")
    producer = producer_of(ledger)
    capture(producer, 0)
    producer.lease(1)
    producer.fail([1], f"{outside}: {outside}", retryable=False)
    consumer_of(ledger).quarantine(["run0:s0"], step=1, reason=outside)
    ledger.set_facts(None, {RUN_ID: outside})
    ledger.close()
    status = told("status", tmp_path)
    assert f"run {outside}" in status
    for listed in (status, told("inspect", tmp_path)):
        assert f"failed prompt {outside}: {outside}\n" in listed
        assert f"quarantined run0:s0: {outside}\n" in listed
    assert f"failed: {outside}\n" in told("inspect", tmp_path, "--sample", outside)


@pytest.mark.parametrize("name", ["x[/a]", "[red]x[/red]", b"x\xff[/a]".decode(errors="surrogateescape")])
def test_a_path_in_an_error_is_shown_as_it_is(tmp_path: Path, name: str) -> None:
    """A name that no terminal can write is escaped."""
    (tmp_path / name).mkdir(parents=True)
    output = told("status", tmp_path / name, code=2)
    assert f"no run in {tmp_path}/{name}".encode(errors="backslashreplace").decode() in output


@pytest.mark.parametrize("outside", OUTSIDE)
def test_every_part_of_an_error_is_shown_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outside: str
) -> None:
    """What, why and next."""

    def fails(_: object) -> None:
        raise EngineError(f"1 {outside}", why=f"2 {outside}", next=f"3 {outside}")

    monkeypatch.setattr("paceline.cli.train.load_run_config", fails)
    output = told("train", tmp_path / "run.yaml", code=4)
    assert all(f"{number} {outside}\n" in output for number in (1, 2, 3))


@pytest.mark.parametrize("width", [40, 20])
def test_a_narrow_terminal_in_ascii_folds_and_cuts_nothing_off(tmp_path: Path, width: int) -> None:
    """Rich would cut a word with an ellipsis, of which ASCII leaves an escape."""
    ledger = SQLiteLedger(tmp_path / "ledger.db")
    capture(producer_of(ledger), 0)
    ledger.set_facts(None, {RUN_ID: "a-name-that-is-longer-than-any-column"})
    ledger.close()
    file = TextIOWrapper(BytesIO(), encoding="ascii", errors="backslashreplace", write_through=True)
    console = Console(file=file, width=width, legacy_windows=False)
    snapshot = take_snapshot(tmp_path, open_run(tmp_path))
    describe(console, snapshot)
    console.print(screen(console, status_of(tmp_path, snapshot)))
    console.print(table("a-head-that-is-longer-than-the-console-is-wide", "b"))
    file.seek(0)
    shown = file.read()
    assert "\\u" not in shown
    assert "any-column" in shown.replace("\n", "").replace(" ", "")
    assert max(map(len, shown.splitlines())) <= width
