"""Runs of chats through the real roles on a real (tiny) target, killed on their way to the same weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from paceline.config.load import load_run_config
from paceline.data.answers import Answer, AnswerFiles
from paceline.data.opening import open_file
from paceline.errors import ConfigError
from paceline.roles.consumer import consume
from paceline.roles.plan import RunPlan, plan_run
from paceline.roles.producer import produce
from paceline.telemetry import read_events
from paceline.testing.small_run import same_bits
from paceline.testing.tiny_folder import make_tiny_folder
from paceline.testing.tiny_run import WORDS, TinyRun, wait_until

CHATS = 24


def write_chats(path: Path) -> Path:
    """Chats of one, two and three answers; every third begins with a system turn."""
    lines = []
    for n in range(CHATS):
        words = [" ".join(WORDS[(n + k * 3 + j) % len(WORDS)] for j in range(2)) for k in range(6)]
        roles = ["user", "assistant"] * (1 + n % 3)
        messages = [{"role": role, "content": text} for role, text in zip(roles, words, strict=False)]
        system = [{"role": "system", "content": "be brief"}] if n % 3 == 0 else []
        lines.append(json.dumps({"id": n, "messages": [*system, *messages]}))
    path.write_text("\n".join(lines) + "\n")
    return path


def make_run(folder: Path, model: Path, **data: Any) -> TinyRun:
    folder.mkdir()
    path = {} if "/" in data.get("answers", "") else {"path": str(write_chats(folder / "chats.jsonl"))}
    section = {"max_answer_tokens": 8, "max_prompt_tokens": 120, "temperature": 0.8, **path, **data}
    return TinyRun(folder, model, data=section, checkpoint={"interval_steps": 2})


def plan(run: TinyRun) -> RunPlan:
    return plan_run(load_run_config(run.run_file))


def kill_the_producer(run: TinyRun) -> None:
    """SIGKILL as soon as a group is committed and others are not."""
    command = [sys.executable, "-m", "paceline.roles.producer", str(run.run_file)]
    events = run.directory / "events" / "producer.jsonl"
    with run.begin(command, run.environment()) as process:
        wait_until(lambda: any(event["event"] == "group" for event in read_events(events)), process)
        process.kill()
    assert 0 < run.ledger().snapshot().committed < CHATS


def kept_answers(run: TinyRun) -> list[Answer]:
    """Without their captures' numbers: a killed producer's reserved ones are used up."""
    return [structs.replace(answer, generation=0) for answer in AnswerFiles(run.directory / "answers").all()]


def keep_one_more(run: TinyRun, answer: Answer) -> None:
    """As a producer does that is killed before the commit."""
    more = Answer(CHATS, f"0/{CHATS}", answer.token_ids, answer.spans)
    AnswerFiles(run.directory / "answers").keep([more])


@pytest.mark.parametrize("answers", ["target", "data"])
def test_a_killed_run_of_chats_ends_in_the_same_weights(
    tiny_model: Path, tmp_path: Path, answers: str
) -> None:
    """The producer is killed between two groups, the consumer stops between two steps."""
    undisturbed = make_run(tmp_path / "plain", tiny_model, answers=answers)
    expected = undisturbed.train_here()
    run = make_run(tmp_path / "killed", tiny_model, answers=answers)
    kill_the_producer(run)
    run.work_here(produce)
    run.work_here(consume, looks=3)
    assert same_bits(run.train_here(), expected)
    assert run.command("fsck").returncode == 0
    kept = [kept_answers(each) for each in (undisturbed, run)]
    assert kept[0] == kept[1]
    assert len(kept[0]) == CHATS
    assert [len(answer.spans) for answer in kept[0][:6]] == [1, 2, 3, 1, 2, 3]


def test_answers_are_exported_as_chats_that_a_run_can_read(tiny_model: Path, tmp_path: Path) -> None:
    """Token ids with the places of the answers, and the chat with what the target said in each turn, of
    committed samples."""
    run = make_run(tmp_path / "first", tiny_model)
    run.work_here(produce)
    kept = list(AnswerFiles(run.directory / "answers").all())
    keep_one_more(run, kept[1])
    out = tmp_path / "answers.jsonl"
    *python, _, run_file = run.arguments("data")
    command = [*python, "data", "export", run_file, "--to", str(out)]
    told = run.run(command)
    assert (told.returncode, told.stdout) == (0, f"answers: {out}\n"), told.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    asked = [
        json.loads(line)["messages"] for line in (tmp_path / "first/chats.jsonl").read_text().splitlines()
    ]
    for row, messages in zip(rows, asked, strict=True):
        assert [message["role"] for message in row["messages"]] == [message["role"] for message in messages]
        users = [n for n, message in enumerate(messages) if message["role"] != "assistant"]
        assert [row["messages"][n] for n in users] == [messages[n] for n in users]
        assert row["messages"][-1] != messages[-1]
    assert [row["id"] for row in rows] == [f"0/{n}" for n in range(CHATS)]
    exact, chats = (list(open_file(out, format=name).read(0, CHATS)) for name in ("tokens", "messages"))
    assert [(prompt.token_ids, prompt.spans) for prompt in exact] == [(a.token_ids, a.spans) for a in kept]
    assert not any(prompt.broken for prompt in chats)


def test_another_run_trains_on_kept_answers_by_prefill_alone(tiny_model: Path, tmp_path: Path) -> None:
    """The same tokens and the same targets, of committed samples only; not for a target that has not
    written them."""
    first = make_run(tmp_path / "first", tiny_model)
    first.work_here(produce)
    kept = list(AnswerFiles(first.directory / "answers").all())
    keep_one_more(first, kept[1])
    second = make_run(tmp_path / "second", tiny_model, answers=str(first.directory))
    assert second.train_here()
    again = list(AnswerFiles(second.directory / "answers").all())
    assert [(a.token_ids, a.spans) for a in again] == [(a.token_ids, a.spans) for a in kept]
    shared = make_run(tmp_path / "shared", tiny_model, answers=str(first.directory))
    questions = [
        json.loads(line)["messages"] for line in (tmp_path / "first/chats.jsonl").read_text().splitlines()
    ]
    alone = next(messages[0]["content"] for messages in questions if messages[0]["role"] == "user")
    (tmp_path / "shared" / "heldout.jsonl").write_text(json.dumps({"prompt": alone}))
    with pytest.raises(ConfigError, match=r"2 prompts of .* were answered by the run"):
        shared.work_here(produce)
    other = make_tiny_folder(tmp_path / "other", seed=1)
    third = make_run(tmp_path / "third", other, answers=str(first.directory))
    with pytest.raises(ConfigError, match="were written by another target"):
        third.work_here(produce)
    fourth = make_run(tmp_path / "fourth", tiny_model, answers=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="keeps no answer of a committed sample"):
        plan(fourth)
