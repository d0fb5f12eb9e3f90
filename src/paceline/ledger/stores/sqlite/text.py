"""Lists of ids as one parameter of a statement."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

AMONG = "IN (SELECT value FROM json_each(?))"


def json_list(values: Iterable[Any]) -> str:
    """A JSON list of ids or numbers. Raises TypeError for any other object."""
    return msgspec.json.encode(list(values), enc_hook=_plain_text).decode()


def _plain_text(value: Any) -> str:
    """The text of a subclass of str, such as numpy's."""
    if isinstance(value, str):
        return str.__str__(value)
    raise TypeError(f"a {type(value).__name__} is not an id")
