"""The arithmetic of a served block draft, from what the reader found, in float32.

Legend: n rows of the context, B places of a block, H hidden size, N heads, d head_dim, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F  # noqa: N812  (the name PyTorch's own documents use)

from paceline.exports.reader.block_heads import HEADS, convolved
from paceline.exports.reader.block_reading import BlockDraft, BlockRules, read_block_draft
from paceline.exports.reader.check import Reader
from paceline.exports.reader.replay import Replay
from paceline.exports.reader.rope import turned

_VLLM = BlockRules(
    "vLLM",
    {"dflash": "DFlashDraftModel", "dspark": "Qwen3DSparkModel", "dflash2": "DFlash2DraftModel"},
    causal_field=True,
    block_size_nested_first=False,
)
_SGLANG = BlockRules(
    "SGLang",
    {**_VLLM.architectures, "domino": "DFlashDraftModel"},
    causal_field=False,
    block_size_nested_first=True,
)
BLOCK_RULES = {"vllm": (_VLLM,), "sglang": (_SGLANG,), "hf": (_SGLANG, _VLLM)}


def block_readers(server: str, method: str) -> list[Reader]:
    """Those that load the folders of `server`, a key of BLOCK_RULES, with drafts of `method`."""
    return [
        Reader(rules.reader, partial(read_block_draft, rules=rules, method=method), chain_logits)
        for rules in BLOCK_RULES[server]
        if method in rules.architectures
    ]


def chain_logits(draft: BlockDraft, replay: Replay, rows: int, guesses: tuple[int, ...]) -> torch.Tensor:
    """Logits [len(guesses), V] of the guesses after the first `rows` rows, from one pass over the block.

    Fewer, if the block has not as many places.
    """
    first = 0 if draft.from_anchor else 1
    guesses = guesses[: draft.block_size - first]
    fused = torch.cat([replay.states[layer][:rows].float() for layer in draft.layers], dim=-1)
    context = _rms(draft, fused @ draft.weights["fc.weight"].T, "hidden_norm.weight")
    tokens = torch.tensor([int(replay.tokens[rows])] + [draft.mask_token_id] * (draft.block_size - 1))
    hidden = draft.target.embed_tokens[tokens].float()
    for number in range(draft.num_layers):
        hidden = _layer(draft, f"layers.{number}.", hidden, context)
    states = _rms(draft, hidden, "norm.weight")[first : first + len(guesses)]
    base = states @ draft.target.lm_head.float().T
    before = torch.tensor([int(replay.tokens[rows]), *guesses[:-1]])
    return HEADS[draft.method](draft, states, base, before) if draft.method in HEADS else base


def _rms(draft: BlockDraft, states: torch.Tensor, name: str) -> torch.Tensor:
    scale = (states.square().mean(-1, keepdim=True) + draft.eps).rsqrt()
    return states * scale * draft.weights[name]


def _layer(draft: BlockDraft, layer: str, hidden: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """Output [B, H] of the block's places after `context` [n, H]."""
    weights = draft.weights

    def mlp(inputs: torch.Tensor) -> torch.Tensor:
        gate = F.silu(inputs @ weights[f"{layer}mlp.gate_proj.weight"].T)
        up = inputs @ weights[f"{layer}mlp.up_proj.weight"].T
        return (gate * up) @ weights[f"{layer}mlp.down_proj.weight"].T

    def around(
        name: str, inputs: torch.Tensor, sublayer: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        if draft.method != "dflash2":
            return sublayer(inputs)
        mixed = convolved(draft, f"{layer}{name}.", inputs, made_of=inputs, side=0)
        return convolved(draft, f"{layer}{name}.", sublayer(mixed), made_of=inputs, side=1)

    normed = _rms(draft, hidden, f"{layer}input_layernorm.weight")
    hidden = hidden + around(
        "attention_conv", normed, lambda inputs: _attention(draft, layer, inputs, context)
    )
    normed = _rms(draft, hidden, f"{layer}post_attention_layernorm.weight")
    return hidden + around("mlp_conv", normed, mlp)


def _attention(draft: BlockDraft, layer: str, block: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    weights, rows = draft.weights, context.shape[0]
    both = torch.cat((context, block))

    def heads(name: str, inputs: torch.Tensor, count: int) -> torch.Tensor:
        projected = inputs @ weights[f"{layer}self_attn.{name}_proj.weight"].T
        return projected.view(inputs.shape[0], count, draft.head_dim).transpose(0, 1)

    query = _rms(draft, heads("q", block, draft.heads), f"{layer}self_attn.q_norm.weight")
    key = _rms(draft, heads("k", both, draft.kv_heads), f"{layer}self_attn.k_norm.weight")
    query = turned(query, draft.angles, draft.sharpness, first=rows)
    key = turned(key, draft.angles, draft.sharpness)
    groups = draft.heads // draft.kv_heads
    key, value = (part.repeat_interleave(groups, 0) for part in (key, heads("v", both, draft.kv_heads)))
    scores = query @ key.transpose(1, 2) / math.sqrt(draft.head_dim)
    if draft.causal:
        later = torch.ones(block.shape[0], both.shape[0], dtype=torch.bool).triu(rows + 1)
        scores = scores.masked_fill(later, float("-inf"))
    mixed = (scores.softmax(-1) @ value).transpose(0, 1).reshape(block.shape[0], -1)
    return mixed @ weights[f"{layer}self_attn.o_proj.weight"].T
