"""The arithmetic of a served EAGLE-3 draft, from what the reader found, in float32.

Legend: n rows, F width of the fused target states, H hidden size, N heads, d head_dim.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch.nn import functional as F  # noqa: N812  (the name PyTorch's own documents use)

from paceline.exports.reader.check import Reader
from paceline.exports.reader.reading import Draft, read_draft
from paceline.exports.reader.replay import Replay
from paceline.exports.reader.rope import turned
from paceline.exports.reader.rules import RULES

LAYER = "layers.0."


def readers(server: str) -> list[Reader]:
    """Those that load the EAGLE-3 folders of `server`, a key of RULES."""
    return [Reader(rules.reader, partial(read_draft, rules=rules), chain_logits) for rules in RULES[server]]


def chain_logits(draft: Draft, replay: Replay, rows: int, guesses: tuple[int, ...]) -> torch.Tensor:
    """Logits [len(guesses), D] of the guesses after the first `rows` rows.

    Every guess after the first follows the ones before it in `guesses`, or, in parallel, mask rows.
    """
    states = [replay.states[layer][:rows].float() for layer in draft.layers]
    features = _fused(draft, torch.cat(states, dim=-1))
    tokens = replay.tokens[1 : rows + 1]
    logits = []
    for guess in guesses:
        output = _layer(draft, features, tokens)[-1:]
        normed = _rms(draft, output, "norm.weight")
        logits.append(normed @ draft.weights["lm_head.weight"].T)
        following, read = normed if draft.feedback_normed else output, guess
        if draft.mask is not None:
            following, read = _fused(draft, draft.weights["mask_hidden"].view(1, -1)), draft.mask
        features = torch.cat((features, following))
        tokens = torch.cat((tokens, torch.tensor([read])))
    return torch.cat(logits)


def _fused(draft: Draft, states: torch.Tensor) -> torch.Tensor:
    """Features [n, H] of the fused target states [n, F]."""
    if "fc_norm.0.weight" in draft.weights:
        parts = enumerate(states.chunk(len(draft.layers), dim=-1))
        states = torch.cat([_rms(draft, part, f"fc_norm.{n}.weight") for n, part in parts], dim=-1)
    if "input_norm.weight" in draft.weights:
        states = _rms(draft, states, "input_norm.weight")
    return states @ draft.weights["fc.weight"].T


def _rms(draft: Draft, states: torch.Tensor, name: str) -> torch.Tensor:
    scale = (states.square().mean(-1, keepdim=True) + draft.eps).rsqrt()
    return states * scale * draft.weights[name]


def _layer(draft: Draft, features: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Output [n, H] of the decoder layer over `features` [n, H] and the token after each row."""
    weights, rows = draft.weights, features.shape[0]
    embedded = _rms(draft, weights["embed_tokens.weight"][tokens].float(), f"{LAYER}input_layernorm.weight")
    normed = _rms(draft, features, f"{LAYER}hidden_norm.weight")
    both = torch.cat((embedded, normed), dim=-1)

    def heads(name: str, count: int) -> torch.Tensor:
        projected = both @ weights[f"{LAYER}self_attn.{name}_proj.weight"].T
        return projected.view(rows, count, draft.head_dim).transpose(0, 1)

    query, key = (
        turned(heads(name, count), draft.angles, draft.sharpness)
        for name, count in (("q", draft.heads), ("k", draft.kv_heads))
    )
    groups = draft.heads // draft.kv_heads
    key, value = (part.repeat_interleave(groups, 0) for part in (key, heads("v", draft.kv_heads)))
    scores = query @ key.transpose(1, 2) / math.sqrt(draft.head_dim)
    unseen = torch.ones(rows, rows, dtype=torch.bool).triu(1)
    if draft.window is not None:
        unseen |= torch.ones(rows, rows, dtype=torch.bool).tril(-draft.window)
    mixed = scores.masked_fill(unseen, float("-inf")).softmax(-1) @ value
    attended = mixed.transpose(0, 1).reshape(rows, -1) @ weights[f"{LAYER}self_attn.o_proj.weight"].T
    hidden = (normed if draft.residual_normed else features) + attended
    inner = _rms(draft, hidden, f"{LAYER}post_attention_layernorm.weight")
    gate = F.silu(inner @ weights[f"{LAYER}mlp.gate_proj.weight"].T)
    up = inner @ weights[f"{LAYER}mlp.up_proj.weight"].T
    return hidden + (gate * up) @ weights[f"{LAYER}mlp.down_proj.weight"].T
