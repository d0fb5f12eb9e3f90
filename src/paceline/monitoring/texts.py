"""A sample's prompt and answer as text, where the run keeps its tokens and the target's tokenizer is at hand.

Neither torch nor the network is used; without a tokenizer the text is the tokens' ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

from paceline.config.load import setting
from paceline.data.answers import Answer, AnswerFiles
from paceline.ledger.facts import CONFIG
from paceline.regular_files import kind_of, read_regular

TOKENIZER_BYTES_MAX = 1 << 26
TOKENS_MAX = 4096  # that are shown


class Piece(Struct, frozen=True, kw_only=True):
    """Neighbouring tokens. `is_answer`: they are trained on."""

    text: str
    is_answer: bool


class SampleText(Struct, frozen=True, kw_only=True):
    """`are_ids`: the texts are token ids. `left_out`: tokens at the end that are not shown."""

    tokens: int
    pieces: tuple[Piece, ...]
    are_ids: bool
    left_out: int = 0


class SampleTexts:
    """Of one run. A tokenizer is read once."""

    def __init__(self, directory: Path) -> None:
        self._folder = directory / "answers"
        self._answers = AnswerFiles(self._folder)
        self._tokenizers: dict[Path, Any] = {}

    def of(self, ordinal: int, facts: Mapping[str, Any]) -> SampleText | None:
        """None if no answer is kept. `facts`: of the ledger. Raises StoreError."""
        if any(kind_of(path) != "file" for path in self._folder.glob("*.answers")):
            return None  # another program's: to open a pipe would wait for ever
        answer = self._answers.get(ordinal)
        if answer is None:
            return None
        tokenizer = self._tokenizer(facts)
        pieces = tuple(
            Piece(text=_text(tokenizer, answer.token_ids[start:stop]), is_answer=is_answer)
            for start, stop, is_answer in _stretches(answer)
        )
        return SampleText(
            tokens=len(answer.token_ids),
            pieces=pieces,
            are_ids=tokenizer is None,
            left_out=max(0, len(answer.token_ids) - TOKENS_MAX),
        )

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


def _stretches(answer: Answer) -> list[tuple[int, int, bool]]:
    """The tokens that are shown, as (start, stop, whether they are an answer)."""
    end, at, found = min(len(answer.token_ids), TOKENS_MAX), 0, []
    for start, stop in answer.spans:
        found += [(at, min(start, end), False), (min(start, end), min(stop, end), True)]
        at = min(stop, end)
    return [one for one in [*found, (at, end, False)] if one[0] < one[1]]


def _text(tokenizer: Any, ids: tuple[int, ...]) -> str:
    if tokenizer is None:
        return " ".join(map(str, ids))
    return str(tokenizer.decode(list(ids), skip_special_tokens=False))
