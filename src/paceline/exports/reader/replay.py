"""What the reader is given, and what it finds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ServedTarget:
    """The facts and the tensors of the target that a server has at hand when it loads a draft."""

    hidden_size: int
    num_hidden_layers: int
    max_positions: int | None
    embed_tokens: torch.Tensor  # [V, H]
    lm_head: torch.Tensor  # [V, H]


@dataclass(frozen=True)
class Chain:
    """The trainer's decoder after the first `rows` rows: logits float32 [n, D] and n guessed target ids."""

    rows: int
    logits: torch.Tensor
    guesses: tuple[int, ...]


@dataclass(frozen=True)
class Replay:
    """A dumped sequence: T processed tokens, and the token after the last of them.

    `states`: [T, H] by layer id (k: after k decoder blocks), more layers than the draft reads.
    """

    tokens: torch.Tensor  # int64 [T+1]
    states: Mapping[int, torch.Tensor]
    chains: tuple[Chain, ...]


@dataclass(frozen=True)
class Verdict:
    """`problems`: one sentence each; none: the server drafts as the trainer's decoder does.

    `guesses`: how many were compared; `error`: the largest relative error of their logits.
    """

    problems: tuple[str, ...]
    guesses: int = 0
    error: float = 0.0
