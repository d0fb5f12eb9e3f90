"""A JSONL file as a source of prompts: scanned once, then read block by block.

The scan writes a small index beside the run: where each block begins, its digest, and which lines repeat an
earlier one. Later starts use the index instead of a scan as long as the file is the same. Every block that
is read is compared with its digest, so a file that changed meanwhile is noticed.

A line with the id and text of an earlier one is used once. A line that gives a used id to another text is
broken, like a line that is not JSON: its prompt fails, because a sample is known by its id.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import heapq
import json
import os
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from paceline.data.prompts import Prompt, broken_line, parse_line
from paceline.data.source import BLOCK, blocks_between, digest_of
from paceline.errors import ConfigError
from paceline.ledger.records import SourceBlock

INDEX_VERSION = 1
LONGEST_KEPT = 1024  # prompts whose length is checked before a run starts
NAMED = 3  # places that a message names
BLOCKS_HELD = 4


@dataclass(frozen=True)
class Block:
    """Up to BLOCK prompts: where their lines begin, and which lines repeat earlier ones.

    `repeats`: numbers of the lines that are left out. `clashes`: for the number of a line whose id is used
    for another text, the number of the line that used it first; strings, because JSON keys are strings.
    """

    offset: int
    line: int
    num_prompts: int
    digest: str
    repeats: Sequence[int] = ()
    clashes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Index:
    """What the scan of a file found.

    `broken` and `repeated` are counts, beside a description of the first few. `shared`: texts that the file
    has in common with the held-out prompts. `longest`: ordinals of the prompts with the longest texts.
    """

    blocks: tuple[Block, ...]
    num_prompts: int
    broken: int
    first_broken: tuple[str, ...]
    repeated: int
    first_repeated: tuple[str, ...]
    shared: int
    first_shared: str
    longest: tuple[int, ...]


class PromptFile:
    """The prompts of one file, in its order."""

    starts: Sequence[int] = (0,)

    def __init__(self, path: Path, *, heldout: Collection[str] = (), index_path: Path | None = None) -> None:
        """Raises ConfigError if the file cannot be a run's prompts.

        `heldout`: texts that must not be among them. `index_path`: where the index is kept.
        """
        self.path = path
        self.lines_read = 0  # by this object, in all
        self._heldout = frozenset(heldout)
        self._held: OrderedDict[int, list[Prompt]] = OrderedDict()
        identity = self._identity()
        kept = _kept_index(index_path, identity)
        self.index = kept or self._scan()
        if kept is None and index_path is not None:
            _keep_index(index_path, identity, self.index)
        if self.index.num_prompts == self.index.broken:
            raise _no_prompts(path, self.index)

    @property
    def size(self) -> int:
        return self.index.num_prompts

    @property
    def longest(self) -> Sequence[int]:
        return self.index.longest

    @property
    def notes(self) -> list[str]:
        """What a person should know before the run starts."""
        index, told = self.index, []
        if index.broken:
            first = "; ".join(index.first_broken)
            told.append(f"{index.broken} of {index.num_prompts} prompts fail, the first: {first}")
        if index.repeated:
            first = "; ".join(index.first_repeated)
            told.append(f"{index.repeated} lines repeat an earlier one and are used once, the first: {first}")
        return told

    @property
    def repeated_lines(self) -> list[int]:
        return [line for block in self.index.blocks for line in block.repeats]

    def read(self, first: int, count: int) -> list[Prompt]:
        """Raises ConfigError if the file has changed since it was scanned."""
        found: list[Prompt] = []
        end = min(first + count, self.size)
        while (ordinal := first + len(found)) < end:
            number, place = divmod(ordinal, BLOCK)
            found += self._block(number)[place : place + end - ordinal]
        return found

    def digests(self, count: int) -> list[str]:
        """The digest of every block of the first `count` prompts; the last block may be partial."""
        whole, rest = divmod(min(count, self.size), BLOCK)
        known = [block.digest for block in self.index.blocks[: whole + (rest > 0)]]
        if rest and self.index.blocks[whole].num_prompts != rest:
            known[-1] = digest_of(self._block(whole)[:rest])
        return known

    def blocks(self, bounds: Sequence[int] = ()) -> list[SourceBlock]:
        return blocks_between(bounds, self.size, lambda first, count: digest_of(self.read(first, count)))

    def lines_of(self, block: int) -> str:
        """Where a block lies in the file, for messages."""
        blocks = self.index.blocks
        last = f"line {blocks[block + 1].line - 1}" if block + 1 < len(blocks) else "the end"
        return f"line {blocks[block].line} to {last}"

    # -- reading -----------------------------------------------------------------------------

    def _block(self, number: int) -> list[Prompt]:
        if number in self._held:
            self._held.move_to_end(number)
            return self._held[number]
        block = self.index.blocks[number]
        prompts: list[Prompt] = []
        repeats = frozenset(block.repeats)
        for line, _, text in self._lines(block.offset, block.line):
            if len(prompts) == block.num_prompts:
                break
            prompt = None if line in repeats else parse_line(text, self.path, line)
            if prompt is None:
                continue
            if str(line) in block.clashes:
                prompt = _clash(self.path, line, block.clashes[str(line)], prompt)
            prompts.append(prompt)
        if digest_of(prompts) != block.digest:
            raise ConfigError(
                f"The prompt file {self.path} was changed during the run ({self.lines_of(number)}).",
                why="Samples are identified by their place in the file; nothing new was captured.",
                next="restore the file and run the same command again.",
            )
        self._held[number] = prompts
        if len(self._held) > BLOCKS_HELD:
            self._held.popitem(last=False)
        return prompts

    def _lines(self, offset: int = 0, number: int = 1) -> Iterator[tuple[int, int, bytes]]:
        """Number, offset and bytes of each line, from the line at `offset` on. Only a newline ends a line."""
        try:
            with self.path.open("rb") as file:
                file.seek(offset)
                for line in file:
                    self.lines_read += 1
                    yield number, offset, line.removeprefix(codecs.BOM_UTF8) if offset == 0 else line
                    number, offset = number + 1, offset + len(line)
        except OSError as error:
            raise _unreadable(self.path, error) from error

    def _identity(self) -> list[Any]:
        """A value that changes when the file or the held-out texts change."""
        try:
            status = self.path.stat()
        except (OSError, ValueError) as error:
            raise _unreadable(self.path, error) from error
        if not self.path.is_file():
            raise _unreadable(self.path, "it is not a file")
        heldout = hashlib.sha256(json.dumps(sorted(self._heldout)).encode()).hexdigest()
        times = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        return [INDEX_VERSION, str(self.path), *times, heldout]

    # -- the scan of the whole file ------------------------------------------------------------

    def _scan(self) -> Index:
        look = _Scan(self.path, self._heldout)
        for line, offset, text in self._lines():
            prompt = parse_line(text, self.path, line)
            if prompt is not None:
                look.add(line, offset, prompt)
        return look.index()


class _Scan:
    """Collects an index from the prompts of a file, one after another."""

    def __init__(self, path: Path, heldout: Collection[str]) -> None:
        self._path = path
        self._heldout = heldout
        self._seen: dict[int, int] = {}  # a hash of each id: one of its text, and its line
        self._blocks: list[Block] = []
        self._held: list[Prompt] = []
        self._begin: tuple[int, int] = (0, 1)
        self._repeats: list[int] = []
        self._clashes: dict[str, int] = {}
        self._longest: list[tuple[int, int]] = []
        self._broken: list[str] = []
        self._repeated: list[str] = []
        self._shared: list[str] = []
        self._counts = {"broken": 0, "repeated": 0, "shared": 0}

    def add(self, line: int, offset: int, prompt: Prompt) -> None:
        if not self._held and not self._repeats:
            self._begin = offset, line
        text = _hash(prompt.text) & 0xFFFFFFFF
        known = self._seen.setdefault(_hash(prompt.prompt_id), text << 40 | line)
        if (first := known & 0xFFFFFFFFFF) != line and not prompt.broken:
            if known >> 40 == text:
                self._repeats.append(line)
                self._count("repeated", self._repeated, f"line {line} repeats line {first}")
                return
            self._clashes[str(line)] = first
            prompt = _clash(self._path, line, first, prompt)
        ordinal = len(self._blocks) * BLOCK + len(self._held)
        self._held.append(prompt)
        if prompt.broken:
            self._count("broken", self._broken, prompt.broken)
        else:
            self._weigh(ordinal, prompt.text)
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
            longest=tuple(ordinal for _, ordinal in sorted(self._longest, reverse=True)),
        )

    def _weigh(self, ordinal: int, text: str) -> None:
        if text in self._heldout:
            self._count("shared", self._shared, text)
        entry = len(text), ordinal
        if len(self._longest) < LONGEST_KEPT:
            heapq.heappush(self._longest, entry)
        else:
            heapq.heappushpop(self._longest, entry)

    def _count(self, kind: str, first: list[str], what: str) -> None:
        self._counts[kind] += 1
        if len(first) < NAMED:
            first.append(what)

    def _end_block(self) -> None:
        offset, line = self._begin
        repeats, clashes = tuple(self._repeats), dict(self._clashes)
        block = Block(offset, line, len(self._held), digest_of(self._held), repeats, clashes)
        self._blocks.append(block)
        self._held.clear()
        self._repeats.clear()
        self._clashes.clear()


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "big")


def _clash(path: Path, line: int, first: int, prompt: Prompt) -> Prompt:
    return broken_line(
        path, line, f'its "id", {prompt.prompt_id!r}, belongs to another text, in line {first}', prompt.text
    )


def _unreadable(path: Path, reason: object) -> ConfigError:
    return ConfigError(
        f"The prompt file {path} cannot be read ({reason}).",
        next="set prompts.path to a JSONL file, such as prompts/train.jsonl.",
    )


def _no_prompts(path: Path, index: Index) -> ConfigError:
    return ConfigError(
        f"The prompt file {path} holds no prompt.",
        why=f"No line can be used; the first: {index.first_broken[0]}." if index.broken else "It is empty.",
        next='set prompts.path to a JSONL file with a text under "prompt" in each line.',
    )


# -- the index beside the run ------------------------------------------------------------------


def _kept_index(path: Path | None, identity: list[Any]) -> Index | None:
    """The index of an earlier start; None unless it is of exactly this file."""
    if path is None:
        return None
    try:
        kept = json.loads(path.read_bytes())
        if kept["identity"] != identity:
            return None
        blocks = tuple(Block(**block) for block in kept["index"].pop("blocks"))
        values: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in kept["index"].items()
        }
        return Index(blocks=blocks, **values)
    except (OSError, LookupError, TypeError, ValueError):
        return None


def _keep_index(path: Path, identity: list[Any], index: Index) -> None:
    """Write the index if the run directory exists. It only saves time, so a failure is ignored."""
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        aside.write_bytes(json.dumps({"identity": identity, "index": asdict(index)}).encode())
        aside.replace(path)
