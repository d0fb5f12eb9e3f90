"""Every format of a record becomes the same few things: a text, a chat, or token ids with spans."""

from __future__ import annotations

import json
from typing import Any

import pytest

from paceline.data.formats import parse_record
from paceline.data.prompts import BrokenRecordError, Chat
from paceline.data.tables import without_nulls

ASKED, ANSWERED = {"role": "user", "content": "two and two?"}, {"role": "assistant", "content": "four"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def chat_of(record: dict[str, Any]) -> Chat:
    chat = parse_record(record).chat
    assert chat is not None
    return chat


def test_openai_messages_are_taken_as_they_are() -> None:
    """With a system turn and tools."""
    messages = [{"role": "system", "content": "be brief"}, ASKED, ANSWERED]
    prompt = parse_record({"id": 7, "messages": messages, "tools": [TOOL]})
    assert prompt.chat == Chat(tuple(messages), (TOOL,))
    assert (prompt.prompt_id, prompt.kind, prompt.text) == ("7", "messages", "")


def test_content_in_parts_is_joined() -> None:
    """Only texts can be."""
    parts = [{"type": "text", "text": "two and "}, {"type": "text", "text": "two?"}]
    assert chat_of({"messages": [{"role": "user", "content": parts}]}) == Chat((ASKED,))
    with pytest.raises(BrokenRecordError, match="a part that is not text"):
        parse_record({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]})


