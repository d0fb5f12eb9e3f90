"""Drafting with an EAGLE-3 draft: a chain of tokens per call, with a key-value cache.

The cache holds one row per token that the target has processed, made from the target's own states. Rows made
from the draft's outputs are dropped after every chain, because verification replaces them.
Nothing here needs to be exact: a wrong proposal costs time, never correctness.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F  # noqa: N812  (the name PyTorch's own documents use)

from paceline.methods.drafter import Choose
from paceline.methods.eagle3.model import Eagle3Draft
from paceline.methods.guesses import ROOT, Guesses
from paceline.methods.layers import rotate
from paceline.product import Weight


class Eagle3Decoder:
    """Proposes tokens for one sequence at a time, with a copy of the draft's weights in `dtype`."""

    def __init__(self, draft: Eagle3Draft, dtype: torch.dtype = torch.bfloat16) -> None:
        attention, layer = draft.midlayer.self_attn, draft.midlayer
        self.config, self.dtype = draft.config, dtype
        self.layers, self.device = draft.config.aux_layer_ids, draft.fc.weight.device
        self.heads, self.kv_heads, self.head_dim = attention.heads, attention.kv_heads, attention.head_dim
        self.rope = attention.rope

        def copied(*parts: torch.Tensor) -> torch.Tensor:
            return torch.cat([part.detach() for part in parts]).to(dtype)

        self.fc, self.lm_head = Weight(copied(draft.fc.weight)), Weight(copied(draft.lm_head.weight))
        self.norm = copied(draft.norm.weight)
        self.qkv = Weight(copied(attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight))
        self.out = Weight(copied(attention.o_proj.weight))
        self.gate_up = Weight(copied(layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight))
        self.down = Weight(copied(layer.mlp.down_proj.weight))
        self.embedding_norm, self.feature_norm, self.post_norm = (
            copied(layer.input_layernorm.weight),
            copied(layer.hidden_norm.weight),
            copied(layer.post_attention_layernorm.weight),
        )
        self.joint_norm = None if draft.input_norm is None else copied(draft.input_norm.weight)
        self.own_norms = [copied(norm.get_parameter("weight")) for norm in draft.fc_norm]
        self.embed_tokens = draft.embed_tokens.to(dtype)
        self.target_ids = draft.target_ids()
        self.length = 0

    def start(self, capacity: int) -> None:
        """Begin a sequence of at most `capacity` rows, drafted ones included."""
        shape = (self.kv_heads, capacity, self.head_dim)
        self.keys, self.values = (torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2))
        rows = torch.arange(capacity, device=self.device)
        self.cos, self.sin = self.rope.tables(rows)
        self.places = rows.clone()  # the position of each row of the cache
        self.length = 0

    @torch.inference_mode()
    def propose(
        self, aux: torch.Tensor, next_ids: torch.Tensor, count: int, choose: Choose
    ) -> tuple[list[int], list[torch.Tensor | None]]:
        """Append the rows that the target has newly processed, then draft `count` tokens.

        `aux` [n, 3H] are the new rows' states and `next_ids` int64 [n] the token after each row; the
        last one is the newest token of the sequence. Returns target token ids and, per token, its
        distribution over the draft vocabulary. The caller must leave enough capacity.
        """
        feature = self._layer(self._fused(aux), next_ids)[-1:]
        real_rows = self.length
        tokens: list[int] = []
        distributions: list[torch.Tensor | None] = []
        while True:
            draft_id, distribution = choose(self.lm_head(self._rms(feature, self.norm))[0])
            tokens.append(int(self.target_ids[draft_id]))
            distributions.append(distribution)
            if len(tokens) == count:
                self.length = real_rows
                return tokens, distributions
            feature = self._layer(self._fed_back(feature), self.target_ids[draft_id : draft_id + 1])

    @torch.inference_mode()
    def propose_tree(
        self, aux: torch.Tensor, next_ids: torch.Tensor, num_tokens: int, branching: int, depth: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """As `propose`, but the `num_tokens` likeliest guesses of a tree: (tokens, parent rows).

        Each level is one pass over the `branching` likeliest guesses of the level before; likelihood is
        the product of the draft's own probabilities along the path (EAGLE-2, arXiv 2406.16858). Row 0
        is the newest token, guess i is row i + 1; a parent comes before its children.
        """
        features = self._layer(self._fused(aux), next_ids)[-1:]
        real_rows = self.length
        guesses = Guesses()
        lines: list[list[int]] = [[]]  # for each feature's row, the drafted rows that it may attend to
        frontier, drafted = [ROOT], 0
        for level in range(depth):
            logits = self.lm_head(self._rms(features, self.norm)).float()
            likeliest = guesses.grow(logits, frontier, branching, level)
            if level == depth - 1:
                break
            places = [frontier.index(parent) for parent in guesses.parents(likeliest)]
            frontier = likeliest
            lines = [[*lines[place], drafted + i] for i, place in enumerate(places)]
            size = len(frontier), real_rows + drafted + len(frontier)
            mask = torch.zeros(size, dtype=torch.bool, device=self.device)
            mask[:, :real_rows] = True
            for i, line in enumerate(lines):
                mask[i, [real_rows + row for row in line]] = True
            ids = self.target_ids[guesses.draft_ids(frontier)]
            position = torch.full((len(frontier),), real_rows + level, device=self.device)
            features = self._layer(self._fed_back(features[places]), ids, position, mask)
            drafted += len(frontier)
        self.length = real_rows
        draft_ids, parents = guesses.best(num_tokens)
        return tuple(self.target_ids[draft_ids].tolist()), parents

    def _fused(self, aux: torch.Tensor) -> torch.Tensor:
        """The features [n, H] of the target's states [n, 3H]."""
        states = aux.to(self.dtype)
        if self.joint_norm is not None:
            states = self._rms(states, self.joint_norm)
        if self.own_norms:
            parts = zip(states.chunk(len(self.own_norms), dim=-1), self.own_norms, strict=True)
            states = torch.cat([self._rms(part, weight) for part, weight in parts], dim=-1)
        return self.fc(states)

    def _fed_back(self, output: torch.Tensor) -> torch.Tensor:
        return self._rms(output, self.norm) if self.config.norm_output else output

    def _rms(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden, (hidden.shape[-1],), weight, self.config.rms_norm_eps)

    def _layer(
        self,
        feature: torch.Tensor,
        token_ids: torch.Tensor,
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Output [n, H] of rows with `feature` [n, H] and the token after each, appended to the cache.

        Without `positions` [n] and `mask` [n, rows] the rows follow each other.
        """
        new, rows = feature.shape[0], slice(self.length, self.length + feature.shape[0])
        turn = positions
        if turn is None:
            turn = torch.arange(self.length, self.length + new, device=self.device)
        embedding = F.embedding(token_ids, self.embed_tokens)
        inputs = torch.cat(
            (self._rms(embedding, self.embedding_norm), self._rms(feature, self.feature_norm)), dim=-1
        )
        qkv = self.qkv(inputs).view(new, -1, self.head_dim).transpose(0, 1).unsqueeze(0)
        rotated = rotate(qkv[:, : self.heads + self.kv_heads], (self.cos[None, turn], self.sin[None, turn]))
        self.keys[:, rows] = rotated[0, self.heads :]
        self.values[:, rows] = qkv[0, self.heads + self.kv_heads :]
        self.length += new
        if mask is None and (new > 1 or self.config.sliding_window):
            mask = torch.ones(new, self.length, dtype=torch.bool, device=self.device).tril(self.length - new)
        if mask is not None and self.config.sliding_window:
            self.places[rows] = turn
            mask &= self.places[: self.length] > turn[:, None] - self.config.sliding_window
        mixed = F.scaled_dot_product_attention(
            rotated[:, : self.heads],
            self.keys[None, :, : self.length],
            self.values[None, :, : self.length],
            attn_mask=mask,
            enable_gqa=True,
        )
        hidden = feature + self.out(mixed[0].transpose(0, 1).reshape(new, -1))
        gate, up = self.gate_up(self._rms(hidden, self.post_norm)).chunk(2, dim=-1)
        return hidden + self.down(F.silu(gate) * up)
