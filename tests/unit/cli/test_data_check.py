"""`paceline data check`: what a file is taken for, what cannot be used, and what the target sees of it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from paceline.cli.data import of_file, of_run_file, tell_survey, tell_target
from paceline.data.opening import scan
from paceline.data.settings import DataSection, SourceSection
from paceline.data.survey import survey
from paceline.errors import ConfigError
from paceline.roles.data_check import CheckRequest, CheckResult, Part, Problem, ShownSample
from paceline.target.settings import TargetSection

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


REQUEST = CheckRequest(
    data=DataSection.parse({"path": "x", "answers": "data", "max_answer_tokens": 50}),
    target=TargetSection(model=Path("models/m")),
)
SAMPLE = ShownSample(
    name="s1",
    num_tokens=9,
    parts=(Part(text="[b]hi\n\x1b[2J", is_target=False), Part(text="there", is_target=True)),
    rest=4,
)
RESULT = CheckResult(
    num_samples=4,
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
    tell_target(console, REQUEST, RESULT)
    shown = text.getvalue()
    assert "    [b]hi\n    \\x1b[2J[[there]] ... 4 more tokens\n" in shown
    assert "tokens of 4 samples: 3 to 70, half of them up to 6, 95 of 100 up to 6\n" not in shown
    assert "1 of 5 cannot be captured: too long\n    x, line 4: too long\n" in shown
    assert "about 4 samples a round, at most 2 KiB each" in shown
    assert "add --measure to load models/m" in shown


def test_targets_are_coloured_on_a_terminal() -> None:
    """And what the target would write is announced."""
    console, text = printed(colour=True)
    opened = RESULT.model_copy(update={"samples": (SAMPLE.model_copy(update={"is_open": True}),)})
    tell_target(console, REQUEST, opened)
    assert "\x1b[1;32mthere\x1b[0m" in text.getvalue()
    assert "\x1b[2J" not in text.getvalue()
    assert "the target writes up to 50 tokens" in text.getvalue()


def test_a_measured_group_says_how_long_a_round_takes() -> None:
    """In proportion."""
    console, text = printed()
    measured = RESULT.model_copy(update={"group_seconds": 30.0, "group_samples": 2})
    tell_target(console, REQUEST, measured)
    assert "2 samples took 30.0 s, a round about 1 min 00 s on this machine" in text.getvalue()


RUN_FILE = """
run: {name: a, directory: runs/a, seed: 7}
target: {model: models/m, template: {enable_thinking: false}}
data:
  sources: [{path: one.jsonl}, {path: two.jsonl, weight: 2}]
  answers: data
  too_long: truncate
  max_prompt_tokens: 31
method: {ttt_steps: 2}
evaluation: {prompts: heldout.jsonl}
"""


def test_the_check_of_a_run_file_has_the_settings_of_the_run(tmp_path: Path) -> None:
    """All of them; an option beside it is refused, for it would show another run."""
    path = tmp_path / "run.yaml"
    path.write_text(RUN_FILE)
    data, request = of_run_file(path, {})
    assert [source.weight for source in data.sources] == [1, 2]
    assert (request.data.answers, request.data.too_long, request.data.max_prompt_tokens) == (
        "data",
        "truncate",
        31,
    )
    assert request.target.template == {"enable_thinking": False}
    assert (request.method["name"], request.seed) == ("eagle3", 7)
    assert CheckRequest.model_validate_json(request.model_dump_json()) == request
    with pytest.raises(ConfigError, match="--max-answer-tokens is given beside the run file"):
        of_run_file(path, {"max_answer_tokens": 9})


def test_a_file_is_checked_with_the_defaults_of_a_run_and_what_is_given_instead() -> None:
    """The target writes the answers, however many the file has."""
    _, request = of_file(Path("x"), {"target": Path("m")})
    assert request is not None
    assert request.data == DataSection.parse({"path": "x"})
    given = {"answers": "data", "max_answer_tokens": 9, "split": "test"}
    data, request = of_file(Path("x"), {"target": Path("m"), **given})
    assert request is not None
    assert request.data == data == DataSection.parse({"path": "x", **given})
    with pytest.raises(ConfigError, match="max_answer_tokens"):
        of_file(Path("x"), {"max_answer_tokens": 0})


def test_a_file_is_checked_with_what_decides_masks_and_lengths_in_a_run_file() -> None:
    """The variables of the template are YAML, as they are there."""
    given = {"target": Path("m"), "template": ["enable_thinking=false", "effort=low"], "too_long": "truncate"}
    data, request = of_file(Path("x"), given)
    assert request is not None
    assert request.target.template == {"enable_thinking": False, "effort": "low"}
    assert request.data.too_long == data.too_long == "truncate"
    with pytest.raises(ConfigError, match="too_long"):
        of_file(Path("x"), {"too_long": "cut"})


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"template": ["a=1"]}, "without --target"),
        ({"target": Path("m"), "template": ["enable_thinking"]}, "NAME=VALUE"),
        ({"target": Path("m"), "template": ["=1"]}, "NAME=VALUE"),
        ({"target": Path("m"), "template": ["a={"]}, "not YAML"),
    ],
)
def test_a_variable_that_cannot_be_set_is_refused(given: dict[str, Any], reason: str) -> None:
    """Other masks than the user's would be shown."""
    with pytest.raises(ConfigError, match=reason):
        of_file(Path("x"), given)
