"""The dashboard's server: what it tells of runs, who may ask, and that it changes nothing."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from html import escape
from pathlib import Path
from typing import Any, cast

import anyio
import pytest
from starlette.testclient import TestClient
from typer.testing import CliRunner

from paceline.cli.dashboard import _shown, _token
from paceline.cli.main import app
from paceline.dashboard.access import COOKIE, is_named
from paceline.dashboard.runs import Runs
from paceline.dashboard.server import PAGE, _told, dashboard, listen
from paceline.data.answers import Answer, AnswerFiles
from paceline.errors import ConfigError
from paceline.evaluation.marked import MarkedAnswer, MarkedAnswers, write_marked
from paceline.ledger.facts import COMPLETED_STEP
from paceline.monitoring.runs import run_folders
from paceline.telemetry import EventLog
from paceline.testing.run_by_hand import RunByHand

TOKEN = "a token of more than sixteen characters"  # noqa: S105
ODD = "<img src=x onerror=alert(1)>"


def made(folder: Path) -> Path:
    """Two samples in a checkpoint; then two that are acked, and no checkpoint."""
    run = RunByHand(folder)
    run.train(run.capture(2))
    run.checkpoint()
    run.train(run.capture(2))
    run.ledger.set_facts(None, {COMPLETED_STEP: None})
    run.ledger.close()
    log = EventLog(folder / "events" / "consumer.jsonl")
    log.write("role_started", pid=7)
    log.write("step", step=1, loss=2.5)
    log.write("role_started", pid=8)
    log.write("resumed", step=1)
    log.write("error", message=ODD)
    log.close()
    return folder


def keep_answers(folder: Path) -> None:
    answer = MarkedAnswer.of(ODD, (5,), (6, 7, 8, 9), (2,))
    write_marked(
        folder,
        MarkedAnswers(
            began="", step=1, checkpoint="c", guesses={"chain": "chain of 3"}, ways={"chain": (answer,)}
        ),
    )


@pytest.fixture
def base(tmp_path: Path) -> Path:
    made(tmp_path / "runs" / "one")
    made(tmp_path / "runs" / "more" / "two")
    return tmp_path / "runs"


def runs_in(base: Path) -> Runs:
    return Runs(base, lambda: run_folders(base))


def client(base: Path, token: str | None = None, host: str = "127.0.0.1") -> TestClient:
    app = dashboard(runs_in(base), host, token)
    return TestClient(app, base_url=f"http://{host}:8000", follow_redirects=False)


def read(browser: TestClient, path: str) -> Any:
    answer = browser.get(path)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_all_runs_below_a_folder_are_told(base: Path) -> None:
    """Each with its status document, and a run that cannot be read with the reason."""
    (base / "more" / "two" / "ledger.db").write_bytes(b"no database" * 1000)
    shown = {one["folder"]: one for one in read(client(base), "/api/runs")}
    assert shown.keys() == {"one", "more/two"}
    assert shown["one"]["status"]["samples"]["committed"] == 4
    assert shown["more/two"]["status"] is None
    assert shown["more/two"]["problem"].startswith("it cannot be read now: ")


def test_lineage_leads_both_ways(base: Path) -> None:
    """From a step to its samples, and from a sample to its steps, their checkpoint and its text's ids."""
    browser = client(base / "one")
    [run] = read(browser, "/api/runs")
    address = f"/api/runs/{run['run']}"
    first, second = (read(browser, f"{address}/steps/{step}") for step in (1, 2))
    assert (first["fate"], second["fate"]) == ("durable", "provisional")
    assert first["checkpoint"]
    assert not second["checkpoint"]
    sample = first["samples"][0]["sample_id"]
    [found] = read(browser, f"{address}/samples?id={sample}")
    assert [visit["step"] for visit in found["lineage"]["visits"]] == [1]
    assert found["text"] is None
    ordinal = found["lineage"]["ordinal"]
    AnswerFiles(base / "one" / "answers").keep([Answer(ordinal, "t", (5, 6, 7, 8), ((2, 4),))])
    [found] = read(browser, f"{address}/samples?id={sample}")
    assert found["text"]["are_ids"]
    assert [(one["text"], one["is_answer"]) for one in found["text"]["pieces"]] == [
        ("5 6 ", False),
        ("7 8 ", True),
    ]


