"""Sets prompts of a source aside, for a user whose data is one file: the draft is measured on them.

The source is read twice and copied as JSON lines, record by record, into two files. What shares a question
with a prompt that is set aside is in neither: a run refuses data that contains a held-out question.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from paceline.data.opening import open_records
from paceline.data.prompts import BrokenRecordError, Prompt, asked
from paceline.data.records import Record, Records, Source
from paceline.data.settings import SourceSection
from paceline.errors import ConfigError

ASIDE_MAX = 48  # prompts; evaluation.max_prompts by default
SHARE = 20  # one of so many
NEWLINES = b"\r\n"


@dataclass(frozen=True)
class SetAside:
    """Records in each file, and those that are in neither: `shared` have a held-out question, `broken` are no
    records."""

    training: int
    held_out: int
    shared: int
    broken: int


def set_aside(path: Path, training: Path, held_out: Path) -> SetAside:
    """Write both files, which must not exist. Raises ConfigError, also for too little data; OSError."""
    records = open_records(SourceSection(path=path))
    chosen = _chosen(records)
    counts = {"training": 0, "held_out": 0, "shared": 0, "broken": 0}
    with training.open("xb") as train, held_out.open("xb") as aside:
        for place, (record, prompt) in enumerate(_usable(records)):
            if place in chosen:
                counts["held_out"] += _copied(record, aside)
            elif any(key in chosen.questions for key, _ in asked(prompt)):
                counts["shared"] += 1
            else:
                counts["training"] += _copied(record, train)
    counts["broken"] = sum(1 for _ in records.read()) - sum(counts.values())
    if not counts["training"]:
        raise ConfigError(
            f"Every record of {path} asks one of the {counts['held_out']} questions that were set aside.",
            why="Nothing is left to train on.",
            next="give more data, or prompts of your own to measure on: --heldout FILE.",
        )
    return SetAside(**counts)


class _Chosen:
    """Places of usable records, and the keys of their last questions."""

    def __init__(self) -> None:
        self.places: set[int] = set()
        self.questions: set[str] = set()

    def __contains__(self, place: int) -> bool:
        return place in self.places


def _chosen(records: Records) -> _Chosen:
    """Records spread evenly over the source, no two with the same last question."""
    usable = sum(1 for _ in _usable(records))
    if usable < 2:
        raise ConfigError(
            f"{records.name} has {usable} usable record{'s' * (usable != 1)}.",
            why="A draft is trained on some prompts and measured on others.",
            next="give more data; `paceline data check FILE` shows what is found in it.",
        )
    count = max(1, min(ASIDE_MAX, usable // SHARE))
    step, chosen = usable // count, _Chosen()
    for place, (_, prompt) in enumerate(_usable(records)):
        last = asked(prompt)[-1][0]
        wanted = step // 2 + len(chosen.places) * step
        if place >= wanted and len(chosen.places) < count and last not in chosen.questions:
            chosen.places.add(place)
            chosen.questions.add(last)
    return chosen


def _usable(records: Records) -> Iterator[tuple[Record, Prompt]]:
    """The records with a prompt that is not broken and asks something."""
    for record, prompt in Source(records).read():
        if prompt is not None and not prompt.broken and asked(prompt):
            yield record, prompt


def _copied(record: Record, file: BinaryIO) -> int:
    content = record.content
    assert not isinstance(content, BrokenRecordError)
    if isinstance(content, bytes):
        line = content.strip()
        if any(newline in line for newline in NEWLINES):
            line = json.dumps(json.loads(line)).encode()
    else:
        line = json.dumps(content, default=str).encode()
    file.write(line + b"\n")
    return 1
