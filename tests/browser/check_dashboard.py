"""The dashboard in a real headless Chromium: `make test-dashboard` runs it; the fast suite does not.

Clicks, three widths, light and dark, foreign text, no console error, and no violation that axe finds.
Screenshots lie in $SCREENSHOTS, if that is set.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Route, sync_playwright

from paceline.data.answers import Answer, AnswerFiles
from paceline.evaluation.curve import Point, record_point
from paceline.evaluation.marked import (
    MarkedAnswer,
    MarkedAnswers,
    MarkedSample,
    keep_samples,
    write_marked,
)
from paceline.ledger.facts import RUN_ID
from paceline.telemetry import EventLog
from paceline.testing.ledger_calls import RUN_ID as RUN
from paceline.testing.run_by_hand import RunByHand

ODD = "<img src=x onerror=alert(1)>"
WIDTHS = (1280, 768, 375)
TOKEN = "a token of more than sixteen characters"  # noqa: S105


def made(folder: Path, steps: int, name: str = RUN) -> None:
    """A run with a curve, a producer and a consumer that was killed once."""
    run = RunByHand(folder, prompts=2 * steps + 2)
    if name != RUN:
        run.ledger.set_facts(None, {RUN_ID: name})
    log = EventLog(folder / "events" / "consumer.jsonl")
    log.write("role_started", pid=11)
    for step in range(1, steps + 1):
        run.train(run.capture(2))
        log.write("step", step=step, loss=5 / step, acceptance_length_estimate=1 + step / 20)
        if step == steps // 2:
            run.checkpoint()
            log.write("checkpoint", step=step)
            log.write("role_started", pid=12)
            log.write("resumed", step=step)
        chain = {"prompts": 3, "num_draft_tokens": 4, "branching": 1, "emitted_per_cycle": 1.5}
        figures = {**chain, "acceptance_length": 1 + step / 10, "acceptance_rate": [0.6, 0.4, 0.3, 0.2]}
        if step % 4 == 0:
            report = {**figures, "chain": figures}
            record_point(folder, Point(step, "", f"step-{step}", "m", "d", "c", report, 4))
    log.write("error", message=ODD)
    producer = EventLog(folder / "events" / "producer.jsonl")
    producer.write("role_started", pid=10)
    producer.write("note", message=ODD)
    producer.write("role_ended", stopped=False)
    keep_texts(folder, run)
    run.ledger.close()


def keep_texts(folder: Path, run: RunByHand) -> None:
    """Two measured answers in two ways, and a marked sample; as token ids, since there is no tokenizer."""
    answers = [MarkedAnswer.of(name, (1, 2), range(3, 40), (2, 0, 3) * 5) for name in ("plain", ODD)]
    guesses = {"tree": "tree of 7", "chain": "chain of 3"}
    write_marked(
        folder,
        MarkedAnswers(
            began="",
            step=16,
            checkpoint="step-16",
            guesses=guesses,
            ways={"tree": tuple(answers), "chain": tuple(answers[:1])},
            left_out=3,
        ),
    )
    ids = tuple(range(30))
    AnswerFiles(folder / "answers").keep([Answer(n, f"t{n}", ids, ((9, 30),)) for n in range(8)])
    marked = MarkedAnswer.of("t4", ids[:9], ids[9:], (2, 1))
    sample = MarkedSample(ordinal=4, step=16, checkpoint="step-16", guesses="tree of 7", answer=marked)
    keep_samples(folder, run.ledger.facts(), [sample])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("runs")
    made(base / "one", 16)
    made(base / "two", 12, ODD)
    return base


def served(base: Path, *options: str, **environment: str) -> Iterator[str]:
    command = [sys.executable, "-m", "paceline", "dashboard", str(base), "--port", "0", *options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200", **environment}
    ) as process:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        assert found, "it says where it is"
        try:
            yield found[0]
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def address(runs: Path) -> Iterator[str]:
    yield from served(runs)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium") or None,
            args=["--no-sandbox"] if os.geteuid() == 0 else [],
        )
        yield browser
        browser.close()


def opened(chromium: Browser, width: int, scheme: str, problems: list[str]) -> Page:
    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    context.set_default_timeout(15_000)
    page = context.new_page()
    page.on("console", lambda told: problems.append(told.text) if told.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda asked: None if "127.0.0.1" in asked.url else problems.append(asked.url))
    return page


def check(page: Page, name: str) -> None:
    """What is to see now: no part wider than the page, and nothing that axe finds."""
    if folder := os.environ.get("SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
    found = Axe().run(page)
    assert not found.violations_count, found.generate_report()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_runs_are_compared_opened_and_traced(
    chromium: Browser, address: str, width: int, scheme: str
) -> None:
    """From the list of runs to one of them, from a step to a sample and back to its step."""
    problems: list[str] = []
    page = opened(chromium, width, scheme, problems)
    page.goto(address)
    page.wait_for_selector("#compared .line.c1")
    check(page, f"runs-{scheme}-{width}")
    page.locator("#runs input").nth(1).click()
    page.wait_for_selector("#compared .line.c1", state="detached")
    page.click(f"#runs a >> text={RUN}")
    page.wait_for_selector("#timeline .cross")
    page.wait_for_selector("#curves .dot")
    assert page.locator("#flow li").count() == 8
    assert page.locator("#run-title").inner_text() == RUN
    page.click("#answers summary >> text=plain")
    first = page.locator("#answers details[open] mark.drafted").first
    assert "underline" in first.evaluate("mark => getComputedStyle(mark).textDecorationLine")
    assert first.inner_text().strip() == "4 5"
    page.select_option("#way", label="chain of 3")
    page.wait_for_selector("#answers summary", state="attached")
    assert page.locator("#answers summary").count() == 1
    page.select_option("#way", label="tree of 7")
    page.click("#answers summary >> nth=0")
    page.fill("#step", "3")
    page.press("#step", "Enter")
    page.click("#found button.link >> nth=0")
    page.wait_for_selector("#found article >> text=durable")
    page.wait_for_selector("#found article >> text=Underlined: the draft of step 16")
    assert page.locator("#found pre mark.drafted").count() == 2
    check(page, f"run-{scheme}-{width}")
    page.click("#found button.link >> text=step 3")
    page.wait_for_selector("#found table")
    page.go_back()
    page.wait_for_selector("#found article")
    assert not problems
    page.context.close()


def test_the_keyboard_reaches_everything(chromium: Browser, address: str) -> None:
    """The skip link first; arrow keys read a curve."""
    problems: list[str] = []
    page = opened(chromium, 1280, "light", problems)
    page.goto(address)
    page.wait_for_selector("#runs a")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.focus("#runs a")
    page.keyboard.press("Enter")
    page.wait_for_selector("#curves .line")
    page.focus("#curves svg")
    page.keyboard.press("Home")
    assert page.locator("#curves .readout").first.inner_text() == "step 1: loss 5"
    assert not problems
    page.context.close()


def test_foreign_text_is_text(chromium: Browser, address: str) -> None:
    """A run's name, an error and a note that look like markup are shown as they are."""
    problems: list[str] = []
    page = opened(chromium, 1280, "light", problems)
    page.goto(address)
    page.click(f"#runs a >> text={ODD}")
    page.wait_for_selector("#timeline .cross")
    assert page.locator("#run-title").inner_text() == ODD
    assert page.locator("#notes li").inner_text() == ODD
    assert page.locator(".problem").first.inner_text() == ODD
    page.click("#answers summary >> nth=1")
    assert page.locator("#answers details[open] strong").inner_text() == ODD
    assert page.locator("main img").count() == 0
    assert not problems
    page.context.close()