def test_the_measured_answers_are_told_with_the_drafts_tokens(base: Path) -> None:
    """Null before anything was measured."""
    browser = client(base / "one")
    [run] = read(browser, "/api/runs")
    address = f"/api/runs/{run['run']}/answers"
    assert read(browser, address) is None
    keep_answers(base / "one")
    found = read(browser, address)
    assert (found["step"], [way["guesses"] for way in found["ways"]]) == (1, ["chain of 3"])
    [answer] = found["ways"][0]["answers"]
    assert [(one["text"], one["is_drafted"]) for one in answer["text"]["pieces"]] == [
        ("5 ", False),
        ("6 ", False),
        ("7 8 ", True),
        ("9 ", False),
    ]


def test_what_is_not_there_is_told_as_on_the_command_line(base: Path) -> None:
    """Nothing that a browser asks for becomes a path."""
    browser = client(base)
    run = read(browser, "/api/runs")[0]["run"]
    assert "Step 99 has no plan" in browser.get(f"/api/runs/{run}/steps/99").json()["what"]
    assert "was ever committed" in browser.get(f"/api/runs/{run}/samples?id=x").json()["what"]
    for path in ("/api/runs/..%2F..%2Fetc/history", "/../server.py", "/%2e%2e/server.py", "/__init__.py"):
        assert browser.get(path).status_code == 404


def test_the_timeline_tells_of_a_kill(base: Path) -> None:
    """A process that told of no end, and another one after it."""
    browser = client(base / "one")
    [run] = read(browser, "/api/runs")
    history = read(browser, f"/api/runs/{run['run']}/history")
    [consumer] = history["timeline"]
    assert [(span["pid"], span["ended"]) for span in consumer["spans"]] == [(7, "killed"), (8, "error")]
    assert [mark["words"] for mark in consumer["marks"]] == ["went on after step 1"]
    assert [(point["step"], point["loss"]) for point in history["trained"]] == [(1, 2.5)]


def test_looking_changes_nothing(base: Path) -> None:
    """Not a byte and not a time of any file, whatever is asked."""

    def tree() -> dict[str, tuple[int, int, bytes]]:
        return {
            str(path): (
                path.stat().st_mtime_ns,
                path.stat().st_mode,
                path.read_bytes() if path.is_file() else b"",
            )
            for path in base.rglob("*")
        }

    before, browser = tree(), client(base)
    for one in read(browser, "/api/runs"):
        for path in ("history", "answers", "steps/1", f"samples?id={one['status']['run']}:0"):
            browser.get(f"/api/runs/{one['run']}/{path}")
    assert tree() == before


def test_news_are_told_once(base: Path) -> None:
    """The stream begins with all runs as they are."""

    async def first() -> bytes:
        stream = cast("AsyncIterator[bytes]", _told(runs_in(base), ""))
        return await anext(stream)

    kind, data = anyio.run(first).decode().strip().split("\n")
    assert kind == "event: runs"
    assert {one["folder"] for one in json.loads(data.removeprefix("data: "))} == {"one", "more/two"}


def test_the_page_is_whole_and_fetches_nothing_from_elsewhere(base: Path) -> None:
    """Every file that one names is there, and the browser is told to load no other."""
    browser = client(base)
    names = set(
        re.findall(r'(?:src|href)="(/[^"]*)"|from "\.(/[^"]+)"', "".join(map(Path.read_text, PAGE.iterdir())))
    )
    for name in ("/", *(one or other for one, other in names)):
        answer = browser.get(name)
        assert answer.status_code == 200, name
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        assert not re.search(r"https?://(?!www\.w3\.org/)", answer.text), name
        assert not re.search(
            r"(innerHTML|outerHTML)\s*=[^=]|insertAdjacentHTML|document\.write|eval\(", answer.text
        ), name


