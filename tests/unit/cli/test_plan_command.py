"""`paceline plan` as a person and as a program read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paceline.cli import plain
from paceline.cli.main import app
from paceline.testing.tiny_run import TinyRun

TARGETS = Path(__file__).parents[2] / "targets"
ANOTHER = ["--gpu", "H200", "--target-config", str(TARGETS / "qwen3-8b")]


@pytest.fixture
def run(tmp_path: Path) -> TinyRun:
    engine = {"name": "vllm", "managed": True, "devices": [0]}
    target = {"model": "Qwen/Qwen3-8B", "dtype": "bfloat16"}
    training = {"device": "cuda:1", "passes": 2}
    features = {"budget_mib": 4096}
    return TinyRun(
        tmp_path, Path("model"), engine=engine, target=target, training=training, features=features
    )


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain.out, "_width", 80)
    monkeypatch.setattr(plain.err, "_width", 80)


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = app(["plan", *arguments], standalone_mode=False) or 0
    return code, *capsys.readouterr()


def test_a_person_reads_it_in_eighty_columns(run: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    """What each part of a run takes, and what is next."""
    code, text, _ = told(capsys, str(run.run_file), *ANOTHER)
    assert code == 0
    lines = text.splitlines()
    assert max(map(len, lines[:-1])) <= 80  # the last one is a command to copy
    assert not any(line.endswith(" ") for line in lines)
    for part in ("run", "target", "draft", "process", "sample", "features", "disk", "time"):
        assert any(line.startswith(f"{part:<10}") for line in lines), part
    assert "36 layers of 4096, about 8.19 B parameters" in text
    assert "vllm server on cuda:0, 15.3 GiB" in text
    assert lines[-1] == f"It fits. Next: paceline train {run.run_file}"


def test_a_program_reads_it_as_json(run: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    """The same figures in bytes and seconds, ASCII whatever the names are; the exit code says whether it
    fits."""
    run.config["run"]["directory"] = str(run.folder / "zug\u202e\x9bß")
    run.config["features"]["budget_mib"] = 2
    run.write()
    code, text, _ = told(capsys, str(run.run_file), *ANOTHER, "--json")
    assert code == 2
    assert text.isascii()
    found: dict[str, Any] = json.loads(text)
    assert found["version"] == 1
    assert found["run"]["directory"].endswith("ß")
    assert found["window"]["budget_bytes"] == 2 << 20
    assert found["window"]["needed_bytes"] > 2 << 20
    assert [finding["refuses"] for finding in found["findings"]].count(True) == 1


def test_states_in_float8_are_told_and_take_about_half(
    run: TinyRun, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each of the three states of a token by half; tokens and the target's last state stay."""

    def planned() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(told(capsys, str(run.run_file), *ANOTHER, "--json")[1])["sample"]
        return found

    exact = planned()
    assert exact["narrowed"] == []
    run.config["method"]["transfer"] = "float8"
    run.write()
    narrow = planned()
    assert narrow["narrowed"] == ["aux_hidden_states"]
    assert 0.5 < narrow["bytes_about"] / exact["bytes_about"] < 0.67
    assert 0.5 < narrow["bytes_max"] / exact["bytes_max"] < 0.67
    _, text, _ = told(capsys, str(run.run_file), *ANOTHER)
    assert "aux_hidden_states in float8, with a scale for each token and layer" in text


def test_what_does_not_fit_comes_with_what_to_change(
    run: TinyRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run.config["features"]["budget_mib"] = 2
    run.write()
    code, text, _ = told(capsys, str(run.run_file), *ANOTHER)
    assert code == 2
    assert "does not fit: features.budget_mib gives 2 MiB" in text
    assert "\n  Set features.budget_mib to " in text
    assert f"1 thing must change before paceline train {run.run_file}" in text


@pytest.mark.parametrize(
    "content", [None, b"", b"\xff\xfe", b"[" * 100_000, b"run: {name: x}\n", b"a: &a [*a]\n", b"run: \x1b[2J"]
)
def test_a_file_that_is_no_run_file_is_an_error_with_advice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_bytes(content)
    code, text, error = told(capsys, str(path))
    assert (code, text) == (2, "")
    assert error.startswith("error ")
    assert "\nnext  " in error
    assert "Traceback" not in error
    assert "\x1b" not in error


@pytest.mark.parametrize("config", ["", "{", "[]", '{"model_type": "llama", "hidden_size": 1e999}', "\x00"])
def test_a_target_that_is_none_is_an_error_with_advice(
    run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], config: str
) -> None:
    folder = tmp_path / "target"
    folder.mkdir()
    (folder / "config.json").write_text(config)
    (folder / "tokenizer.json").write_text("{")
    code, _, error = told(capsys, str(run.run_file), "--gpu", "H200", "--target-config", str(folder))
    assert code == 2
    assert error.startswith("error ")
    assert "Traceback" not in error
