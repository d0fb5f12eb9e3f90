"""Prompt lookup guesses what followed the longest earlier occurrence, and nothing where there is none."""

from __future__ import annotations

import torch

from paceline.evaluation.lookup import LookupDrafter


def guesses(text: list[int], count: int = 3) -> list[int]:
    drafter = LookupDrafter(100)
    drafter.start(64)
    chain, distributions = drafter.propose(torch.zeros(0), torch.tensor(text), count, _never)
    assert distributions == [None] * len(chain)
    return chain


def _never(logits: torch.Tensor) -> tuple[int, None]:
    raise AssertionError("it has nothing to choose from")


def test_the_longest_earlier_occurrence_is_continued() -> None:
    """[1, 2] occurred before 7; 2 alone, later, before 8."""
    assert guesses([1, 2, 7, 5, 2, 8, 1, 2]) == [7, 5, 2]


def test_among_equally_long_ones_the_latest_is_continued() -> None:
    assert guesses([4, 9, 1, 4, 8, 2, 4]) == [8, 2, 4]


def test_a_new_token_gives_no_guess() -> None:
    """The cycle is then a plain step of the target."""
    assert guesses([1, 2, 3, 4]) == []


def test_a_repetition_goes_on_beyond_the_text() -> None:
    assert guesses([5, 6, 5, 6, 5], count=4) == [6, 5, 6, 5]
    assert guesses([3, 3, 3], count=2) == [3, 3]


def test_a_text_that_grows_is_looked_up_as_a_whole_and_a_new_one_begins_empty() -> None:
    drafter = LookupDrafter(100)
    drafter.start(64)
    assert drafter.propose(torch.zeros(0), torch.tensor([1, 2, 3]), 2, _never)[0] == []
    assert drafter.propose(torch.zeros(0), torch.tensor([9, 1]), 2, _never)[0] == [2, 3]
    drafter.start(64)
    assert drafter.propose(torch.zeros(0), torch.tensor([1]), 2, _never)[0] == []
