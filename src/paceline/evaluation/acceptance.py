"""Acceptance length and speed of a draft on held-out prompts, against plain decoding.

Each prompt is decoded twice on the same target forward, plainly and speculatively, greedily, and
the two outputs are compared token for token. Times exclude the target's prefill, which is the same
for both, and include the draft's. The figures are of this machine; acceptance is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from paceline.errors import ConfigError
from paceline.evaluation.speculative import Decoded, Decoding, Drafter, plain_generate, speculative_generate
from paceline.evaluation.target import LlamaTarget


@dataclass(frozen=True)
class AcceptanceReport:
    """`acceptance_length` (tau) is tokens per target cycle, the target's own token included.

    Both it and tokens/s leave out every answer's first token, which comes from the prefill.
    `acceptance_rate[j]` is the share of cycles that kept draft token j. `identical` counts prompts
    whose speculative output equals plain decoding token for token.
    """

    prompts: int
    identical: int
    num_draft_tokens: int
    tokens: int
    cycles: int
    acceptance_length: float
    acceptance_rate: tuple[float, ...]
    plain_tokens_per_s: float
    speculative_tokens_per_s: float
    speed_up: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_acceptance(
    target: LlamaTarget,
    drafter: Drafter,
    prompts: Sequence[tuple[int, ...]],
    decoding: Decoding,
    num_draft_tokens: int,
) -> AcceptanceReport:
    """Decode every prompt plainly and speculatively. Raises ConfigError without prompts or greedy mode."""
    if not prompts or decoding.temperature > 0:
        raise ConfigError(
            f"cannot compare {len(prompts)} prompts at temperature {decoding.temperature}",
            why="token-for-token equality is defined for greedy decoding of at least one prompt",
            next="give held-out prompts and temperature 0",
        )
    # The first steps of a process pay for weights that are not in memory yet; neither side should.
    warm_up = Decoding(max_new_tokens=4)
    plain_generate(target, prompts[0], warm_up)
    speculative_generate(target, drafter, prompts[0], warm_up, num_draft_tokens)
    pairs = []
    for index, prompt_ids in enumerate(prompts):
        # Turns are taken in going first, so that a drift of the machine's speed favours neither.
        if index % 2:
            drafted = speculative_generate(target, drafter, prompt_ids, decoding, num_draft_tokens)
            pairs.append((plain_generate(target, prompt_ids, decoding), drafted))
        else:
            plain = plain_generate(target, prompt_ids, decoding)
            pairs.append(
                (plain, speculative_generate(target, drafter, prompt_ids, decoding, num_draft_tokens))
            )
    return summarise(pairs, num_draft_tokens)


def summarise(pairs: Sequence[tuple[Decoded, Decoded]], num_draft_tokens: int) -> AcceptanceReport:
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
        num_draft_tokens=num_draft_tokens,
        tokens=tokens,
        cycles=cycles,
        acceptance_length=tokens / max(1, cycles),
        acceptance_rate=tuple(
            sum(kept > j for kept in accepted) / max(1, cycles) for j in range(num_draft_tokens)
        ),
        plain_tokens_per_s=plain_speed,
        speculative_tokens_per_s=drafted_speed,
        speed_up=drafted_speed / plain_speed if plain_speed else 0.0,
    )
