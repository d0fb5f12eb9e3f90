"""The EAGLE-3 draft model: one decoder layer over fused target states (arXiv 2503.01840, section 3.1).

Row i takes the feature of token i and the embedding of token i+1 and predicts token i+2. The
feature is `fc` of three auxiliary target states where the target has processed token i, and the
draft's own previous output (before the final norm) where it has not.

Parameter names are those of an EAGLE-3 checkpoint for SGLang, so `state_dict()` is the export.
The target's embedding, final norm and lm_head rows are frozen and not part of the state dict.
Legend: B batch, L length, H hidden, V target vocabulary, D draft vocabulary, N heads, d head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  (the name PyTorch's own documents use)

from paceline.methods.eagle3.batch import Eagle3Batch
from paceline.methods.eagle3.loss import training_time_test
from paceline.methods.eagle3.vocab import draft_to_target
from paceline.methods.layers import MLP, RMSNorm, rotate
from paceline.methods.losses.settings import LossSection
from paceline.methods.method import LossSums
from paceline.methods.rope import Rope
from paceline.precision import is_autocasting
from paceline.target.head import OutputLayer, TargetHead


@dataclass(frozen=True)
class Eagle3Config:
    """Sizes of a draft: the target's, with one layer and a reduced vocabulary."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    aux_layer_ids: tuple[int, ...]  # the target's states that are fused
    rope_scaling: Mapping[str, Any] | None = None  # see rope.py
    norm_before_fc: bool = False  # these four: see Eagle3Section
    fc_norm: bool = False
    norm_output: bool = False
    sliding_window: int | None = None
    mask_token_id: int | None = None  # of P-EAGLE (parallel.py): the token that deeper steps are fed


class Attention(nn.Module):
    """Projections only: training and decoding need different masks and bring their own softmax."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.rope = Rope.of(config)
        width = 2 * config.hidden_size
        self.q_proj = nn.Linear(width, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)

    def query(self, inputs: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotated queries [B, N, L, d] of `inputs` [B, L, 2H] at `positions` [B, L]."""
        states = self.q_proj(inputs).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        return rotate(states, self.rope.tables(positions))

    def key_value(self, inputs: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotated keys and values, each [B, N_kv, L, d]."""
        keys = self.k_proj(inputs).unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2)
        values = self.v_proj(inputs).unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2)
        return rotate(keys, self.rope.tables(positions)), values

    def output(self, mixed: torch.Tensor) -> torch.Tensor:
        """[B, N, L, d] to [B, L, H]."""
        return self.o_proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class FrozenLinear(nn.Module):
    """A linear map that is in the state dict and is not trained: no gradient of it is computed."""

    weight: torch.Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(outputs, inputs))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return F.linear(states, self.weight)


class Midlayer(nn.Module):
    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def inputs(self, embedding: torch.Tensor, feature: torch.Tensor) -> torch.Tensor:
        """[B, L, 2H]: what the attention reads. The embedding comes first, as in every checkpoint.

        It has the dtype of `feature`, so that under autocast the three projections share one tensor.
        """
        normed = self.input_layernorm(embedding, feature.dtype)
        return torch.cat((normed, self.hidden_norm(feature)), dim=-1)

    def finish(self, feature: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """Output [B, L, H] from the residual `feature` and the attention's `mixed` [B, N, L, d]."""
        hidden = feature + self.self_attn.output(mixed)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))  # type: ignore[no-any-return]


