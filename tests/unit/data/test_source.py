"""The order in which a run answers its prompts, and which of them are captured together."""

from __future__ import annotations

from typing import Any

import pytest

from paceline.data.source import PromptList, RunPrompts, group_of
from paceline.types import PromptTask


def texts(count: int) -> PromptList:
    return PromptList([f"question {n}" for n in range(count)])


def test_a_run_answers_the_set_as_often_as_it_has_rounds() -> None:
    """Round after round; a task is called by its round and its prompt."""
    run = RunPrompts(texts(3), rounds=2)
    prompts = run.read(0, 99)
    assert [p.prompt_id for p in prompts] == ["0/0", "0/1", "0/2", "1/0", "1/1", "1/2"]
    assert [p.round for p in prompts] == [0, 0, 0, 1, 1, 1]
    assert run.size == 6
    assert run.read(2, 2) == prompts[2:4]
    assert run.read(6, 2) == []


def test_what_is_added_comes_last_and_moves_nothing() -> None:
    """Every sample keeps its ordinal; the new prompts are answered as often as the old ones."""
    before, after = RunPrompts(texts(3), 2, [3]), RunPrompts(texts(5), 2, [3, 5])
    assert after.read(0, 6) == before.read(0, 6)
    assert [p.prompt_id for p in after.read(5, 9)] == ["1/2", "0/3", "0/4", "1/3", "1/4"]
    assert (after.size, list(after.starts)) == (10, [0, 6])


def test_a_group_is_a_slice_of_the_order_that_never_changes() -> None:
    """The last group before an extension stays as it was captured."""
    assert group_of(5, 4) == range(4, 8)
    assert group_of(5, 4, [0, 6]) == range(4, 6)
    assert group_of(6, 4, [0, 6]) == range(6, 8)
    assert group_of(9, 4, [0, 6]) == range(8, 12)
    assert group_of(2, 8, [0, 2, 3]) == range(2, 3)


@pytest.mark.parametrize(
    ("given", "prompt_id", "token_ids"),
    [
        ("text", "0", None),
        ({"prompt": "text"}, "0", None),
        ({"id": 7, "prompt": "text"}, "7", None),
        ({"task_id": "t", "payload": {"prompt_ids": [1, 2]}}, "t", (1, 2)),
        (PromptTask("t", "run", payload={"prompt": "text"}), "t", None),
    ],
)
def test_a_list_of_prompts_may_hold_several_kinds(
    given: Any, prompt_id: str, token_ids: tuple[int, ...] | None
) -> None:
    """Texts, mappings and tasks, of a user's own script."""
    [prompt] = PromptList([given]).read(0, 1)
    assert (prompt.prompt_id, prompt.token_ids, prompt.broken) == (prompt_id, token_ids, "")
    assert prompt.text == ("" if token_ids else "text")


@pytest.mark.parametrize("payload", [{}, {"prompt_ids": ["x"]}, {"prompt_ids": 3}])
def test_a_prompt_without_text_or_token_ids_says_so(payload: dict[str, Any]) -> None:
    """It fails alone, like a broken line of a file."""
    [prompt] = PromptList([payload]).read(0, 1)
    assert prompt.broken.startswith("it has neither text nor token ids")
