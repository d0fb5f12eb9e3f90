"""Survey: what a source holds, counted in one look through all its records. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from paceline.data.dataset import Dataset
from paceline.data.formats import CHATS
from paceline.data.prompts import Prompt
from paceline.target.chat import is_answer

PLACES_NAMED = 3


@dataclass
class Faults:
    """Broken records of one kind: how many, and the first of them."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, broken: str) -> None:
        self.count += 1
        if len(self.first) < PLACES_NAMED:
            self.first.append(broken)


@dataclass
class Survey:
    """`kinds`: prompts of each format. `turns`: messages of each role. `answered`: prompts with answers.

    `faults`: the broken records by what is wrong with them. `repeated`: records that are left out.
    """

    described: str
    num_prompts: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    turns: Counter[str] = field(default_factory=Counter)
    answered: int = 0
    with_tools: int = 0
    repeated: int = 0
    first_repeated: tuple[str, ...] = ()
    faults: dict[str, Faults] = field(default_factory=dict)

    @property
    def usable(self) -> int:
        return sum(self.kinds.values())

    def add(self, prompts: Iterable[Prompt]) -> None:
        for prompt in prompts:
            self.num_prompts += 1
            if prompt.broken:
                self.faults.setdefault(prompt.fault, Faults()).add(prompt.broken)
                continue
            self.kinds[prompt.kind] += 1
            self.answered += has_answer(prompt)
            if prompt.chat is not None:
                self.turns.update(str(message["role"]) for message in prompt.chat.messages)
                self.with_tools += bool(prompt.chat.tools)


def has_answer(prompt: Prompt) -> bool:
    """Whether the prompt's record holds an answer."""
    if prompt.kind in CHATS and prompt.chat is not None:
        return any(map(is_answer, prompt.chat.messages))
    return bool(prompt.spans)


def survey(dataset: Dataset, at_once: int = 256) -> Survey:
    """Raises ConfigError if the source changes meanwhile."""
    found = Survey(
        dataset.records.described,
        repeated=dataset.index.repeated,
        first_repeated=dataset.index.first_repeated,
    )
    for first in range(0, dataset.size, at_once):
        found.add(dataset.read(first, at_once))
    return found
