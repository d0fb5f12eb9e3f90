"""`paceline data check`: what a file is taken for, what cannot be used, and what the target sees of it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from paceline.cli.data import tell_survey, tell_target
from paceline.data.opening import scan
from paceline.data.settings import SourceSection
from paceline.data.survey import survey
from paceline.roles.data_check import CheckRequest, CheckResult, Part, Problem, ShownSample

RECORDS = [
    {"prompt": "plain"},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": [{}]},
    {"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]},
    {"prompt": "plain"},
    {"text": "\x1b[2Jx"},
    *({"messages": [{"role": f"wizard{n}", "content": "x"}]} for n in range(5)),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join(map(json.dumps, RECORDS)) + "\nnot JSON\n")
    return path


def printed(*, colour: bool = False) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(
        file=text, force_terminal=colour, color_system="standard" if colour else None, width=400
    ), text


def test_a_file_is_counted_by_format_and_each_kind_of_bad_record_is_placed(path: Path) -> None:
    """The first three of each kind, however many there are."""
    console, text = printed()
    tell_survey(console, "mixed.jsonl", survey(scan(SourceSection(path=path))))
    lines = text.getvalue().splitlines()
    assert lines[0] == "mixed.jsonl: JSON lines, 10 samples (1 prompts, 1 messages, 1 tokens)"
    assert lines[1] == "turns: 1 user, 1 assistant; 1 samples have tools"
    assert lines[2] == "answers: 2 of 3 samples have some"
    assert lines[3:5] == ["1 repeat an earlier one and are used once:", "    line 4 repeats line 1"]
    assert lines[5] == "5 cannot be used: a message has an unknown role"
    assert [line.partition("line ")[2].partition(":")[0] for line in lines[6:9]] == ["6", "7", "8"]
    assert "1 cannot be used: its format is unknown" in lines
    assert "1 cannot be used: it is not JSON" in lines


def test_nothing_usable_is_told_and_not_an_error(tmp_path: Path) -> None:
    """It is what the command is for."""
    (tmp_path / "a.csv").write_text("id,text\n1,x\n")
    console, text = printed()
    tell_survey(console, "a.csv", survey(scan(SourceSection(path=tmp_path / "a.csv"))))
    assert "a.csv: JSON lines, 2 samples (none usable)" in text.getvalue()


REQUEST = CheckRequest(source=SourceSection(path=Path("x")), model=Path("models/m"), max_answer_tokens=50)
SAMPLE = ShownSample(
    name="s1",
    num_tokens=9,
    parts=(Part(text="[b]hi\n\x1b[2J", is_target=False), Part(text="there", is_target=True)),
    rest=4,
)
RESULT = CheckResult(
    answers="data",
    lengths=(3, 5, 6, 70),
    num_targets=9,
    samples=(SAMPLE,),
    problems=(Problem(reason="too long", count=1, first=("x, line 4: too long",)),),
    sample_bytes=2048.0,
    dtype="float32",
)


def test_targets_are_between_brackets_where_there_is_no_colour() -> None:
    """Text of the file is printed literally and obeyed by no terminal."""
    console, text = printed()
    tell_target(console, REQUEST, RESULT, usable=5)
    shown = text.getvalue()
    assert "    [b]hi\n    \\x1b[2J[[there]] ... 4 more tokens\n" in shown
    assert "tokens of 4 samples: 3 to 70, half of them up to 6, 95 of 100 up to 6\n" not in shown
    assert "1 of 5 cannot be captured: too long\n    x, line 4: too long\n" in shown
    assert "about 4 samples a round, at most 2 KiB each" in shown
    assert "add --measure to load models/m" in shown


def test_targets_are_coloured_on_a_terminal() -> None:
    """And what the target would write is announced."""
    console, text = printed(colour=True)
    opened = RESULT.model_copy(
        update={"samples": (SAMPLE.model_copy(update={"is_open": True}),), "answers": "target"}
    )
    tell_target(console, REQUEST, opened, usable=5)
    assert "\x1b[1;32mthere\x1b[0m" in text.getvalue()
    assert "\x1b[2J" not in text.getvalue()
    assert "the target writes up to 50 tokens" in text.getvalue()


def test_a_measured_group_says_how_long_a_round_takes() -> None:
    """In proportion."""
    console, text = printed()
    measured = RESULT.model_copy(update={"group_seconds": 30.0, "group_samples": 2})
    tell_target(console, REQUEST, measured, usable=5)
    assert "2 samples took 30.0 s, a round about 1 min 00 s on this machine" in text.getvalue()
