"""What the heads of block drafts make of a place's state and the tokens before it, from what the reader
found.

Legend: k guesses, H hidden size, V vocabulary, r rank, B places of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.nn import functional as F  # noqa: N812  (the name PyTorch's own documents use)

from paceline.exports.reader.block_reading import BlockDraft

# States [k, H], the backbone's logits [k, V] and the tokens before each guess int64 [k] in, logits [k, V]
# out.
Head = Callable[[BlockDraft, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _markov(
    draft: BlockDraft,
    states: torch.Tensor,  # noqa: ARG001 (only the token before counts)
    base: torch.Tensor,
    before: torch.Tensor,
) -> torch.Tensor:
    return base + draft.weights["markov_head.markov_w1.weight"][before] @ (
        draft.weights["markov_head.markov_w2.weight"].T
    )


def _recurrent(
    draft: BlockDraft, states: torch.Tensor, base: torch.Tensor, before: torch.Tensor
) -> torch.Tensor:
    """The first guess is the backbone's own; the later ones know what a GRU has read."""
    weights = draft.weights
    memory = torch.zeros(int(draft.nested["gru_hidden_dim"]))
    result = base.clone()
    for place, token in enumerate(before.tolist()):
        read = weights["prefix_gru.weight_ih_l0"] @ draft.target.embed_tokens[token].float()
        reset_in, keep_in, new_in = read.chunk(3)
        reset_own, keep_own, new_own = (weights["prefix_gru.weight_hh_l0"] @ memory).chunk(3)
        keep = torch.sigmoid(keep_in + keep_own)
        new = torch.tanh(new_in + torch.sigmoid(reset_in + reset_own) * new_own)
        memory = (1 - keep) * new + keep * memory
        if place >= int(draft.nested["pure_draft_prefix_len"]):
            inner = F.silu(weights["embed_proj.0.weight"] @ torch.cat((states[place], memory)))
            result[place] += weights["embed_proj.2.weight"] @ inner
    return result


def _selector(
    draft: BlockDraft, states: torch.Tensor, base: torch.Tensor, before: torch.Tensor
) -> torch.Tensor:
    weights, result = draft.weights, torch.full_like(base, float("-inf"))
    for place, token in enumerate(before.tolist()):
        candidates = base[place].argsort(descending=True)[: int(draft.nested["selector_top_k"])]
        gate = weights["candidate_selector.hidden_projection.weight"] @ states[place]
        gate = gate * weights["candidate_selector.predecessor_codebook"][token]
        edges = weights["candidate_selector.successor_codebook"][candidates] @ gate
        result[place, candidates] = base[place, candidates] + edges
    return result


HEADS: Mapping[str, Head] = {"dspark": _markov, "domino": _recurrent, "dflash2": _selector}


def convolved(
    draft: BlockDraft, name: str, inputs: torch.Tensor, made_of: torch.Tensor, side: int
) -> torch.Tensor:
    """[B, H] of `inputs` [B, H] under the kernel number `side` (0: before the sublayer, 1: after it) of the
    convolution `name`, which is made of `made_of` [B, H]."""
    base = draft.weights[f"{name}base_kernel"][side]
    taps, hidden = base.shape
    groups = hidden // int(draft.nested["conv_group_size"])
    changes = (made_of @ draft.weights[f"{name}kernel_projection.weight"].T).view(-1, 2, taps, groups)
    result = torch.zeros_like(inputs)
    for place in range(inputs.shape[0]):
        for tap in range(min(taps, place + 1)):
            change = changes[place, side, tap].repeat_interleave(hidden // groups)
            result[place] += (base[tap] + change) * inputs[place - tap]
    return result
