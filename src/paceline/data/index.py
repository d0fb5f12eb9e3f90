"""The index of a run's sources: what one scan of all their records found, kept beside the run.

It says where each block of prompts begins, its digest, and which records repeat an earlier one. Later starts
use the index instead of a scan as long as the sources are the same.

A record with the id and content of an earlier one is used once, wherever the earlier one lies. A record that
gives a used id to another content is broken, like a line that is not JSON: its prompt fails, because a sample
is known by its id. Ids of different sources may be the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from paceline.data.prompts import (
    BrokenRecordError,
    Prompt,
    asked,
    broken_prompt,
    content_of,
    length_of,
)
from paceline.data.records import Records, Source
from paceline.data.source import BLOCK, digest_of
from paceline.regular_files import read_regular

INDEX_VERSION = 2
INDEX_BYTES_MAX = 1 << 30
LONGEST_KEPT = 1024  # prompts whose length is checked before a run starts
NAMED = 3  # places that a message names


@dataclass(frozen=True)
class Block:
    """Up to BLOCK prompts: where their records begin, and which records repeat earlier ones.

    `repeats`: numbers of the records that are left out. `clashes`: for the number of a record whose id is
    used for another content, the number of the record that used it first; strings, as JSON keys are.
    """

    offset: int
    number: int
    num_prompts: int
    digest: str
    repeats: Sequence[int] = ()
    clashes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Index:
    """What the scan of a source found.

    `broken` and `repeated` are counts, beside a description of the first few. `shared`: prompts that the
    source has in common with the held-out prompts. `longest`: (characters, ordinal) of the longest prompts.
    `kinds`: how many prompts there are of each format.
    """

    blocks: tuple[Block, ...]
    num_prompts: int
    broken: int
    first_broken: tuple[str, ...]
    repeated: int
    first_repeated: tuple[str, ...]
    shared: int
    first_shared: str
    longest: tuple[tuple[int, int], ...]
    kinds: dict[str, int]


def indexed(sources: Sequence[Source], heldout: Collection[str], path: Path | None) -> list[Index]:
    """The index of each source: from `path` if it is of exactly these sources, else from a scan of them.

    `heldout`: keys of questions that must not be among the prompts' (`asked`). Raises ConfigError if a source
    cannot be read.
    """
    heldout = frozenset(heldout)
    texts = hashlib.sha256(json.dumps(sorted(heldout)).encode()).hexdigest()
    identity = [INDEX_VERSION, texts, *([source.format, *source.records.identity()] for source in sources)]
    if kept := _kept(path, identity):
        return kept
    found: list[Index] = []
    earlier: list[_Scan] = []
    for source in sources:
        scan = _Scan(source, heldout, earlier)
        for record, prompt in source.read():
            if prompt is not None:
                scan.add(record.number, record.offset, prompt)
        found.append(scan.index())
        earlier.append(scan)
    _keep(path, identity, found)
    return found


class _Scan:
    """Collects the index of a source from its prompts, one after another."""

    def __init__(self, source: Source, heldout: Collection[str], earlier: Iterable[_Scan]) -> None:
        self._records = source.records
        self._heldout = heldout
        self._earlier = tuple(earlier)
        self._seen: dict[int, int] = {}  # a hash of each id: one of its content, and its number
        self._blocks: list[Block] = []
        self._held: list[Prompt] = []
        self._begin: tuple[int, int] = (0, 1)
        self._repeats: list[int] = []
        self._clashes: dict[str, int] = {}
        self._longest: list[tuple[int, int]] = []
        self._broken: list[str] = []
        self._repeated: list[str] = []
        self._shared: list[str] = []
        self._counts = Counter[str]()
        self._kinds = Counter[str]()

    def add(self, number: int, offset: int, prompt: Prompt) -> None:
        if not self._held and not self._repeats:
            self._begin = offset, number
        if not prompt.broken:
            name, content = _hash(prompt.prompt_id), _hash(json.dumps(content_of(prompt))) & 0xFFFFFFFF
            if first := self._found_before(name, content):
                self._repeats.append(number)
                self._count("repeated", self._repeated, f"{self._records.unit} {number} repeats {first}")
                return
            known = self._seen.setdefault(name, content << 40 | number)
            if (first_number := known & 0xFFFFFFFFFF) != number:
                self._clashes[str(number)] = first_number
                prompt = clash(self._records, number, first_number, prompt)
        self._hold(prompt)
        if len(self._held) == BLOCK:
            self._end_block()

    def index(self) -> Index:
        num_prompts = len(self._blocks) * BLOCK + len(self._held)
        if self._held:
            self._end_block()
        return Index(
            blocks=tuple(self._blocks),
            num_prompts=num_prompts,
            broken=self._counts["broken"],
            first_broken=tuple(self._broken),
            repeated=self._counts["repeated"],
            first_repeated=tuple(self._repeated),
            shared=self._counts["shared"],
            first_shared=min(self._shared, default=""),
            longest=tuple(sorted(self._longest, reverse=True)),
            kinds=dict(self._kinds),
        )

    def _found_before(self, name: int, content: int) -> str:
        """The record, in words, with the same id and content; "" if there is none."""
        for scan in (self, *self._earlier):
            known = scan._seen.get(name)
            if known is not None and known >> 40 == content:
                where = f" of {scan._records.name}" if scan is not self else ""
                return f"{scan._records.unit} {known & 0xFFFFFFFFFF}{where}"
        return ""

    def _hold(self, prompt: Prompt) -> None:
        ordinal = len(self._blocks) * BLOCK + len(self._held)
        self._held.append(prompt)
        if prompt.broken:
            self._count("broken", self._broken, prompt.broken)
            return
        self._kinds[prompt.kind] += 1
        if shared := [words for key, words in asked(prompt) if key in self._heldout]:
            self._count("shared", self._shared, shared[0])
        entry = length_of(prompt), ordinal
        if len(self._longest) < LONGEST_KEPT:
            heapq.heappush(self._longest, entry)
        else:
            heapq.heappushpop(self._longest, entry)

    def _count(self, kind: str, first: list[str], what: str) -> None:
        self._counts[kind] += 1
        if len(first) < NAMED:
            first.append(what)

    def _end_block(self) -> None:
        offset, number = self._begin
        repeats, clashes = tuple(self._repeats), dict(self._clashes)
        self._blocks.append(Block(offset, number, len(self._held), digest_of(self._held), repeats, clashes))
        self._held.clear()
        self._repeats.clear()
        self._clashes.clear()


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "big")


def clash(records: Records, number: int, first: int, prompt: Prompt) -> Prompt:
    """The prompt of a record whose id an earlier record has."""
    fault = BrokenRecordError(
        'its "id" belongs to another text', f": {prompt.prompt_id!r}, in {records.unit} {first}"
    )
    text = prompt.text or json.dumps(content_of(prompt))
    return broken_prompt(number, prompt.place, fault, text)


# -- the index beside the run ------------------------------------------------------------------


def _kept(path: Path | None, identity: list[Any]) -> list[Index]:
    """The indexes of an earlier start; none unless they are of exactly these sources."""
    if path is None:
        return []
    try:
        kept = json.loads(read_regular(path, INDEX_BYTES_MAX))
        return [_index(values) for values in kept["indexes"]] if kept["identity"] == identity else []
    except (OSError, LookupError, TypeError, ValueError, RecursionError):
        return []


def _index(values: dict[str, Any]) -> Index:
    blocks = tuple(Block(**block) for block in values.pop("blocks"))
    longest = tuple((size, ordinal) for size, ordinal in values.pop("longest"))
    rest: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    return Index(blocks=blocks, longest=longest, **rest)


def _keep(path: Path | None, identity: list[Any], indexes: list[Index]) -> None:
    """Write the index if the run directory exists. It only saves time, so a failure is ignored."""
    if path is None:
        return
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        kept = {"identity": identity, "indexes": [asdict(index) for index in indexes]}
        aside.write_bytes(json.dumps(kept).encode())
        aside.replace(path)
