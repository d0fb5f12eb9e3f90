"""Acceptance length and speed of a draft on held-out prompts, against plain decoding.

Each prompt is decoded greedily twice on the same target forward, plainly and speculatively, and the two
outputs are compared token for token. Times include the draft's prefill, and exclude the target's, which is
the same for both. The speed depends on this machine; the acceptance length does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from paceline.errors import ConfigError
from paceline.evaluation.speculative import Decoded, Decoding, plain_generate, speculative_generate
from paceline.evaluation.tree import Drafting
from paceline.evaluation.verifier import Verifier
from paceline.methods.drafter import Drafter


@dataclass(frozen=True)
class AcceptanceReport:
    """`acceptance_length` is 1 + accepted draft tokens / cycles, as vLLM's counters give it.

    `emitted_per_cycle` is smaller: it leaves out the draft tokens that were accepted beyond an answer's end.
    It and tokens/s leave out every answer's first token, which comes from the prefill. `acceptance_rate[j]`
    is the share of cycles that kept a draft token at depth j + 1; `branching` 1 is a chain. `identical`
    counts prompts whose speculative output equals plain decoding token for token.
    """

    prompts: int
    identical: int
    num_draft_tokens: int
    branching: int
    tokens: int
    cycles: int
    acceptance_length: float
    emitted_per_cycle: float
    acceptance_rate: tuple[float, ...]
    plain_tokens_per_s: float
    speculative_tokens_per_s: float
    speed_up: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_acceptance(
    target: Verifier,
    drafter: Drafter,
    prompts: Sequence[tuple[int, ...]],
    decoding: Decoding,
    draftings: Sequence[Drafting],
) -> list[AcceptanceReport]:
    """Decode every prompt once plainly and once with each kind of drafting; one report per kind.

    Raises ConfigError without prompts or greedy mode.
    """
    if not prompts or decoding.temperature > 0:
        raise ConfigError(
            f"cannot compare {len(prompts)} prompts at temperature {decoding.temperature}",
            why="token-for-token equality is defined for greedy decoding of at least one prompt",
            next="give held-out prompts and temperature 0",
        )
    # The first steps of a process also load weights into memory; that must count for neither side.
    warm_up = Decoding(max_new_tokens=4)
    plain_generate(target, prompts[0], warm_up)
    for drafting in draftings:
        speculative_generate(target, drafter, prompts[0], warm_up, drafting)
    plain: list[Decoded] = []
    drafted: list[list[Decoded]] = [[] for _ in draftings]
    for index, prompt_ids in enumerate(prompts):
        # Each side goes first in turn, so that a drift of the machine's speed favours neither.
        if index % 2 == 0:
            plain.append(plain_generate(target, prompt_ids, decoding))
        for outputs, drafting in zip(drafted, draftings, strict=True):
            outputs.append(speculative_generate(target, drafter, prompt_ids, decoding, drafting))
        if index % 2 == 1:
            plain.append(plain_generate(target, prompt_ids, decoding))
    return [
        summarise(list(zip(plain, outputs, strict=True)), drafting)
        for outputs, drafting in zip(drafted, draftings, strict=True)
    ]


def summarise(pairs: Sequence[tuple[Decoded, Decoded]], drafting: Drafting) -> AcceptanceReport:
    """The report of (plain, speculative) outputs, one pair per prompt."""
    accepted = [kept for _, drafted in pairs for kept in drafted.accepted]
    cycles = len(accepted)
    tokens = sum(len(drafted.tokens) - 1 for _, drafted in pairs)
    plain_tokens = sum(len(plain.tokens) - 1 for plain, _ in pairs)
    plain_speed = plain_tokens / max(1e-9, sum(plain.decode_s for plain, _ in pairs))
    drafted_speed = tokens / max(1e-9, sum(drafted.decode_s for _, drafted in pairs))
    return AcceptanceReport(
        prompts=len(pairs),
        identical=sum(plain.tokens == drafted.tokens for plain, drafted in pairs),
        num_draft_tokens=drafting.num_tokens,
        branching=drafting.branching,
        tokens=tokens,
        cycles=cycles,
        acceptance_length=1 + sum(accepted) / max(1, cycles),
        emitted_per_cycle=tokens / max(1, cycles),
        acceptance_rate=tuple(
            sum(kept > j for kept in accepted) / max(1, cycles) for j in range(drafting.max_depth)
        ),
        plain_tokens_per_s=plain_speed,
        speculative_tokens_per_s=drafted_speed,
        speed_up=drafted_speed / plain_speed if plain_speed else 0.0,
    )
