"""The reduced vocabulary of an EAGLE-3 draft, and its two maps to the target's vocabulary.

Shapes: V = target vocabulary, D = draft vocabulary. `d2t` is int64 [D] and holds *target id minus
draft id* (the offset convention of every public EAGLE-3 checkpoint); `t2d` is bool [V] and marks
the target tokens the draft can propose. Draft ids ascend with target ids. Deterministic: the same
weights give the same vocabulary on every machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from paceline.errors import ConfigError
from paceline.methods.targets import counted_rows
from paceline.target.head import TargetHead


def choose_draft_vocab(
    token_weights: torch.Tensor, draft_vocab_size: int, always: Sequence[int] = ()
) -> torch.Tensor:
    """Target ids of the draft vocabulary, ascending, int64 [D].

    `token_weights` [V]: any non-negative evidence summed per target token (counts, probability mass, or
    both). Ties, such as all tokens never seen, go to the lower id: byte-pair merges give frequent tokens
    low ids. `always` (eos and other special answer tokens) is included whatever its weight. Raises
    ConfigError if D does not fit.
    """
    vocab_size = int(token_weights.numel())
    forced = sorted(set(always))
    if not len(forced) <= draft_vocab_size <= vocab_size or draft_vocab_size < 1:
        raise ConfigError(
            f"draft_vocab_size={draft_vocab_size} does not fit {vocab_size} tokens, {len(forced)} required.",
            why="The draft vocabulary is a subset of the target's that holds every required token.",
            next=f"set draft_vocab_size between {max(1, len(forced))} and {vocab_size}",
        )
    if forced and not 0 <= forced[0] <= forced[-1] < vocab_size:
        raise ConfigError(
            f"Required token ids {forced} do not lie in 0..{vocab_size - 1}.",
            why="A token outside the target vocabulary can never be generated.",
            next="check eos_token_id in the target's config.json",
        )
    weights = token_weights.to(torch.float64).clone()
    weights[forced] = float("inf")
    ranked = torch.argsort(weights, descending=True, stable=True)
    return ranked[:draft_vocab_size].sort().values


def vocab_maps(target_ids: torch.Tensor, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(d2t int64 [D] of offsets, t2d bool [V]) for ascending `target_ids` int64 [D]."""
    d2t = target_ids - torch.arange(target_ids.numel(), dtype=torch.int64)
    t2d = torch.zeros(vocab_size, dtype=torch.bool)
    t2d[target_ids] = True
    return d2t, t2d


def draft_to_target(d2t: torch.Tensor) -> torch.Tensor:
    """Target ids int64 [D] that `d2t` encodes; the inverse of `vocab_maps`."""
    return d2t + torch.arange(d2t.numel(), dtype=d2t.dtype, device=d2t.device)


def count_answer_tokens(
    samples: Iterable[tuple[torch.Tensor, torch.Tensor]], vocab_size: int
) -> torch.Tensor:
    """Counts of the answer tokens that the target processed, float64 [V], over (input_ids [T+1],
    loss_mask [T+1]) pairs."""
    counts = torch.zeros(vocab_size, dtype=torch.float64)
    for input_ids, loss_mask in samples:
        answer = input_ids[:-1][loss_mask[:-1].bool()].long()
        counts += torch.bincount(answer, minlength=vocab_size).to(torch.float64)
    return counts


def answer_token_weights(head: TargetHead, samples: Sequence[Mapping[str, torch.Tensor]]) -> torch.Tensor:
    """Counts of answer tokens plus the target's probability mass at every answer position; float64 [V].

    The mass ranks likely tokens that do not occur in the few first samples. Samples carry `input_ids`
    [T+1], `loss_mask` [T+1] and `last_hidden_states` [M, H] (pre-norm) of their M counted rows.
    """
    weights = count_answer_tokens(((s["input_ids"], s["loss_mask"]) for s in samples), head.vocab_size)
    output = head.output()
    for sample in samples:
        in_answer, counted = sample["loss_mask"][:-1].bool(), counted_rows(sample["loss_mask"])
        hidden = sample["last_hidden_states"][in_answer[counted]].float()
        weights += output(hidden).softmax(-1).sum(0).to(torch.float64)
    return weights
