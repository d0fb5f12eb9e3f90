"""Sources of prompts, which the producer reads by ordinal and only as far as it needs.

A source knows its size (None: it has no end yet) and a digest of every block of prompts, by which a later
start recognises it. `RunPrompts` is the order in which a run answers a source: everything about a sample
follows from its ordinal in that order.
"""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

from paceline.data.prompts import Chat, Prompt, content_of
from paceline.ledger.records import SourceBlock
from paceline.types import PromptTask

BLOCK = 1024  # prompts under one digest
Stretch = (
    int | Sequence[int]
)  # how much a source has, as a run records it: of a mixture, the size of each part


class PromptSource(Protocol):
    """Adapters: Dataset (dataset.py), Mixture (mixture.py), PromptList, Beginning and RunPrompts (here)."""

    @property
    def size(self) -> int | None:
        """How many prompts there are; None if the source has no end."""

    @property
    def starts(self) -> Sequence[int]:
        """The ordinals at which prompts were added to a run that had ended; 0 among them."""

    @property
    def longest(self) -> Sequence[int]:
        """Ordinals of the prompts with the longest texts, longest first; a limited number of them."""

    @property
    def has_chats(self) -> bool:
        """Whether a prompt may be a chat of several answers."""

    def read(self, first: int, count: int) -> list[Prompt]:
        """`count` prompts from ordinal `first` on; fewer only at the end."""

    def blocks(self, bounds: Sequence[int] = ()) -> list[SourceBlock]:
        """All prompts as blocks with digests. Blocks end at each of `bounds`, and may end in between."""


