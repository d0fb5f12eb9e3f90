"""The DFlash backbone (arXiv 2602.06036): a few decoder layers that guess a block of tokens in one pass.

A block holds the newest token of the text (the anchor) and mask tokens. Its places attend to each other and
to the context: keys and values that every layer makes of the target's fused states, which are `hidden_norm`
of `fc` of several states side by side. The layers are those of Qwen 3, with norms on queries and keys.

Parameter names are the servers', so `state_dict()` is the export. The target's embedding and lm_head are
frozen and not part of the state dict. Legend: R rows, A blocks, B places of a block, D guesses of a block,
L length, H hidden, V vocabulary, N heads, d head_dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  (the name PyTorch's own documents use)

from paceline.methods.dflash.attention import Attend, KeyValue
from paceline.methods.dflash.batch import DFlashBatch
from paceline.methods.dflash.config import DFlashConfig
from paceline.methods.dflash.heads.head import Head
from paceline.methods.dflash.loss import block_loss
from paceline.methods.dflash.settings import BlockSection
from paceline.methods.layers import MLP, RMSNorm, rotate
from paceline.methods.method import LossSums
from paceline.methods.rope import Rope
from paceline.precision import is_autocasting
from paceline.target.head import OutputLayer, TargetHead

Tables = tuple[torch.Tensor, torch.Tensor]


class Attention(nn.Module):
    """Projections, norms and rotation; the softmax is `Attend`'s (attention.py)."""

    def __init__(self, config: DFlashConfig) -> None:
        super().__init__()
        hidden, self.head_dim = config.hidden_size, config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(hidden, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, hidden, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def query(self, inputs: torch.Tensor, tables: Tables) -> torch.Tensor:
        """Normed and rotated queries [1, N, L, d] of `inputs` [1, L, H]."""
        states = self.q_proj(inputs).unflatten(-1, (self.heads, self.head_dim))
        return rotate(self.q_norm(states).transpose(1, 2), tables)

    def key_value(self, inputs: torch.Tensor, tables: Tables) -> KeyValue:
        """Normed and rotated keys, and values, each [1, N_kv, L, d]."""
        keys = self.k_proj(inputs).unflatten(-1, (self.kv_heads, self.head_dim))
        values = self.v_proj(inputs).unflatten(-1, (self.kv_heads, self.head_dim))
        return rotate(self.k_norm(keys).transpose(1, 2), tables), values.transpose(1, 2)

    def forward(
        self, inputs: torch.Tensor, tables: Tables, context: KeyValue, attend: Attend
    ) -> torch.Tensor:
        """[1, L, H] of the blocks' `inputs` [1, L, H]."""
        mixed = attend(self.query(inputs, tables), context, self.key_value(inputs, tables))
        return self.o_proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """`attention_conv`, `mlp_conv`: what a head puts around the two sublayers, or None."""

    def __init__(self, config: DFlashConfig, convolution: Callable[[], nn.Module | None]) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)
        self.attention_conv, self.mlp_conv = convolution(), convolution()

    def forward(
        self, hidden: torch.Tensor, tables: Tables, context: KeyValue, attend: Attend
    ) -> torch.Tensor:
        """[1, L, H] of `hidden` [1, L, H], whole blocks after each other."""
        normed = self.input_layernorm(hidden)
        hidden = hidden + _around(
            self.attention_conv, normed, lambda inputs: self.self_attn(inputs, tables, context, attend)
        )
        return hidden + _around(self.mlp_conv, self.post_attention_layernorm(hidden), self.mlp)


def _around(
    convolution: nn.Module | None, inputs: torch.Tensor, sublayer: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    return sublayer(inputs) if convolution is None else convolution(inputs, sublayer)


class DFlashDraft(nn.Module):
    """Trainable float32 weights, and the frozen tensors of the target that they are trained with.

    A call with a batch gives the loss. The head's modules are registered under their own names, and `head` is
    an object that uses them. Build it with `DFlashMethod`.
    """

    target_output: OutputLayer
    own_embedding: torch.Tensor | None

    def __init__(self, config: DFlashConfig, head: Head, section: BlockSection) -> None:
        super().__init__()
        self.config, self.head, self.section = config, head, section
        self.rope = Rope.of(config)
        self.fc = nn.Linear(len(config.aux_layer_ids) * config.hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.layers = nn.ModuleList(Layer(config, head.convolution) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        for name, module in head.parts().items():
            self.add_module(name, module)
        self.register_buffer("own_embedding", None, persistent=False)

    def forward(self, batch: DFlashBatch) -> LossSums:
        """The training loss over all blocks of the batch."""
        return block_loss(self, batch)

    def attach_target(self, head: TargetHead) -> None:
        """Take the frozen tensors of the target."""
        self.target_output = head.output()
        # A target that ties it to lm_head keeps one copy, on every device.
        self.own_embedding = None if head.lm_head is head.embed_tokens else head.embed_tokens

    @property
    def embed_tokens(self) -> torch.Tensor:
        """Frozen target embedding, target dtype [V, H]."""
        return self.target_output.rows if self.own_embedding is None else self.own_embedding

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Frozen target embedding of `token_ids` [...] -> [..., H], in the dtype of the weights."""
        return F.embedding(token_ids, self.embed_tokens).to(self.norm.weight.dtype)

    def context(self, states: torch.Tensor, positions: torch.Tensor) -> list[KeyValue]:
        """Each layer's keys and values [1, N_kv, R, d] of `states` [R, n * H] at `positions` int64 [R]."""
        if not is_autocasting(states.device):
            states = states.to(self.fc.weight.dtype)
        fused, tables = self.hidden_norm(self.fc(states))[None], self.rope.tables(positions[None])
        return [layer.self_attn.key_value(fused, tables) for layer in self._layers()]

    def places(
        self, tokens: torch.Tensor, starts: torch.Tensor, context: list[KeyValue], attend: Attend
    ) -> torch.Tensor:
        """Normed states [A, D, H] of the places that guess, for blocks whose anchors are the `tokens` int64
        [A] at `starts` int64 [A]."""
        config = self.config
        fed = torch.full_like(tokens, config.mask_token_id)[:, None].repeat(1, config.block_size)
        fed[:, 0] = tokens
        positions = starts[:, None] + torch.arange(config.block_size, device=starts.device)
        tables = self.rope.tables(positions.view(1, -1))
        hidden = self.embed(fed).view(1, -1, config.hidden_size)
        for layer, before in zip(self._layers(), context, strict=True):
            hidden = layer(hidden, tables, before, attend)
        hidden = hidden.view(*fed.shape, config.hidden_size)[:, config.block_size - config.depths :]
        return self.norm(hidden)  # type: ignore[no-any-return]

    def base_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] of normed states [..., H], by the target's lm_head."""
        rows = self.target_output.rows
        return F.linear(hidden.to(rows.dtype), rows)

    def _layers(self) -> list[Layer]:
        return [layer for layer in self.layers if isinstance(layer, Layer)]
