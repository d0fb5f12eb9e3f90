"""Drafting with an EAGLE-3 draft: a chain of tokens per call, with a key-value cache.

The cache holds one row per token the target has processed, made from the target's own states; rows
made from the draft's outputs are dropped after every chain, as verification replaces them.
Nothing here needs to be exact: a wrong proposal costs time, never correctness.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F  # noqa: N812  (the name PyTorch's own documents use)

from paceline.methods.eagle3.model import Eagle3Draft, rope_tables, rotate

# Draft logits [D] in, (draft token id, its distribution float32 [D] or None when greedy) out.
Choose = Callable[[torch.Tensor], tuple[int, torch.Tensor | None]]


class Eagle3Decoder:
    """Proposes for one sequence at a time. A copy of the draft's weights is taken in `dtype`."""

    def __init__(self, draft: Eagle3Draft, dtype: torch.dtype = torch.bfloat16) -> None:
        attention, layer = draft.midlayer.self_attn, draft.midlayer
        self.config, self.dtype = draft.config, dtype
        self.heads, self.kv_heads, self.head_dim = attention.heads, attention.kv_heads, attention.head_dim

        def copied(*parts: torch.Tensor) -> torch.Tensor:
            return torch.cat([part.detach() for part in parts]).to(dtype)

        self.fc, self.lm_head, self.norm = (
            copied(draft.fc.weight),
            copied(draft.lm_head.weight),
            copied(draft.norm.weight),
        )
        self.qkv = copied(attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
        self.out = copied(attention.o_proj.weight)
        self.gate_up = copied(layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight)
        self.down = copied(layer.mlp.down_proj.weight)
        self.embedding_norm, self.feature_norm, self.post_norm = (
            copied(layer.input_layernorm.weight),
            copied(layer.hidden_norm.weight),
            copied(layer.post_attention_layernorm.weight),
        )
        self.embed_tokens = draft.embed_tokens.to(dtype)
        self.target_ids = draft.target_ids()
        self.length = 0

    def start(self, capacity: int) -> None:
        """Begin a sequence of at most `capacity` rows, drafted ones included."""
        shape = (self.kv_heads, capacity, self.head_dim)
        self.keys, self.values = torch.zeros(shape, dtype=self.dtype), torch.zeros(shape, dtype=self.dtype)
        self.cos, self.sin = rope_tables(torch.arange(capacity), self.head_dim, self.config.rope_theta)
        self.length = 0

    @torch.inference_mode()
    def propose(
        self, aux: torch.Tensor, next_ids: torch.Tensor, count: int, choose: Choose
    ) -> tuple[list[int], list[torch.Tensor | None]]:
        """Draft `count` tokens after taking in what the target has newly processed.

        `aux` [n, 3H] are the new rows' states and `next_ids` int64 [n] the token after each row; the
        last one is the newest token of the sequence. Returns target token ids and, per token, its
        distribution over the draft vocabulary. The caller sees to it that capacity suffices.
        """
        feature = self._layer(F.linear(aux.to(self.dtype), self.fc), next_ids)[-1:]
        real_rows = self.length
        tokens: list[int] = []
        distributions: list[torch.Tensor | None] = []
        while True:
            draft_id, distribution = choose(F.linear(self._rms(feature, self.norm), self.lm_head)[0])
            tokens.append(int(self.target_ids[draft_id]))
            distributions.append(distribution)
            if len(tokens) == count:
                self.length = real_rows
                return tokens, distributions
            feature = self._layer(feature, self.target_ids[draft_id : draft_id + 1])

    def _rms(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden, (hidden.shape[-1],), weight, self.config.rms_norm_eps)

    def _layer(self, feature: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """Output [n, H] of rows with `feature` [n, H] and the token after each, appended to the cache."""
        new, rows = feature.shape[0], slice(self.length, self.length + feature.shape[0])
        embedding = F.embedding(token_ids, self.embed_tokens)
        inputs = torch.cat(
            (self._rms(embedding, self.embedding_norm), self._rms(feature, self.feature_norm)), dim=-1
        )
        qkv = F.linear(inputs, self.qkv).view(new, -1, self.head_dim).transpose(0, 1).unsqueeze(0)
        rotated = rotate(qkv[:, : self.heads + self.kv_heads], (self.cos[None, rows], self.sin[None, rows]))
        self.keys[:, rows] = rotated[0, self.heads :]
        self.values[:, rows] = qkv[0, self.heads + self.kv_heads :]
        self.length += new
        mask = None
        if new > 1:
            mask = torch.ones(new, self.length, dtype=torch.bool).tril(self.length - new)
        mixed = F.scaled_dot_product_attention(
            rotated[:, : self.heads],
            self.keys[None, :, : self.length],
            self.values[None, :, : self.length],
            attn_mask=mask,
            enable_gqa=True,
        )
        hidden = feature + F.linear(mixed[0].transpose(0, 1).reshape(new, -1), self.out)
        gate, up = F.linear(self._rms(hidden, self.post_norm), self.gate_up).chunk(2, dim=-1)
        return hidden + F.linear(F.silu(gate) * up, self.down)