class Eagle3Draft(nn.Module):
    """Trainable float32 weights, and the frozen tensors that they are trained against.

    A call with a batch gives the loss, so wrappers of modules (data parallel, sharding, compilation) apply
    to training. Buffers in the state dict: `d2t` int64 [D], `t2d` bool [V]. The target's tensors are not in
    it: embedding, output over the draft vocabulary (`target_output`) and over the target's own
    (`target_choices`). Build it with `Eagle3Method`.
    """

    d2t: torch.Tensor
    t2d: torch.Tensor
    target_output: OutputLayer
    target_choices: OutputLayer
    own_embedding: torch.Tensor | None
    mask_ids: torch.Tensor  # int64 [1]

    def __init__(
        self,
        config: Eagle3Config,
        recompute: bool = False,
        loss: LossSection | None = None,
        train_lm_head: bool = True,
    ) -> None:
        super().__init__()
        self.config, self.recompute, self.loss = config, recompute, loss or LossSection()
        hidden, vocab, reduced = config.hidden_size, config.vocab_size, config.draft_vocab_size
        states = len(config.aux_layer_ids)
        self.input_norm = RMSNorm(states * hidden, config.rms_norm_eps) if config.norm_before_fc else None
        norms = (RMSNorm(hidden, config.rms_norm_eps) for _ in range(states if config.fc_norm else 0))
        self.fc_norm = nn.ModuleList(norms)
        self.fc = nn.Linear(states * hidden, hidden, bias=False)
        is_parallel = config.mask_token_id is not None
        self.mask_hidden = nn.Parameter(torch.zeros(1, states * hidden)) if is_parallel else None
        self.midlayer = Midlayer(config)
        self.norm = RMSNorm(hidden, config.rms_norm_eps)
        self.lm_head = (
            nn.Linear(hidden, reduced, bias=False) if train_lm_head else FrozenLinear(hidden, reduced)
        )
        self.register_buffer("d2t", torch.zeros(reduced, dtype=torch.int64))
        self.register_buffer("t2d", torch.zeros(vocab, dtype=torch.bool))
        self.register_buffer("own_embedding", None, persistent=False)
        self.register_buffer("mask_ids", torch.tensor([config.mask_token_id or 0]), persistent=False)

    def forward(self, batch: Eagle3Batch) -> LossSums:
        """The training loss, unrolled over the draft's own outputs."""
        return training_time_test(self, batch, self.recompute)

    def attach_target(self, head: TargetHead) -> None:
        """Take the frozen tensors of the target. Call it once the draft vocabulary is known."""
        self.target_output, self.target_choices = head.output(self.target_ids()), head.output()
        # A target that ties it to lm_head keeps one copy, on every device.
        self.own_embedding = None if head.lm_head is head.embed_tokens else head.embed_tokens

    @property
    def embed_tokens(self) -> torch.Tensor:
        """Frozen target embedding, target dtype [V, H]."""
        return self.target_choices.rows if self.own_embedding is None else self.own_embedding

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Frozen target embedding of `token_ids` [...] -> target dtype [..., H]."""
        return F.embedding(token_ids, self.embed_tokens)

    def fuse(self, states: torch.Tensor) -> torch.Tensor:
        """The feature [..., H] of auxiliary target states [..., 3H]."""
        if not is_autocasting(states.device):
            states = states.to(self.fc.weight.dtype)
        return self.fc(self.normed(states))  # type: ignore[no-any-return]

    def normed(self, states: torch.Tensor) -> torch.Tensor:
        """What `fc` reads of auxiliary target states [..., 3H]."""
        if self.input_norm is not None:
            return self.input_norm(states)  # type: ignore[no-any-return]
        if self.fc_norm:
            parts = states.chunk(len(self.fc_norm), dim=-1)
            return torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        return states

    def deeper_inputs(
        self, output: torch.Tensor, token_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the next step reads: a feature and a token, by the step's `output` [A, H] and the tokens that
        follow, int64 [A]; or, in parallel, one row that is the same for all anchors, [1, H] and [1]."""
        if self.mask_hidden is not None:
            return self.fuse(self.mask_hidden), self.mask_ids
        return self.norm(output) if self.config.norm_output else output, token_ids

    def target_ids(self) -> torch.Tensor:
        """Target token id of every draft token id, int64 [D]."""
        return draft_to_target(self.d2t)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Draft logits [..., D] of layer outputs [..., H]."""
        return self.lm_head(self.norm(hidden))  # type: ignore[no-any-return]
