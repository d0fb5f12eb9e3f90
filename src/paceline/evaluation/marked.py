"""The measured answers with the draft's tokens marked, beside the run in `evaluation-answers.json`. No torch.

A token is the draft's if the draft guessed it and the target accepted it. All others are the target's own:
the first one of an answer, and one of every cycle. The file tells of the newest measurement alone. It holds
token ids, and at most TOKENS_MAX of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import msgspec
from msgspec import Struct

from paceline.durable_files import replace_file
from paceline.evaluation.curve import beginning_of
from paceline.regular_files import read_regular
from paceline.terminal import printable

FILE, SAMPLES = "evaluation-answers.json", "evaluation-samples.json"
PROMPTS_MAX, TOKENS_MAX = 64, 1 << 16  # of all ways of guessing together
FILE_BYTES_MAX = 1 << 22
Places = tuple[tuple[int, int], ...]


class MarkedAnswer(Struct, frozen=True, kw_only=True):
    """`token_ids`: the prompt, `prompt_tokens` of them, then the answer. `drafted`: the places of the draft's
    tokens, as (start, stop). `accepted`: draft tokens, those beyond the answer's end too, in `cycles`."""

    prompt_id: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    drafted: Places
    accepted: int
    cycles: int

    @classmethod
    def of(
        cls, prompt_id: str, prompt: Sequence[int], answer: Sequence[int], accepted: Sequence[int]
    ) -> MarkedAnswer:
        """`accepted`: how many draft tokens each cycle accepted; the end of the text may cut the last one."""
        return cls(
            prompt_id=printable(prompt_id),  # half a surrogate could not be written
            token_ids=(*prompt, *answer),
            prompt_tokens=len(prompt),
            drafted=drafted_places(accepted, len(prompt), len(prompt) + len(answer)),
            accepted=sum(accepted),
            cycles=len(accepted),
        )

    @property
    def is_sound(self) -> bool:
        places = [0, *(place for both in self.drafted for place in both), len(self.token_ids)]
        counts = (self.accepted, self.cycles, *self.token_ids)
        return (
            0 <= self.prompt_tokens <= len(self.token_ids)
            and all(a <= b for a, b in pairwise(places))
            and all(0 <= count < 1 << 31 for count in counts)
        )


class MarkedAnswers(Struct, frozen=True, kw_only=True):
    """A measurement's answers by the way of guessing ("tree", "chain"). `began`: when the run began, as its
    curve tells it. `guesses`: of each way, such as "tree of 7". `left_out`: prompts beyond the limits."""

    began: str
    step: int
    checkpoint: str
    guesses: dict[str, str]
    ways: dict[str, tuple[MarkedAnswer, ...]]
    left_out: int = 0


class MarkedSample(Struct, frozen=True, kw_only=True):
    """A training sample with the tokens marked that a draft guesses. `step`, `checkpoint`: of that draft."""

    ordinal: int
    step: int
    checkpoint: str
    guesses: str
    answer: MarkedAnswer


class MarkedSamples(Struct, frozen=True, kw_only=True):
    """The newest last. `began`: as above."""

    began: str
    samples: tuple[MarkedSample, ...] = ()

    def find(self, ordinal: int) -> MarkedSample | None:
        return next((one for one in self.samples if one.ordinal == ordinal), None)


def drafted_places(accepted: Sequence[int], start: int, stop: int) -> Places:
    """The places of the draft's tokens in an answer whose first token stands at `start`."""
    return tuple(_drafted(accepted, start, stop))


def _drafted(accepted: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, int]]:
    at = start + 1  # the first token comes from the prefill
    for kept in accepted:
        if kept and at < stop:
            yield at, min(at + kept, stop)
        at += kept + 1


def within_limits(
    answers: Mapping[str, Sequence[MarkedAnswer]],
) -> tuple[dict[str, tuple[MarkedAnswer, ...]], int]:
    """The first prompts of every way, as many as may be kept; and how many are left out."""
    prompts = [*zip(*answers.values(), strict=True)]
    tokens = kept = 0
    for prompt in prompts[:PROMPTS_MAX]:
        tokens += sum(len(answer.token_ids) for answer in prompt)
        if tokens > TOKENS_MAX:
            break
        kept += 1
    return {way: tuple(all_of[:kept]) for way, all_of in answers.items()}, len(prompts) - kept


def marked_words(sample: MarkedSample) -> str:
    """For people: how much of a sample's answer the draft guesses."""
    answer = sample.answer
    drafted = sum(stop - start for start, stop in answer.drafted)
    length = f"; acceptance length {1 + answer.accepted / answer.cycles:.2f}" if answer.cycles else ""
    return f"the draft of step {sample.step}, a {sample.guesses}, guesses {drafted} of its tokens{length}"


def keep_samples(directory: Path, facts: Mapping[str, object], fresh: Sequence[MarkedSample]) -> None:
    """Keep these in the place of older ones; the oldest beyond the limits go. Raises OSError."""
    anew = {one.ordinal for one in fresh}
    older = [one for one in read_samples(directory, facts).samples if one.ordinal not in anew]
    kept: list[MarkedSample] = []
    tokens = 0
    for one in reversed([*older, *fresh]):
        tokens += len(one.answer.token_ids)
        if len(kept) == PROMPTS_MAX or tokens > TOKENS_MAX:
            break
        kept.append(one)
    document = MarkedSamples(began=beginning_of(facts), samples=tuple(reversed(kept)))
    replace_file(directory / SAMPLES, msgspec.json.encode(document) + b"\n")


def read_samples(directory: Path, facts: Mapping[str, object]) -> MarkedSamples:
    """None of another run, and none of a file that is no such file."""
    try:
        found = msgspec.json.decode(read_regular(directory / SAMPLES, FILE_BYTES_MAX), type=MarkedSamples)
    except (OSError, ValueError, RecursionError):
        return MarkedSamples(began="")
    is_sound = all(one.answer.is_sound for one in found.samples) and found.began == beginning_of(facts)
    return found if is_sound else MarkedSamples(began="")


def write_marked(directory: Path, marked: MarkedAnswers) -> None:
    """Replaces the file. Raises OSError."""
    replace_file(directory / FILE, msgspec.json.encode(marked) + b"\n")


def read_marked(directory: Path, facts: Mapping[str, object]) -> MarkedAnswers | None:
    """None if the run has none, or if the file is another run's or no such file. `facts`: of the ledger."""
    try:
        found = msgspec.json.decode(read_regular(directory / FILE, FILE_BYTES_MAX), type=MarkedAnswers)
    except (OSError, ValueError, RecursionError):
        return None
    answers = [answer for all_of in found.ways.values() for answer in all_of]
    is_sound = found.ways.keys() == found.guesses.keys() and all(answer.is_sound for answer in answers)
    return found if is_sound and found.began == beginning_of(facts) else None