def test_another_name_is_not_answered(base: Path) -> None:
    """Any web page may point a name at this machine; its requests carry that name."""
    browser = client(base)
    for host, code in (
        ("evil.example", 403),
        ("evil.example:8000", 403),
        ("localhost:8000", 200),
        ("[::1]:1", 200),
    ):
        assert browser.get("/api/runs", headers={"host": host}).status_code == code, host
    assert is_named("10.0.0.7:8000", "0.0.0.0")  # noqa: S104
    assert is_named("trainer:8000", "trainer")
    assert not is_named("evil.example:8000", "0.0.0.0")  # noqa: S104
    assert not is_named("10.0.0.7", "127.0.0.1")


def test_with_a_token_only_who_knows_it_is_answered(base: Path) -> None:
    """In a header, or once in a form, after which the browser holds a cookie that is not the token."""
    browser = client(base, TOKEN, "10.0.0.7")
    assert browser.get("/").headers["location"] == "/login"
    for path in ("/api/runs", "/api/events", "/app.js", "/api/runs?token=" + TOKEN.replace(" ", "+")):
        assert browser.get(path).status_code == 401, path
    assert browser.get("/api/runs", headers={"authorization": f"Bearer {TOKEN}x"}).status_code == 401
    assert browser.get("/api/runs", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200
    assert browser.get("/login").status_code == 200
    wrong = browser.post("/login", data={"token": "no"})
    assert (wrong.headers["location"], "set-cookie" in wrong.headers) == ("/login?wrong=1", False)
    assert browser.post("/login", content=b"x" * 5000).status_code == 413
    right = browser.post("/login", data={"token": TOKEN})
    assert right.headers["location"] == "/"
    assert {"HttpOnly", "SameSite=strict"} <= set(right.headers["set-cookie"].split("; "))
    assert TOKEN not in right.headers["set-cookie"]
    assert browser.cookies[COOKIE]
    assert read(browser, "/api/runs")


def test_a_host_that_others_reach_needs_a_token() -> None:
    """And a token that is guessed soon is none."""
    for host, token, words in (
        ("0.0.0.0", None, "there is no token"),  # noqa: S104
        ("127.0.0.1", "short", "16 are the least"),
        ("192.0.2.1", TOKEN, "cannot listen on 192.0.2.1"),
    ):
        with pytest.raises(ConfigError, match=words) as raised:
            listen(host, 0, token)
        assert TOKEN not in str(raised.value)
    with listen("127.0.0.1", 0, None) as listening:
        assert listening.getsockname()[1]


def test_the_token_is_read_from_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that cannot be read is an error, and not a dashboard without a token."""
    (tmp_path / "token").write_text(TOKEN + "\n")
    assert _token(tmp_path / "token") == TOKEN
    monkeypatch.setenv("PACELINE_DASHBOARD_TOKEN", "of the environment")
    assert _token(None) == "of the environment"
    with pytest.raises(ConfigError, match="cannot be read"):
        _token(tmp_path / "none")


def test_a_run_or_a_folder_of_runs_is_shown(base: Path) -> None:
    """A run's own folder is one run."""
    assert list(_shown(base / "one")[1]()) == [base / "one"]
    assert set(_shown(base)[1]()) == {base / "one", base / "more" / "two"}


def test_a_report_stands_alone(base: Path) -> None:
    """One file without scripts and addresses, with the checker's verdict; foreign text is escaped."""
    keep_answers(base / "one")
    result = CliRunner().invoke(app, ["report", str(base / "one"), "--to", str(base / "r.html")])
    assert result.exit_code == 0, result.output
    page = (base / "r.html").read_text()
    assert not re.search(r"<script|<img|https?://|url\(", page)
    marked = "<mark class=drafted>7 8 </mark><mark>9 </mark>"
    for words in ("Sound: every rule holds.", "Loss by step", "samples committed", escape(ODD), marked):
        assert words in page, words
    printed = CliRunner().invoke(app, ["report", str(base / "one"), "--json"])
    assert json.loads(printed.output)["check"]["sound"] is True
