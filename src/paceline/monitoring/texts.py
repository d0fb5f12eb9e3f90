"""Texts of a run, by the tokens that it keeps: samples, and measured answers with the draft's tokens marked.

Neither torch nor the network is used. Without the target's tokenizer at hand a text is the tokens' ids. What
a screen or a page would obey (control characters, marks of direction) is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from paceline.config.load import setting
from paceline.data.answers import AnswerFiles
from paceline.evaluation.marked import MarkedAnswer, marked_words, read_marked, read_samples
from paceline.ledger.facts import CONFIG
from paceline.regular_files import kind_of, read_regular
from paceline.terminal import printable

TOKENIZER_BYTES_MAX = 1 << 26
TOKENS_MAX = 4096  # that are shown of a text
Places = Iterable[tuple[int, int]]


class Piece(Struct, frozen=True, kw_only=True):
    """Neighbouring tokens. `is_answer`: the target wrote them. `is_drafted`: the draft guessed them."""

    text: str
    is_answer: bool
    is_drafted: bool = False


class Text(Struct, frozen=True, kw_only=True):
    """`are_ids`: the pieces are token ids. `left_out`: tokens at the end that are not shown. `drafted`: which
    draft guesses the marked tokens, in words; empty if none was asked."""

    tokens: int
    pieces: tuple[Piece, ...]
    are_ids: bool
    left_out: int = 0
    drafted: str = ""


class AnswerText(Struct, frozen=True, kw_only=True):
    """A held-out prompt with its answer, of which `drafted_tokens` were the draft's. `acceptance_length`:
    1 + accepted / cycles of this prompt alone; null if its answer was over with its first token."""

    prompt_id: str
    text: Text
    answer_tokens: int
    drafted_tokens: int
    acceptance_length: float | None


class WayText(Struct, frozen=True, kw_only=True):
    """`guesses`: the way of guessing, such as "tree of 7"."""

    guesses: str
    answers: tuple[AnswerText, ...]


class AnswerTexts(Struct, frozen=True, kw_only=True):
    """Of one measured checkpoint. `left_out`: prompts that are not kept."""

    step: int
    checkpoint: str
    ways: tuple[WayText, ...]
    left_out: int


class RunTexts:
    """Of one run. A tokenizer is read once."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._folder = directory, directory / "answers"
        self._answers = AnswerFiles(self._folder)
        self._tokenizers: dict[Path, Any] = {}

    def of_sample(self, ordinal: int, facts: Mapping[str, Any]) -> Text | None:
        """None if no answer is kept. `facts`: of the ledger. Raises StoreError."""
        if any(kind_of(path) != "file" for path in self._folder.glob("*.answers")):
            return None  # another program's: to open a pipe would wait for ever
        answer = self._answers.get(ordinal)
        if answer is None:
            return None
        marked = read_samples(self._directory, facts).find(ordinal)
        if marked is None or marked.answer.token_ids != answer.token_ids:
            return self._text(facts, answer.token_ids, answer.spans)
        text = self._text(facts, answer.token_ids, answer.spans, marked.answer.drafted)
        return replace(text, drafted=printable(marked_words(marked)))

    def of_measured(self, facts: Mapping[str, Any], prompts: int | None = None) -> AnswerTexts | None:
        """Of the newest measurement, at most so many prompts; None if its answers are not kept."""
        marked = read_marked(self._directory, facts)
        if marked is None:
            return None
        return AnswerTexts(
            step=marked.step,
            checkpoint=printable(marked.checkpoint),
            ways=tuple(
                WayText(
                    guesses=printable(marked.guesses[way]),
                    answers=tuple(self._answer(facts, answer) for answer in answers[:prompts]),
                )
                for way, answers in marked.ways.items()
            ),
            left_out=marked.left_out,
        )

    def _answer(self, facts: Mapping[str, Any], answer: MarkedAnswer) -> AnswerText:
        whole = len(answer.token_ids)
        return AnswerText(
            prompt_id=printable(answer.prompt_id),
            text=self._text(facts, answer.token_ids, [(answer.prompt_tokens, whole)], answer.drafted),
            answer_tokens=whole - answer.prompt_tokens,
            drafted_tokens=sum(stop - start for start, stop in answer.drafted),
            acceptance_length=1 + answer.accepted / answer.cycles if answer.cycles else None,
        )

    def _text(
        self, facts: Mapping[str, Any], ids: Sequence[int], answers: Places, drafted: Places = ()
    ) -> Text:
        shown = ids[:TOKENS_MAX]
        decoded = _decoded(self._tokenizer(facts), shown)
        written, guessed = _at(answers), _at(drafted)
        kinds = [(place in written, place in guessed) for place in range(len(shown))]
        texts = zip(kinds, decoded or [f"{token} " for token in shown], strict=True)
        pieces = [
            Piece(text=printable("".join(text for _, text in group)), is_answer=kind[0], is_drafted=kind[1])
            for kind, group in groupby(texts, key=lambda one: one[0])
        ]
        left_out = len(ids) - len(shown)
        return Text(tokens=len(ids), pieces=tuple(pieces), are_ids=decoded is None, left_out=left_out)

    def _tokenizer(self, facts: Mapping[str, Any]) -> Any:
        path = _tokenizer_file(facts)
        if path is None:
            return None
        if path not in self._tokenizers:
            from tokenizers import Tokenizer

            try:
                self._tokenizers[path] = Tokenizer.from_buffer(read_regular(path, TOKENIZER_BYTES_MAX))
            except Exception:  # noqa: BLE001 (whatever a damaged file raises there: ids are shown)
                self._tokenizers[path] = None
        return self._tokenizers[path]


def _tokenizer_file(facts: Mapping[str, Any]) -> Path | None:
    """In the target's folder, or in the hub's cache on this machine."""
    recorded = facts.get(CONFIG)
    model = setting(recorded, "target.model") if isinstance(recorded, dict) else None
    if not isinstance(model, str) or not model or "\0" in model:
        return None
    if Path(model).is_dir():
        return Path(model) / "tokenizer.json"
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(model, "tokenizer.json")
    except ValueError:  # it is no name of a model
        return None
    return Path(found) if isinstance(found, str) else None


def _at(places: Places) -> set[int]:
    return {place for start, stop in places for place in range(start, min(stop, TOKENS_MAX))}


def _decoded(tokenizer: Any, ids: Sequence[int]) -> list[str] | None:
    """The text that each token adds. The last token of a character adds it, those before it nothing.

    None without a tokenizer, if it does not know the ids, or if the tokens' texts are not the whole's: bytes
    that are no characters may be some in parts.
    """
    if tokenizer is None or not ids:
        return None
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=False)
    try:
        texts = [stream.step(tokenizer, token) or "" for token in ids]
        whole, told = tokenizer.decode(list(ids), skip_special_tokens=False), "".join(texts)
    except Exception:  # noqa: BLE001 (whatever foreign ids raise there)
        return None
    return [*texts[:-1], texts[-1] + whole.removeprefix(told)] if whole.startswith(told) else None
