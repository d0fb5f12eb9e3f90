"""Sets a part of a report as Markdown in which foreign text is no markup."""

from __future__ import annotations

import re

from paceline.run_report.tables import Part
from paceline.terminal import printable


def as_markdown(part: Part) -> list[str]:
    """Its lines."""
    lines = [f"## {part.title}", ""]
    for words in part.told:
        lines += [f"**{_plain(words)}**" if part.is_bad else _plain(words), ""]
    if part.rows:
        rows = (part.heads, ["---"] * len(part.heads), *part.rows)
        lines += [*(f"| {' | '.join(map(_plain, row))} |" for row in rows), ""]
    return lines


def _plain(text: str) -> str:
    """One line; brackets stay as they are where no link can begin."""
    shown = " ".join(printable(text).split())
    return re.sub(r"([\\`*_<>|]|\[(?![\d.-]+, [\d.-]+\](?:$|[^(\[:])))", r"\\\1", shown)