def digest_of(prompts: Iterable[Prompt]) -> str:
    """Digest of these prompts in this order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps([prompt.prompt_id, *content_of(prompt)]).encode() + b"\n")
    return digest.hexdigest()[:16]


@runtime_checkable
class HasDigests(Protocol):
    """A source that knows the digests of its blocks without a read."""

    def digests(self, count: int) -> list[str]: ...


@runtime_checkable
class HasLengths(Protocol):
    """A source of kept answers that knows the tokens of each without a read; () if only a read can tell."""

    @property
    def lengths(self) -> Sequence[int]: ...


def blocks_between(bounds: Iterable[int], size: int, digest: Callable[[int, int], str]) -> list[SourceBlock]:
    """Blocks that end at each of the bounds, and at the end of the source."""
    ends = sorted({*(bound for bound in bounds if 0 < bound < size), size})
    return [SourceBlock(a, b - a, digest(a, b - a)) for a, b in pairwise([0, *ends]) if b > a]


class PromptList:
    """Prompts in memory (texts, mappings or tasks), for a user's own script.

    A payload carries "prompt_ids" (token ids, with "spans" that are answers), "messages" (a chat, with
    "tools") or "prompt" (text). A mapping may name `task_id` or `id`; without one, a prompt's id is its place
    in the list.
    """

    def __init__(self, prompts: Sequence[PromptTask | Mapping[str, Any] | str]) -> None:
        self._prompts = prompts
        self.starts: Sequence[int] = (0,)

    @property
    def size(self) -> int:
        return len(self._prompts)

    @property
    def longest(self) -> Sequence[int]:
        return range(self.size)

    @property
    def has_chats(self) -> bool:
        return any("messages" in _payload(given) for given in self._prompts)

    def read(self, first: int, count: int) -> list[Prompt]:
        places = range(first, min(first + count, len(self._prompts)))
        return [_as_prompt(self._prompts[place], place) for place in places]

    def blocks(self, bounds: Sequence[int] = ()) -> list[SourceBlock]:
        return blocks_between([*bounds], self.size, lambda first, count: digest_of(self.read(first, count)))


def _as_prompt(given: PromptTask | Mapping[str, Any] | str, place: int) -> Prompt:
    if isinstance(given, str):
        return Prompt(str(place), given)
    payload = _payload(given)
    prompt_id = str(
        given.task_id if isinstance(given, PromptTask) else given.get("task_id", given.get("id", place))
    )
    try:
        if (ids := payload.get("prompt_ids")) is not None:
            spans = tuple((int(start), int(stop)) for start, stop in payload.get("spans", ()))
            return Prompt(prompt_id, token_ids=tuple(int(token) for token in ids), spans=spans)
        if (messages := payload.get("messages")) is not None:
            return Prompt(prompt_id, chat=Chat(tuple(messages), tuple(payload.get("tools") or ())))
        return Prompt(prompt_id, str(payload["prompt"]))
    except (LookupError, TypeError, ValueError) as error:
        return Prompt(prompt_id, broken=f"it has neither text nor token ids: {type(error).__name__}: {error}")


def _payload(given: PromptTask | Mapping[str, Any] | str) -> Mapping[str, Any]:
    if isinstance(given, str):
        return {"prompt": given}
    payload: Mapping[str, Any] = (
        given.payload if isinstance(given, PromptTask) else given.get("payload", given)
    )
    return payload


class Beginning:
    """The first `size` prompts of a source that has at least so many, as a source of their own."""

    starts: Sequence[int] = (0,)

    def __init__(self, prompts: PromptSource, size: int) -> None:
        self._prompts, self._size = prompts, size

    @property
    def size(self) -> int:
        return self._size

    @property
    def longest(self) -> Sequence[int]:
        return [ordinal for ordinal in self._prompts.longest if ordinal < self._size]

    @property
    def has_chats(self) -> bool:
        return self._prompts.has_chats

    def read(self, first: int, count: int) -> list[Prompt]:
        return self._prompts.read(first, max(0, min(count, self._size - first)))

    def blocks(self, bounds: Sequence[int] = ()) -> list[SourceBlock]:
        return blocks_between(bounds, self._size, lambda first, count: digest_of(self.read(first, count)))


class RunPrompts:
    """The order of a run: all prompts `rounds` times, then prompts added later, also `rounds` times.

    `stretches` are the sizes that the prompt set had at the run's first start and after each extension. A
    sample never changes its ordinal, so added prompts come last.
    """

    def __init__(self, prompts: PromptSource, rounds: int = 1, stretches: Sequence[int] = ()) -> None:
        """A source without an end is answered once."""
        self._prompts = prompts
        self._rounds = rounds
        sizes = list(stretches) or ([prompts.size] if prompts.size is not None else [])
        self._places = [0, *sizes]  # in the set, where each stretch begins
        self._ends = [place * rounds for place in self._places]  # the same as ordinals

    @property
    def size(self) -> int | None:
        return None if self._prompts.size is None else self._ends[-1]

    @property
    def starts(self) -> Sequence[int]:
        return self._ends[:-1] or [0]

    @property
    def has_chats(self) -> bool:
        return self._prompts.has_chats

    @property
    def longest(self) -> Sequence[int]:
        """The longest prompts of the run's first start, in their first round."""
        return [ordinal for ordinal in self._prompts.longest if ordinal < self._first_stretch]

    @property
    def lengths(self) -> Sequence[int]:
        """The tokens of every prompt of the run's first start, if the set knows them."""
        return self._prompts.lengths[: self._first_stretch] if isinstance(self._prompts, HasLengths) else ()

    @property
    def _first_stretch(self) -> int:
        return self._places[1] if len(self._places) > 1 else 0

    def read(self, first: int, count: int) -> list[Prompt]:
        if self._prompts.size is None:
            return self._prompts.read(first, count)
        found: list[Prompt] = []
        end = min(first + count, self._ends[-1])
        while (ordinal := first + len(found)) < end:
            stretch = bisect.bisect_right(self._ends, ordinal) - 1
            place, length = self._places[stretch], self._places[stretch + 1] - self._places[stretch]
            number, offset = divmod(ordinal - self._ends[stretch], length)
            wanted = min(end - ordinal, length - offset)
            part = self._prompts.read(place + offset, wanted)
            assert len(part) == wanted, "the source is as long as it says"
            found += [replace(p, prompt_id=f"{number}/{p.prompt_id}", round=number + p.round) for p in part]
        return found

    def blocks(self, bounds: Sequence[int] = ()) -> list[SourceBlock]:  # noqa: ARG002 (they are among its own)
        """One block per round of each stretch, with the digest of the set at that time; reads no prompt."""
        found = []
        for stretch, (place, end) in enumerate(pairwise(self._places)):
            digest = hashlib.sha256("".join(self._set_digests(end)).encode()).hexdigest()[:16]
            for number in range(self._rounds):
                first = self._ends[stretch] + number * (end - place)
                found.append(SourceBlock(first, end - place, f"{digest}.{number}"))
        return found

    def _set_digests(self, size: int) -> list[str]:
        """Digests of the set's first `size` prompts."""
        if isinstance(self._prompts, HasDigests):
            return self._prompts.digests(size)
        return [digest_of(self._prompts.read(0, size))]


def group_of(ordinal: int, group_size: int, starts: Sequence[int] = (0,)) -> range:
    """The ordinals that are captured together with this one: a fixed slice of the run's order.

    `starts`: see `PromptSource`; prompts added later must not change the groups of earlier ones.
    """
    first = ordinal - ordinal % group_size
    inside = [start for start in starts if first < start < first + group_size]
    before = [start for start in inside if start <= ordinal]
    after = [start for start in inside if start > ordinal]
    return range(max([first, *before]), min([first + group_size, *after]))
