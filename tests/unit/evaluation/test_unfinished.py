"""A killed evaluation goes on: whole lines are used, torn ones and those of another evaluation are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from paceline.evaluation.acceptance import AnswerFigures, PromptFigures
from paceline.evaluation.heldout import Asked
from paceline.evaluation.unfinished import Unfinished

ASKED = [Asked(f"p{n}", (1, 2, n)) for n in range(3)]
FIGURES = [
    PromptFigures(f"p{n}", "", 3, AnswerFigures(4, 0.5), {"chain": AnswerFigures(4, 0.25, 2, (1, n))})
    for n in range(3)
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Two prompts measured, then killed."""
    file = tmp_path / "unfinished.jsonl"
    killed = Unfinished(file, {"step": 7})
    for asked, figures in zip(ASKED[:2], FIGURES[:2], strict=True):
        killed.add("suite 0", asked, figures)
    killed.close()
    return file


def test_what_was_measured_is_found_and_the_file_goes_when_all_is_done(path: Path) -> None:
    with Unfinished(path, {"step": 7}) as unfinished:
        assert [unfinished.find("suite 0", asked) for asked in ASKED] == [FIGURES[0], FIGURES[1], None]
        assert unfinished.find("suite 1", ASKED[0]) is None, "another temperature"
        assert unfinished.find("suite 0", Asked("p0", (9,))) is None, "another text under its id"
    assert not path.exists()


def test_a_torn_line_is_dropped_and_the_next_one_is_whole(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])
    unfinished = Unfinished(path, {"step": 7})
    assert unfinished.find("suite 0", ASKED[1]) is None
    unfinished.add("suite 0", ASKED[2], FIGURES[2])
    unfinished.close()
    with Unfinished(path, {"step": 7}) as again:
        assert [again.find("suite 0", asked) for asked in ASKED] == [FIGURES[0], None, FIGURES[2]]


def test_another_evaluation_finds_nothing(path: Path) -> None:
    with Unfinished(path, {"step": 8}) as other:
        assert other.find("suite 0", ASKED[0]) is None


def test_an_error_before_the_first_prompt_leaves_no_file(tmp_path: Path) -> None:
    file = tmp_path / "unfinished.jsonl"
    with pytest.raises(ZeroDivisionError), Unfinished(file, {"step": 7}):
        _ = 1 / 0
    assert not file.exists()


def test_an_error_leaves_the_file(path: Path) -> None:
    unfinished = Unfinished(path, {"step": 7})
    unfinished.add("suite 0", ASKED[2], FIGURES[2])
    with pytest.raises(ZeroDivisionError), unfinished:
        _ = 1 / 0
    with Unfinished(path, {"step": 7}) as again:
        assert again.find("suite 0", ASKED[2]) == FIGURES[2]
