"""Answers are on the disk before their samples are committed, and stay what they were first."""

from __future__ import annotations

from pathlib import Path

import pytest

from paceline.capture.answers import ORDINALS_PER_FILE, Answer, AnswerFiles
from paceline.errors import StoreError

ONE, TWO = Answer(3, 2, (5, 6, 7, 8)), Answer(ORDINALS_PER_FILE, 1, (9, 2**31 - 1))


def test_what_is_kept_is_there_for_every_later_process(tmp_path: Path) -> None:
    """By ordinal, whichever file it is in."""
    AnswerFiles(tmp_path / "answers").keep([ONE, TWO])
    later = AnswerFiles(tmp_path / "answers")
    assert [later.get(n) for n in (3, ORDINALS_PER_FILE, 4)] == [ONE, TWO, None]


def test_the_first_answer_counts(tmp_path: Path) -> None:
    """Another one for the same prompt changes nothing."""
    for tokens in ((5, 6, 7, 8), (5, 6, 1)):
        AnswerFiles(tmp_path).keep([Answer(3, 2, tokens)])
    assert AnswerFiles(tmp_path).get(3) == ONE


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_record_that_a_crash_tore_is_cut_off(tmp_path: Path, cut: int) -> None:
    """It was never answered for; what stands before it, and what is written after it, is whole."""
    AnswerFiles(tmp_path).keep([ONE, Answer(4, 1, (1, 2))])
    [path] = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: max(len(whole) - cut, 40)])
    files = AnswerFiles(tmp_path)
    assert files.get(3) == ONE
    assert files.get(4) is None
    files.keep([Answer(5, 1, (1, 3))])
    later = AnswerFiles(tmp_path)
    assert [later.get(n) for n in (3, 4, 5)] == [ONE, None, Answer(5, 1, (1, 3))]


def test_a_flipped_bit_is_not_taken_for_an_answer(tmp_path: Path) -> None:
    """A record counts with its digest only."""
    AnswerFiles(tmp_path).keep([ONE, Answer(4, 1, (1, 2))])
    [path] = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)
    assert AnswerFiles(tmp_path).get(3) is None
    assert AnswerFiles(tmp_path).get(4) == Answer(4, 1, (1, 2))


def test_a_disk_that_fails_stops_the_producer_before_the_commit(tmp_path: Path) -> None:
    """With advice."""
    (tmp_path / "answers").write_text("in the way")
    with pytest.raises(StoreError, match="check that disk"):
        AnswerFiles(tmp_path / "answers").keep([ONE])
