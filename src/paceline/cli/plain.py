"""Text from outside (a reason, a path, an id), shown as it is.

The console would take `[/INST]` for markup of its own and stop, and `:a:` for an emoji.
"""

from __future__ import annotations

from rich.console import Console
from rich.text import Text


def plain(text: str, style: str = "") -> Text:
    """For a table's cell, or a part of a line. What no terminal can write (half a surrogate) is escaped."""
    return Text(text.encode(errors="backslashreplace").decode(), style)


def say(console: Console, text: str) -> None:
    """Print it as one paragraph, however long its lines are."""
    console.print(plain(text), soft_wrap=True)