def test_a_folder_without_runs_says_how_one_begins(chromium: Browser, tmp_path: Path) -> None:
    """And shows the first one when it is there."""
    problems: list[str] = []
    page = opened(chromium, 375, "dark", problems)
    for url in served(tmp_path):
        page.goto(url)
        page.wait_for_selector("#empty >> text=paceline train")
        check(page, "empty")
        made(tmp_path / "one", 4)
        page.wait_for_selector("#run-title")
    assert not [one for one in problems if "ERR_CONNECTION_REFUSED" not in one]
    page.context.close()


def test_answers_that_could_not_be_read_are_asked_for_again_when_the_run_moves(
    chromium: Browser, tmp_path: Path
) -> None:
    """As while their file is replaced."""
    made(tmp_path / "one", 4)
    refused: list[str] = []

    def answer(route: Route) -> None:
        if refused:
            route.continue_()
        else:
            refused.append(route.request.url)
            route.fulfill(status=404, body="{}")

    page = opened(chromium, 1280, "light", [])
    page.route("**/answers", answer)
    for url in served(tmp_path):
        with page.expect_response("**/answers"):
            page.goto(url)
        run = RunByHand(tmp_path / "one")
        run.train(run.capture(2))
        run.ledger.close()
        page.wait_for_selector("#answers summary")
    page.context.close()


def test_the_token_is_asked_for_once(chromium: Browser, runs: Path) -> None:
    """A wrong one is refused with a word."""
    problems: list[str] = []
    page = opened(chromium, 375, "light", problems)
    for url in served(runs, PACELINE_DASHBOARD_TOKEN=TOKEN):
        page.goto(url)
        page.fill("#token", "a wrong one")
        page.keyboard.press("Enter")
        page.wait_for_selector("#wrong:not([hidden])")
        check(page, "token")
        page.fill("#token", TOKEN)
        page.keyboard.press("Enter")
        page.wait_for_selector("#runs a")
        assert TOKEN not in page.url
    page.context.close()
