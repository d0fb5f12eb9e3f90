"""Dataset: the prompts of one source, read block by block with the help of its index.

Every block that is read is compared with its digest, so a source that changed meanwhile is noticed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from paceline.data.formats import CHATS
from paceline.data.index import Index, clash
from paceline.data.prompts import Prompt
from paceline.data.records import Record, Source
from paceline.data.source import BLOCK, blocks_between, digest_of
from paceline.errors import ConfigError
from paceline.ledger.records import SourceBlock

BLOCKS_HELD = 4
Reading = Iterator[tuple[Record, Prompt | None]]


class Dataset:
    """The prompts of one source, in its order."""

    starts: Sequence[int] = (0,)

    def __init__(self, source: Source, index: Index) -> None:
        self.source = source
        self.records = source.records
        self.index = index
        self._held: OrderedDict[int, list[Prompt]] = OrderedDict()
        self._ahead: tuple[int, Reading] | None = None  # the next block, and its records on

    @property
    def name(self) -> str:
        return self.records.name

    @property
    def sources(self) -> list[Dataset]:
        return [self]

    @property
    def size(self) -> int:
        return self.index.num_prompts

    @property
    def longest(self) -> Sequence[int]:
        return [ordinal for _, ordinal in self.index.longest]

    @property
    def has_chats(self) -> bool:
        return any(kind in CHATS for kind in self.index.kinds)

    @property
    def notes(self) -> list[str]:
        """What a person should know before the run starts."""
        index, told, unit = self.index, [], self.records.unit
        if index.broken:
            first = "; ".join(index.first_broken)
            told.append(f"{index.broken} of {index.num_prompts} prompts fail, the first: {first}")
        if index.repeated:
            first = "; ".join(index.first_repeated)
            told.append(
                f"{index.repeated} {unit}s repeat an earlier one and are used once, the first: {first}"
            )
        return told

    @property
    def repeated(self) -> list[int]:
        """The numbers of the records that are left out."""
        return [number for block in self.index.blocks for number in block.repeats]

    def read(self, first: int, count: int) -> list[Prompt]:
        """Raises ConfigError if the source has changed since it was scanned."""
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

    def difference(self, known: Sequence[str], size: int) -> str:
        """Where the prompts differ from those of `size` and digests `known`, in words."""
        if self.size < size:
            return f"it has {self.size}, and the run {size}"
        pairs = zip(known, self.digests(size), strict=False)
        return f"the first that differ are in {self._lines_of(_first_unequal(pairs))}"

    def _lines_of(self, block: int) -> str:
        blocks, unit = self.index.blocks, self.records.unit
        last = f"{unit} {blocks[block + 1].number - 1}" if block + 1 < len(blocks) else "the end"
        return f"{unit} {blocks[block].number} to {last}"

    def _block(self, number: int) -> list[Prompt]:
        if number in self._held:
            self._held.move_to_end(number)
            return self._held[number]
        block = self.index.blocks[number]
        prompts, repeats = [], frozenset(block.repeats)
        records = self._from(number)
        for record, prompt in records:
            if prompt is None or record.number < block.number or record.number in repeats:
                continue
            if first := block.clashes.get(str(record.number)):
                prompt = clash(self.records, record.number, first, prompt)
            prompts.append(prompt)
            if len(prompts) == block.num_prompts:
                break
        if digest_of(prompts) != block.digest:
            raise self._changed(number)
        self._ahead = number + 1, records
        self._held[number] = prompts
        if len(self._held) > BLOCKS_HELD:
            self._held.popitem(last=False)
        return prompts

    def _from(self, number: int) -> Reading:
        """The records from a block on: of the reader that stands there, or of a new one.

        A stream's reader may stand before the block: a new one would begin at the start of the file.
        """
        block, ahead = self.index.blocks[number], self._ahead
        self._ahead = None
        if ahead is None or ahead[0] > number or (ahead[0] < number and not self.records.is_stream):
            return self.source.read(block.offset, block.number)
        return ahead[1]

    def _changed(self, number: int) -> ConfigError:
        return ConfigError(
            f"{self.name} was changed during the run ({self._lines_of(number)}).",
            why="Samples are identified by their place in the source; nothing new was captured.",
            next="restore it and run the same command again.",
        )


def _first_unequal(pairs: Iterator[tuple[str, str]]) -> int:
    return next(number for number, (one, other) in enumerate(pairs) if one != other)


def refuse_empty(dataset: Dataset) -> None:
    """Raise ConfigError if no prompt of the source can be captured."""
    index = dataset.index
    if index.num_prompts > index.broken:
        return
    first, unit = "".join(index.first_broken[:1]), dataset.records.unit
    many = " Records that go over several lines become such lines with: jq -c . FILE > FILE.jsonl"
    raise ConfigError(
        f"{dataset.name} holds no prompt.",
        why=f"No {unit} can be used; the first: {first}." if first else "It is empty.",
        next='set data.path to a file with a JSON object in each line, such as {"prompt": ...} or '
        '{"messages": [...]}; `paceline data check FILE` shows what is found.' + many * ("JSON" in first),
    )
