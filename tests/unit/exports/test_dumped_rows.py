"""Where the target cannot be run, the self-check of an export has random rows, and the export goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from exports_case import Case

from paceline.config.load import parse_run_config
from paceline.config.run import RunConfig
from paceline.errors import EngineError
from paceline.roles import dumped_rows
from paceline.target.head import TargetHead


class Drafter:
    """Guesses the same token for ever."""

    layers = (2, 4, 5)

    def start(self, _: int) -> None:
        pass

    def propose(self, *given: Any) -> tuple[list[int], None]:
        count, choose = given[-2:]
        return [choose(torch.zeros(4))[0] for _ in range(count)], None


def config_of(model: Path, folder: Path) -> RunConfig:
    values = {
        "run": {"name": "dumped", "directory": str(folder / "run")},
        "target": {"model": str(model), "template": {"enable_thinking": False}},
        "prompts": {"path": str(folder / "train.jsonl")},
        "evaluation": {"prompts": str(folder / "heldout.jsonl"), "device": "cpu"},
    }
    return parse_run_config(values, source="test")


def engine_that_raises(error: Exception) -> tuple[Any, dict[str, Any]]:
    """And what it was built with."""
    given: dict[str, Any] = {}

    def build(_: Path, **values: Any) -> None:
        given.update(values)
        raise error

    return build, given


def dumped(case: Case, folder: Path) -> str:
    head = TargetHead.load(case.folder)
    replays, told = dumped_rows.dump(config_of(case.folder, folder), head, Drafter(), None)  # type: ignore[arg-type]
    assert replays
    return told


@pytest.mark.parametrize(
    "error",
    [
        EngineError("of a family that is not captured"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_a_target_that_cannot_be_run_gives_random_rows(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """It is tried on the evaluation's device, with the template's variables of the run."""
    build, given = engine_that_raises(error)
    monkeypatch.setattr(dumped_rows, "TransformersEngine", build)
    assert dumped(case, tmp_path) == "rows of random states"
    assert given["device"] == "cpu"
    assert given["template"] == {"enable_thinking": False}


def test_a_target_that_does_not_fit_is_not_loaded(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel would kill the exporter."""
    build, given = engine_that_raises(EngineError("loaded"))
    monkeypatch.setattr(dumped_rows, "TransformersEngine", build)
    monkeypatch.setattr(dumped_rows, "why_no_reference", lambda _: "its 90000 MiB do not fit")
    assert dumped(case, tmp_path) == "rows of random states"
    assert not given


def test_another_error_ends_the_export(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no reason to check less."""
    monkeypatch.setattr(dumped_rows, "TransformersEngine", engine_that_raises(RuntimeError("a mistake"))[0])
    with pytest.raises(RuntimeError, match="a mistake"):
        dumped(case, tmp_path)
