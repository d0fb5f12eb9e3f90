"""`paceline init` asks at a terminal, and takes options elsewhere."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from paceline.cli import init as module
from paceline.cli import plain
from paceline.cli.main import app
from paceline.config.load import load_run_config
from paceline.roles import starter
from paceline.roles.machine import Machine

ROOT = Path(__file__).parents[3]
CONFIG = ["--target-config", str(ROOT / "tests" / "targets" / "qwen3-8b")]
Talk = Callable[[str], None]


@pytest.fixture(autouse=True)
def a_small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for no 8 B model: the plan that is shown says so."""
    for place in (starter, module):
        monkeypatch.setattr(place, "this_machine", lambda: Machine(2, 0, (), bfloat16=True))
    monkeypatch.setattr(plain.out, "_width", 80)
    monkeypatch.setattr(plain.err, "_width", 80)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(f'{{"prompt": "question {n}"}}\n' for n in range(100)))
    return path


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch) -> Talk:
    """What the user types at the terminal."""

    def typed(text: str) -> None:
        stdin = io.StringIO(text)
        monkeypatch.setattr(stdin, "isatty", lambda: True)
        monkeypatch.setattr(module, "sys", SimpleNamespace(stdin=stdin, stdout=stdin))

    return typed


def test_at_a_terminal_what_is_not_given_is_asked(
    tmp_path: Path, data: Path, talk: Talk, capsys: pytest.CaptureFixture[str]
) -> None:
    """Again, with advice, until the answer can be used; an empty answer is what stands in brackets."""
    output = tmp_path / "mine.yaml"
    talk(f"\nQwen/Qwen3-8B\nnowhere.jsonl\n{data}\n\neagle\ndflash\n-1\n2\nollama\nnone\n{output}\n")
    assert (app(["init", *CONFIG], standalone_mode=False) or 0) == 0
    text = capsys.readouterr().out
    for said in ("A target is needed", "There is no nowhere.jsonl", "did you mean", "no number of GPUs"):
        assert said in text
    assert "5 of 100 records set aside" in text
    config = load_run_config(output)
    assert (config.method.name, config.engine.name, config.training.device) == (
        "dflash",
        "transformers",
        "cuda:1",
    )
    assert config.evaluation.prompts == tmp_path / "mine.heldout.jsonl"


@pytest.mark.parametrize(("gpus", "engine"), [(1, "transformers"), (2, "vllm")])
def test_a_server_is_proposed_where_a_gpu_is_free_for_it(
    gpus: int, engine: str, tmp_path: Path, data: Path, talk: Talk
) -> None:
    """On one GPU a first run needs no other program."""
    output = tmp_path / "mine.yaml"
    talk(f"Qwen/Qwen3-8B\n{data}\n\n\n{gpus}\n\n{output}\n")
    assert (app(["init", *CONFIG], standalone_mode=False) or 0) == 0
    assert load_run_config(output).engine.name == engine


def test_the_end_of_the_answers_ends_the_questions(talk: Talk, tmp_path: Path) -> None:
    """As Ctrl-D does; nothing is written."""
    talk("Qwen/Qwen3-8B\n")
    assert app(["init", *CONFIG, "-o", str(tmp_path / "run.yaml")], standalone_mode=False) == 130
    assert list(tmp_path.iterdir()) == []


def test_elsewhere_what_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert app(["init", "--method", "eagle3"], standalone_mode=False) == 2
    error = capsys.readouterr().err
    assert "--target and --data must be given" in error
    assert "next  paceline init --target MODEL --data FILE -o run.yaml" in error


def test_what_does_not_fit_this_machine_is_told_at_once(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is written all the same, and the next commands are named."""
    monkeypatch.setattr(module, "cost_plan", _without_room(module.cost_plan))
    output = tmp_path / "run.yaml"
    options = ["--target", "Qwen/Qwen3-8B", "--data", str(data), "-o", str(output), *CONFIG]
    assert (app(["init", *options], standalone_mode=False) or 0) == 0
    text = capsys.readouterr().out
    assert "does not fit: This machine has 4.0 GiB of memory" in text
    assert text.splitlines()[-1].endswith(f"paceline train {output}")
    assert app(["init", *options], standalone_mode=False) == 2
    assert f"{output} exists" in capsys.readouterr().err


def _without_room(plan: Callable[..., object]) -> Callable[..., object]:
    from paceline.roles import cost_plan as planning

    def planned(*given: object, **options: object) -> object:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(planning, "this_machine", lambda: Machine(2, 4 << 30, (), bfloat16=True))
            return plan(*given, **options)

    return planned
