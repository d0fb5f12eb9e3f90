"""Acceptance length and speed of drafts on prompts, against plain decoding by the same target forward.

Each prompt is decoded plainly and in every way of guessing. Greedy outputs are compared token for token.
Sampled ones cannot be, so they give acceptance alone. Times include the draft's prefill, and exclude the
target's, which is the same for all. The speed depends on this machine; the acceptance length does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any
from zlib import crc32

from paceline.errors import ConfigError
from paceline.evaluation.heldout import Asked
from paceline.evaluation.resampling import Floats, Interval, Resampling, quotient
from paceline.evaluation.speculative import Decoded, Decoding, plain_generate, speculative_generate
from paceline.evaluation.tree import Drafting
from paceline.evaluation.verifier import Verifier
from paceline.methods.drafter import Drafter

Heard = Callable[[Asked, Mapping[str, Decoded]], None]


@dataclass(frozen=True)
class Way:
    """One way of guessing. `name`: "tree", "chain", or "lookup" for the baseline without weights."""

    name: str
    drafter: Drafter
    drafting: Drafting


@dataclass(frozen=True)
class AnswerFigures:
    """One answer. `tokens`: without the first one, which comes from the prefill. `kept[j]`: in how many
    cycles a guess at depth j + 1 was kept. `identical`: to plain decoding; None if that is not defined.

    Of `seconds`, guessing took `draft_seconds` and the target's passes `target_seconds`.
    """

    tokens: int
    seconds: float
    cycles: int = 0
    kept: tuple[int, ...] = ()
    draft_seconds: float = 0.0
    target_seconds: float = 0.0
    identical: bool | None = None


@dataclass(frozen=True)
class PromptFigures:
    """One prompt. `plain`: None without plain decoding. `ways`: the answer of each way, by its name."""

    prompt_id: str
    category: str
    prompt_tokens: int
    plain: AnswerFigures | None
    ways: dict[str, AnswerFigures]


@dataclass(frozen=True)
class AcceptanceReport:
    """`acceptance_length` is 1 + accepted draft tokens / cycles, as vLLM's counters give it.

    `emitted_per_cycle` is smaller: it leaves out the draft tokens that were accepted beyond an answer's end.
    It and tokens/s leave out every answer's first token, which comes from the prefill. `acceptance_rate[j]`
    is the share of cycles that kept a draft token at depth j + 1; `branching` 1 is a chain. `identical`
    counts prompts whose speculative output equals plain decoding token for token. What needs plain decoding
    is None without it, as for sampled answers. `*_interval`: 95 % over prompts (resampling.py). `cycle_ms`:
    a cycle's mean milliseconds: of guessing ("draft"), of the target's pass ("target"), of all else ("rest").
    """

    prompts: int
    identical: int | None
    num_draft_tokens: int
    branching: int
    tokens: int
    cycles: int
    acceptance_length: float
    acceptance_length_interval: Interval
    emitted_per_cycle: float
    acceptance_rate: tuple[float, ...]
    acceptance_rate_interval: tuple[Interval, ...]
    plain_tokens_per_s: float | None
    speculative_tokens_per_s: float
    speed_up: float | None
    speed_up_interval: Interval
    cycle_ms: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """A draft against the lookup baseline on the same prompts; intervals are of the paired difference.

    `gain`: in acceptance length. `speed_ratio`: of their tokens/s.
    """

    gain: float
    gain_interval: Interval
    speed_ratio: float
    speed_ratio_interval: Interval


def decode_prompts(
    target: Verifier,
    ways: Sequence[Way],
    asked: Sequence[Asked],
    decoding: Decoding,
    *,
    with_plain: bool = True,
    heard: Heard | None = None,
) -> Iterator[PromptFigures]:
    """Decode every prompt in every way, and plainly if greedy; the figures of each prompt when it is done.

    `with_plain=False`: no plain decoding, which acceptance does not need. `heard` gets the answers of each
    prompt, by the way's name.

    The seed of `decoding` is not used: each prompt has its own. Raises ConfigError without prompts.
    """
    if not asked:
        raise ConfigError(
            "There is no prompt to decode.",
            why="Acceptance is a property of a draft on prompts.",
            next="give at least one prompt.",
        )
    _warm_up(target, ways, asked[0].token_ids)
    for place, prompt in enumerate(asked):
        # A prompt is sampled alike whichever prompts come before it.
        ids, chosen = prompt.token_ids, replace(decoding, seed=crc32(prompt.prompt_id.encode()))
        plain: Decoded | None = None
        is_compared = with_plain and decoding.temperature <= 0
        # Each side goes first in turn, so that a drift of the machine's speed favours neither.
        if is_compared and place % 2 == 0:
            plain = plain_generate(target, ids, chosen)
        found = {
            way.name: speculative_generate(target, way.drafter, ids, chosen, way.drafting) for way in ways
        }
        if is_compared and plain is None:
            plain = plain_generate(target, ids, chosen)
        if heard is not None:
            heard(prompt, found)
        yield PromptFigures(
            prompt.prompt_id,
            prompt.category,
            len(ids),
            None if plain is None else AnswerFigures(len(plain.tokens) - 1, plain.decode_s),
            {way.name: _figures(found[way.name], way.drafting, plain) for way in ways},
        )


def summarise(figures: Sequence[PromptFigures], name: str, drafting: Drafting) -> AcceptanceReport:
    """The report of the way `name`, which guessed as `drafting` says."""
    answers, resampling = [each.ways[name] for each in figures], Resampling(len(figures))
    plains = [each.plain for each in figures if each.plain is not None]
    tokens, cycles = sum(answer.tokens for answer in answers), sum(answer.cycles for answer in answers)
    depths = range(drafting.max_depth)
    speed, plain_speed = _speed(answers), _speed(plains) if plains else None
    return AcceptanceReport(
        prompts=len(figures),
        identical=sum(bool(answer.identical) for answer in answers) if plains else None,
        num_draft_tokens=drafting.num_tokens,
        branching=drafting.branching,
        tokens=tokens,
        cycles=cycles,
        acceptance_length=1 + sum(sum(answer.kept) for answer in answers) / max(1, cycles),
        acceptance_length_interval=resampling.interval(_lengths(resampling, answers)),
        emitted_per_cycle=tokens / max(1, cycles),
        acceptance_rate=tuple(sum(answer.kept[j] for answer in answers) / max(1, cycles) for j in depths),
        acceptance_rate_interval=tuple(
            resampling.interval(
                resampling.ratio(
                    [answer.kept[j] for answer in answers], [answer.cycles for answer in answers]
                )
            )
            for j in depths
        ),
        plain_tokens_per_s=plain_speed,
        speculative_tokens_per_s=speed,
        speed_up=speed / plain_speed if plain_speed else None,
        speed_up_interval=resampling.interval(
            quotient(_speeds(resampling, answers), _speeds(resampling, plains))
        )
        if plains
        else None,
        cycle_ms=_cycle_ms(answers, cycles),
    )


def compare(figures: Sequence[PromptFigures], name: str, baseline: str) -> Comparison:
    """The way `name` against the way `baseline`, prompt by prompt."""
    resampling = Resampling(len(figures))
    ours, theirs = ([each.ways[way] for each in figures] for way in (name, baseline))
    lengths = [
        1 + sum(sum(answer.kept) for answer in side) / max(1, sum(answer.cycles for answer in side))
        for side in (ours, theirs)
    ]
    return Comparison(
        gain=lengths[0] - lengths[1],
        gain_interval=resampling.interval(_lengths(resampling, ours) - _lengths(resampling, theirs)),
        speed_ratio=_speed(ours) / max(1e-9, _speed(theirs)),
        speed_ratio_interval=resampling.interval(
            quotient(_speeds(resampling, ours), _speeds(resampling, theirs))
        ),
    )


def _warm_up(target: Verifier, ways: Sequence[Way], ids: tuple[int, ...]) -> None:
    """The first steps of a process also load weights into memory; that must count for no side."""
    short = Decoding(max_new_tokens=4)
    plain_generate(target, ids, short)
    for way in ways:
        speculative_generate(target, way.drafter, ids, short, way.drafting)


def _figures(decoded: Decoded, drafting: Drafting, plain: Decoded | None) -> AnswerFigures:
    return AnswerFigures(
        tokens=len(decoded.tokens) - 1,
        seconds=decoded.decode_s,
        cycles=len(decoded.accepted),
        kept=tuple(sum(kept > j for kept in decoded.accepted) for j in range(drafting.max_depth)),
        draft_seconds=decoded.draft_s,
        target_seconds=decoded.target_s,
        identical=None if plain is None else decoded.tokens == plain.tokens,
    )


def _speed(answers: Sequence[AnswerFigures]) -> float:
    return sum(answer.tokens for answer in answers) / max(1e-9, sum(answer.seconds for answer in answers))


def _speeds(resampling: Resampling, answers: Sequence[AnswerFigures]) -> Floats:
    return resampling.ratio([answer.tokens for answer in answers], [answer.seconds for answer in answers])


def _lengths(resampling: Resampling, answers: Sequence[AnswerFigures]) -> Floats:
    return 1 + resampling.ratio(
        [sum(answer.kept) for answer in answers], [answer.cycles for answer in answers]
    )


def _cycle_ms(answers: Sequence[AnswerFigures], cycles: int) -> dict[str, float]:
    draft, target, whole = (
        1000 * sum(getattr(answer, name) for answer in answers) / max(1, cycles)
        for name in ("draft_seconds", "target_seconds", "seconds")
    )
    return {"draft": draft, "target": target, "rest": whole - draft - target}
