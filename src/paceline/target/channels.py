"""Answers in channels, as gpt-oss writes them (OpenAI's Harmony response format): thoughts, a final message.

Its template takes both in fields of their own, and drops the thoughts of every turn but the last.
"""

from __future__ import annotations

import re
from typing import Any

MARKS = frozenset({"<|start|>", "<|channel|>", "<|message|>", "<|end|>"})
_MESSAGE = re.compile(
    r"<\|channel\|>(?P<channel>\w+).*?<\|message\|>(?P<text>.*?)(?:<\|(?:end|return|call|start)\|>|\Z)",
    re.DOTALL,
)


def channel_message(text: str) -> dict[str, Any]:
    """The message of an answer's text, special tokens included. Raises ValueError without a final message."""
    parts = [(found["channel"], found["text"]) for found in _MESSAGE.finditer(text)]
    final = [part for channel, part in parts if channel == "final"]
    if not final:
        raise ValueError(
            "the target's answer has no final message: it calls a tool, or it was cut off at "
            "data.max_answer_tokens, and the chat cannot go on after it"
        )
    thoughts = "".join(part for channel, part in parts if channel == "analysis")
    return {"role": "assistant", "content": "".join(final), **({"thinking": thoughts} if thoughts else {})}