def test_a_message_that_only_calls_tools_has_an_empty_content() -> None:
    """And the arguments of the call are an object, as templates take them."""
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    [_, calling, answer] = chat_of(
        {
            "messages": [
                ASKED,
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "c1", "content": "4"},
            ]
        }
    ).messages
    assert calling["content"] == ""
    assert calling["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 2}}
    assert answer["tool_call_id"] == "c1"


def test_the_turns_of_sharegpt_are_messages() -> None:
    """Speakers become roles; a system prompt and tools may stand beside the turns."""
    turns = [
        {"from": "human", "value": "two and two?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
        {"from": "observation", "value": "4"},
        {"from": "gpt", "value": "four"},
    ]
    chat = chat_of({"conversations": turns, "system": "be brief", "tools": json.dumps([TOOL])})
    assert [message["role"] for message in chat.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert chat.messages[2]["tool_calls"][0]["function"]["name"] == "add"
    assert chat.messages[4] == ANSWERED
    assert chat.tools == (TOOL,)


def test_a_conversation_may_have_roles_instead_of_speakers() -> None:
    """As some collections have it."""
    assert chat_of({"conversation": [ASKED, ANSWERED]}) == Chat((ASKED, ANSWERED))


def test_the_fields_of_alpaca_are_a_chat() -> None:
    """The input follows the instruction; without an output the chat ends with the question."""
    assert chat_of({"instruction": "Add.", "input": "2, 2", "output": "4"}) == Chat(
        ({"role": "user", "content": "Add.\n\n2, 2"}, {"role": "assistant", "content": "4"})
    )
    record = {
        "instruction": "And?",
        "input": "",
        "output": "",
        "system": "be brief",
        "history": [["Hi", "Ho"]],
    }
    dolly = {"instruction": "Add.", "context": "2, 2", "response": "4", "category": "sums"}
    assert chat_of(dolly) == chat_of({"instruction": "Add.", "input": "2, 2", "output": "4"})
    said = [(message["role"], message["content"]) for message in chat_of(record).messages]
    assert said == [("system", "be brief"), ("user", "Hi"), ("assistant", "Ho"), ("user", "And?")]


@pytest.mark.parametrize(
    ("marks", "spans"),
    [
        ({}, ()),
        ({"loss_mask": [0, 1, 1, 0, 1]}, ((1, 3), (4, 5))),
        ({"assistant_masks": [False, True, True, False, True]}, ((1, 3), (4, 5))),
        ({"labels": [-100, 6, 7, -100, 9]}, ((1, 3), (4, 5))),
        ({"spans": [[1, 3], [4, 5]]}, ((1, 3), (4, 5))),
    ],
)
@pytest.mark.parametrize("key", ["prompt_ids", "token_ids", "input_ids"])
def test_token_ids_may_come_with_a_mask_or_spans_of_the_answers(
    key: str, marks: dict[str, Any], spans: tuple[tuple[int, int], ...]
) -> None:
    """Under each of the names that people use."""
    prompt = parse_record({key: [5, 6, 7, 8, 9], **marks})
    assert (prompt.token_ids, prompt.spans, prompt.kind) == ((5, 6, 7, 8, 9), spans, "tokens")


def test_a_record_of_several_formats_is_taken_for_the_one_that_says_most() -> None:
    """Ids before chats, chats before a text; and a file may mix formats."""
    record: dict[str, Any] = {"prompt": "p"}
    for key, value, kind in (
        ("instruction", "i", "alpaca"),
        ("conversations", [ASKED], "sharegpt"),
        ("messages", [ASKED], "messages"),
        ("input_ids", [1], "tokens"),
    ):
        record[key] = value
        assert parse_record(record).kind == kind
    assert parse_record(record, "prompts").text == "p"
    assert parse_record({"messages": None, "prompt": "p"}).kind == "prompts"


def test_the_id_of_a_record_without_one_is_a_digest_of_it() -> None:
    """The same for the same content, whatever its format."""
    one = parse_record({"messages": [ASKED, ANSWERED]})
    other = parse_record({"instruction": "two and two?", "output": "four"})
    assert one.prompt_id == other.prompt_id
    assert one.prompt_id != parse_record({"messages": [ASKED]}).prompt_id


def test_any_number_can_be_an_id() -> None:
    """Also one that no float holds; one that is none is refused."""
    assert parse_record({"id": 10**400, "prompt": "p"}).prompt_id == str(10**400)
    with pytest.raises(BrokenRecordError, match="neither a string nor a number"):
        parse_record({"id": float("inf"), "prompt": "p"})


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "x"}, "its format is unknown"),
        ({"messages": []}, "its chat is empty"),
        ({"messages": "hi"}, 'its "messages" is not a list of messages'),
        ({"messages": [{"role": "wizard", "content": "x"}]}, r"unknown role \('wizard'\)"),
        ({"messages": [{"role": "user"}]}, "no content and calls no tool"),
        ({"messages": [{"role": "user", "content": 3}]}, "neither a text nor a list of parts"),
        ({"messages": [ASKED], "tools": "[1"}, 'its "tools" are not JSON'),
        ({"messages": [ASKED], "tools": [1]}, 'its "tools" are not a list of objects'),
        ({"messages": [{**ANSWERED, "tool_calls": [{}]}]}, "names no function"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "cannot be encoded"),
        ({"messages": [{**ASKED, "when": object()}]}, "holds what JSON cannot"),
        ({"conversations": [{"from": "x", "value": "y"}]}, "unknown speaker"),
        ({"conversations": [{"from": ["gpt"], "value": "y"}]}, "unknown speaker"),
        ({"messages": [ASKED, {**ANSWERED, "weight": 0.5}]}, "neither 0 nor 1"),
        ({"conversations": [{"from": "gpt", "value": None}]}, "is not a text"),
        ({"conversations": [{"from": "function_call", "value": "add"}]}, "a function call is not JSON"),
        ({"instruction": " "}, 'its "instruction" is empty'),
        ({"instruction": "x", "output": 4}, 'its "output" is not a text'),
        ({"instruction": "x", "history": ["a"]}, "pairs of texts"),
        ({"input_ids": []}, "are empty"),
        ({"input_ids": [1, -1]}, "not all at least 0"),
        ({"input_ids": [1.5]}, "is not a list of integers"),
        ({"input_ids": [1, 2], "loss_mask": [1]}, r"not as long as its ids \(1, not 2\)"),
        ({"input_ids": [1, 2], "loss_mask": [1, 2]}, "other values than 0 and 1"),
        ({"input_ids": [1, 2], "labels": [1, 3]}, "neither -100 nor the ids"),
        ({"input_ids": [1, 2], "labels": [1, 2], "spans": []}, "marked twice"),
        ({"input_ids": [1, 2], "spans": [[1, 3]]}, "in rising order"),
        ({"input_ids": [1, 2], "spans": [[1, 1]]}, "in rising order"),
        ({"input_ids": [1, 2], "spans": 3}, "in rising order"),
    ],
)
def test_a_record_that_cannot_be_used_says_why(record: dict[str, Any], reason: str) -> None:
    """In words that name the key."""
    with pytest.raises(BrokenRecordError, match=reason):
        parse_record(record)


def test_null_cells_of_a_table_are_nothing() -> None:
    """A table has a cell for every key that any row has."""
    row = {"messages": [{**ASKED, "tool_calls": None}], "tools": None, "id": None}
    assert without_nulls(row) == {"messages": [ASKED]}
