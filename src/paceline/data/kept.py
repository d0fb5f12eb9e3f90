"""The kept answers of another run as what a run reads: every sample's tokens, in that run's order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from paceline.data.answers import AnswerFiles
from paceline.data.prompts import Prompt
from paceline.data.source import BLOCK, blocks_between, digest_of
from paceline.errors import ConfigError
from paceline.ledger.records import SourceBlock

if TYPE_CHECKING:
    from paceline.data.dataset import Dataset


class KeptAnswers:
    """A PromptSource of token ids with spans: those of the samples that the other run has committed."""

    starts: Sequence[int] = (0,)
    longest: Sequence[int] = ()  # `lengths` tells of all
    has_chats = True
    notes: Sequence[str] = ()
    sources: Sequence[Dataset] = ()

    def __init__(self, run: Path, is_committed: Callable[[int], bool]) -> None:
        """`is_committed`: of a sample of that run, by ordinal. Raises ConfigError if none is kept."""
        self.name = str(run)
        self._files = AnswerFiles(run / "answers")
        found = self._files.digests(is_committed)
        self._ordinals = sorted(found)
        self._digests = [found[ordinal][0] for ordinal in self._ordinals]
        self.lengths: Sequence[int] = [found[ordinal][1] for ordinal in self._ordinals]
        if not found:
            raise ConfigError(
                f"{run} keeps no answer of a committed sample.",
                why="data.answers names it as a run whose answers are trained on.",
                next="set data.answers to the directory of a run that has captured something.",
            )

    @property
    def size(self) -> int:
        return len(self._ordinals)

    def read(self, first: int, count: int) -> list[Prompt]:
        """Raises ConfigError if an answer is gone since the start."""
        return [self._prompt(ordinal) for ordinal in self._ordinals[first : first + count]]

    def _prompt(self, ordinal: int) -> Prompt:
        answer = self._files.get(ordinal)
        if answer is None:
            raise ConfigError(
                f"The answer of prompt {ordinal} in {self.name} is gone.",
                why="It was there when this run started; nothing new was captured.",
                next="restore that run's folder answers/ and run the same command again.",
            )
        return Prompt(answer.task_id, token_ids=answer.token_ids, spans=answer.spans)

    def digests(self, count: int) -> list[str]:
        """The digest of every block of the first `count` answers; the last block may be partial."""
        parts = [self._digests[first : min(first + BLOCK, count)] for first in range(0, count, BLOCK)]
        return [hashlib.sha256(b"".join(part)).hexdigest()[:16] for part in parts]

    def blocks(self, bounds: Sequence[int] = ()) -> list[SourceBlock]:
        return blocks_between(bounds, self.size, lambda first, count: digest_of(self.read(first, count)))

    def difference(self, known: Sequence[str], size: int) -> str:
        """Where the answers differ from those of `size` and digests `known`, in words."""
        if self.size < size:
            return f"it has {self.size} answers, and the run {size}"
        pairs = zip(known, self.digests(size), strict=False)
        block = next(number for number, (one, other) in enumerate(pairs) if one != other)
        return f"the first that differ are among its answers {block * BLOCK} to {(block + 1) * BLOCK - 1}"
