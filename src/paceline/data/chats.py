"""Chats as people write them, OpenAI's messages, ShareGPT's turns and Alpaca's fields, read as one form.

Only the structure is checked here. Which order of roles makes sense is for the target's chat template to say.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from paceline.data.prompts import BrokenRecordError, Chat

ROLES = ("system", "developer", "user", "assistant", "tool")
SPEAKERS = {  # of ShareGPT and its descendants
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}


def openai(record: Mapping[str, Any]) -> Chat:
    """{"messages": [{"role", "content", ...}], "tools": [...]}. Raises BrokenRecordError."""
    messages = tuple(_message(given) for given in _turns(record, "messages"))
    return Chat(messages, _tools(record.get("tools")))


def sharegpt(record: Mapping[str, Any]) -> Chat:
    """{"conversations": [{"from", "value"}], "system": ..., "tools": ...}. Raises BrokenRecordError.

    A turn with "role" and "content" is read as one of OpenAI's.
    """
    key = "conversations" if "conversations" in record else "conversation"
    turns = tuple(_turn(given) for given in _turns(record, key))
    return Chat((*_system(record), *turns), _tools(record.get("tools")))


def alpaca(record: Mapping[str, Any]) -> Chat:
    """{"instruction", "input", "output", "system", "history"}; all but the first are optional.

    Raises BrokenRecordError. `history`: pairs of earlier instructions and outputs. Dolly's names for input
    and output are "context" and "response".
    """
    asked = _text(record, "instruction")
    if not asked.strip():
        raise BrokenRecordError('its "instruction" is empty')
    if more := (_text(record, "input") or _text(record, "context")).strip():
        asked = f"{asked}\n\n{more}"
    messages = [*_system(record)]
    for pair in record.get("history") or ():
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(t, str) for t in pair):
            raise BrokenRecordError('its "history" is not a list of pairs of texts')
        messages += [_said("user", pair[0]), _said("assistant", pair[1])]
    messages.append(_said("user", asked))
    if output := _text(record, "output") or _text(record, "response"):
        messages.append(_said("assistant", output))
    return Chat(tuple(messages))


def _said(role: str, content: str) -> Mapping[str, Any]:
    return {"role": role, "content": content}


def _text(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    if value is not None and not isinstance(value, str):
        raise BrokenRecordError(f'its "{key}" is not a text')
    return value or ""


def _system(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    text = _text(record, "system")
    return [_said("system", text)] if text else []


def _turns(record: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    turns = record.get(key)
    if not isinstance(turns, (list, tuple)) or not all(isinstance(turn, Mapping) for turn in turns):
        raise BrokenRecordError(f'its "{key}" is not a list of messages')
    if not turns:
        raise BrokenRecordError("its chat is empty")
    return list(turns)


def _message(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message as templates take it: texts joined, arguments of calls as objects, nothing that is null."""
    role = given.get("role")
    if role not in ROLES:
        raise BrokenRecordError("a message has an unknown role", f" ({role!r}); known: {', '.join(ROLES)}")
    if given.get("weight") not in (None, 0, 1):
        raise BrokenRecordError("the weight of a message is neither 0 nor 1", f" ({given['weight']!r})")
    message = {key: value for key, value in given.items() if value is not None}
    if calls := message.pop("tool_calls", None):
        message["tool_calls"] = _calls(calls)
    if "content" not in message:
        if not calls:
            raise BrokenRecordError("a message has no content and calls no tool")
        message["content"] = ""
    elif not isinstance(message["content"], str):
        message["content"] = _joined(message["content"])
    return message


def _joined(parts: object) -> str:
    if not isinstance(parts, (list, tuple)):
        raise BrokenRecordError("the content of a message is neither a text nor a list of parts")
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else "text" if isinstance(part, str) else None
        text = part.get("text") if isinstance(part, Mapping) else part
        if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
            raise BrokenRecordError("a message has a part that is not text", f" ({kind!r})")
        texts.append(text)
    return "".join(texts)


def _calls(calls: object) -> list[Mapping[str, Any]]:
    """Tool calls with their arguments as objects: templates write them out, and would quote a text twice."""
    if not isinstance(calls, (list, tuple)) or not all(isinstance(call, Mapping) for call in calls):
        raise BrokenRecordError('the "tool_calls" of a message are not a list of objects')
    found: list[Mapping[str, Any]] = []
    for call in calls:
        function = call.get("function")
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BrokenRecordError("a tool call names no function")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = _json(arguments, "the arguments of a tool call are not JSON")
        kept = {key: value for key, value in call.items() if value is not None}
        called = {key: value for key, value in function.items() if value is not None}
        found.append({**kept, "function": {**called, "arguments": {} if arguments is None else arguments}})
    return found


def _turn(given: Mapping[str, Any]) -> Mapping[str, Any]:
    if "from" not in given:
        return _message(given)
    speaker, value = given["from"], given.get("value")
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise BrokenRecordError("a turn has an unknown speaker", f" ({speaker!r})")
    if not isinstance(value, str):
        raise BrokenRecordError('the "value" of a turn is not a text')
    if speaker == "function_call":
        call = _json(value, "a function call is not JSON")
        called = call if isinstance(call, list) else [call]
        calls = [{"type": "function", "function": function} for function in called]
        return _message({"role": "assistant", "content": "", "tool_calls": calls})
    return _said(SPEAKERS[speaker], value)


def _tools(given: object) -> tuple[Mapping[str, Any], ...]:
    if isinstance(given, str) and given.strip():
        given = _json(given, 'its "tools" are not JSON')
    tools = given or ()
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BrokenRecordError('its "tools" are not a list of objects')
    return tuple(tools)


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BrokenRecordError(what, f" ({error})") from error
