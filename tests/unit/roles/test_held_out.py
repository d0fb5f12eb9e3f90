"""The held-out file is of any format; what the target is asked is the last question of each record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paceline.config.load import parse_run_config
from paceline.config.run import RunConfig
from paceline.data.answers import Answer, AnswerFiles
from paceline.errors import ConfigError
from paceline.evaluation.heldout import HeldOut
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.roles.held_out import TemplateOnly, held_out_prompts, look_at_held_out
from paceline.roles.plan import plan_run
from paceline.target.tokenizer import PromptEncoder
from paceline.testing.ledger_calls import capture, producer_of
from paceline.testing.tiny_folder import make_tiny_folder


def said(*texts: str) -> list[dict[str, str]]:
    """A chat of these turns, the user's first."""
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("target") / "model")


@pytest.fixture(scope="module")
def target(model: Path) -> TemplateOnly:
    return TemplateOnly(PromptEncoder(model), model)


class Files:
    """A run file with a file of held-out prompts and one of data."""

    def __init__(self, folder: Path, target: TemplateOnly, model: Path) -> None:
        self.folder, self.target, self.model = folder, target, model
        self.write("train", {"prompt": "a wheel"})

    def write(self, name: str, *records: dict[str, Any] | str) -> None:
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        (self.folder / name).write_text("\n".join(lines))

    def config(self, max_prompts: int = 48, **data: Any) -> RunConfig:
        sections = {
            "run": {"name": "r", "directory": str(self.folder / "run")},
            "target": {"model": str(self.model)},
            "data": data or {"path": str(self.folder / "train")},
            "evaluation": {"prompts": str(self.folder / "heldout"), "max_prompts": max_prompts},
        }
        return parse_run_config(sections, source="run.yaml")

    def held_out(self, max_prompts: int = 48) -> HeldOut:
        return held_out_prompts(self.config(max_prompts), self.target, 61, None)


@pytest.fixture
def files(tmp_path: Path, target: TemplateOnly, model: Path) -> Files:
    return Files(tmp_path, target, model)


def test_the_last_question_of_each_record_is_asked(files: Files) -> None:
    """Earlier turns are its context, a given answer is not; token ids end where the last answer begins."""
    files.write(
        "heldout",
        {"prompt": "hi"},
        {"messages": said("hi")},
        {"messages": said("a", "b", "c", "d")},
        {"conversations": [{"from": "human", "value": "e"}, {"from": "gpt", "value": "f"}]},
        {"instruction": "g", "output": "h"},
        {"input_ids": [4, 5, 6, 7, 8], "spans": [[1, 2], [3, 5]]},
        {"input_ids": [9, 4]},
    )
    encode = files.target.encode
    turns = (*encode("a")[:-1], *encode("b")[:-1], *encode("c"))
    assert list(files.held_out().prompts) == [
        *(encode("hi"), encode("hi"), turns, encode("e"), encode("g")),
        *((4, 5, 6), (9, 4)),
    ]


def test_nothing_is_left_out_in_silence(files: Files) -> None:
    """Broken lines, chats in which nobody asks, repeats, and prompts beyond those that are measured."""
    chat = {"messages": [{"role": "system", "content": "be brief"}]}
    prompts = [{"id": n, "prompt": f"wind {'abcd'[n]}"} for n in range(4)]
    files.write("heldout", "broken", chat, *prompts, prompts[0])
    found = files.held_out(max_prompts=3)
    assert (len(found.prompts), found.repeated, found.beyond) == (2, 1, 2)
    broken, silent = found.left_out.values()
    assert broken.startswith(f"{files.folder / 'heldout'}, line 1: it is not JSON")
    assert silent == "it is a chat in which no user says anything"


@pytest.mark.parametrize(
    ("trained", "is_shared"),
    [
        ({"messages": said("a", "other words", "go on", "d", "e", "f")}, True),
        ({"messages": said("b", "b", "go on", "d")}, False),
        ({"messages": said("x", "b", "a", "b", "go on", "d")}, False),
        ({"prompt": "a"}, False),
        ({"prompt": "alone"}, True),
        ({"messages": said("x", "y", "alone", "z")}, True),
        ({"input_ids": [4, 5, 6, 7], "spans": [[1, 2], [3, 4]]}, True),
        ({"input_ids": [4, 5, 6, 7], "spans": [[1, 2]]}, False),
    ],
)
def test_a_question_that_is_trained_on_is_not_measured(
    files: Files, trained: dict[str, Any], is_shared: bool
) -> None:
    """Of a chat of several turns, all that the user says up to the last: two chats may both "go on"."""
    files.write(
        "heldout",
        {"messages": said("a", "b", "go on")},
        {"messages": said("alone", "c")},
        {"input_ids": [4, 5, 6]},
    )
    files.write("train", trained)
    if not is_shared:
        plan_run(files.config())
        return
    with pytest.raises(ConfigError, match=r"1 prompts of .*heldout are also in"):
        plan_run(files.config())


def test_a_later_question_of_a_kept_answer_is_not_measured(files: Files) -> None:
    """The tokens before any of its answers are what was asked."""
    files.write("heldout", {"input_ids": [4, 5, 6]})
    AnswerFiles(files.folder / "other" / "answers").keep([Answer(0, "0/x", (4, 5, 6, 7), ((1, 2), (3, 4)))])
    capture(producer_of(SQLiteLedger(files.folder / "other" / "ledger.db")), 0)
    config = files.config(answers=str(files.folder / "other"))
    with pytest.raises(ConfigError, match=r"were answered by the run in .*; the first is '0/x'"):
        look_at_held_out(config, files.target, 61, None)
