"""A lean Llama forward that decodes one sequence: the fast `Verifier` of plain Llama targets.

Hugging Face's forward spends more time in Python than in arithmetic when a step has one to five
rows, which hides the gain of speculation. This one reads the same weights, fuses q/k/v and gate/up,
and keeps a cache of fixed capacity. Plain and speculative decoding both run on it.

Row invariance: attention reads the whole, masked cache, so no shape depends on how much is cached.
A `Weight` gives a row the same bits alone as among others. Plain and speculative decoding then agree
bit for bit where the library's products do; the report counts the prompts for which they did. float32
agrees to rounding.
Raises ConfigError for a target this forward does not compute exactly.

Legend: n new tokens, C capacity, H hidden, N heads, K key-value heads, G = N / K, d head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F  # noqa: N812  (the name PyTorch's own documents use)

from paceline.errors import ConfigError
from paceline.evaluation.tree import DraftTree
from paceline.evaluation.verifier import TargetStep, refuse_too_long
from paceline.precision import CPU
from paceline.product import Weight
from paceline.target.head import TargetHead
from paceline.target.plain_llama import why_not_plain_llama


@dataclass(frozen=True)
class _Layer:
    qkv: Weight
    out: Weight
    gate_up: Weight
    down: Weight
    input_norm: torch.Tensor
    post_norm: torch.Tensor


class LlamaTarget:
    """See `Verifier`. `truncate` forgets the newest tokens."""

    def __init__(
        self,
        head: TargetHead,
        aux_layer_ids: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device = CPU,
    ) -> None:
        _require_plain_llama(head)
        config = head.config
        self.head, self.aux_layer_ids, self.dtype, self.device = head, aux_layer_ids, dtype, device
        self.heads = int(config["num_attention_heads"])
        self.kv_heads = int(config.get("num_key_value_heads") or self.heads)
        self.head_dim = int(config.get("head_dim") or head.hidden_size // self.heads)
        self.embed_tokens = head.embed_tokens.to(device, dtype)
        is_tied = head.lm_head is head.embed_tokens
        self.lm_head = Weight(self.embed_tokens if is_tied else head.lm_head.to(device, dtype))
        self.norm = head.norm_weight.to(device, dtype)
        self.layers = [self._read_layer(index) for index in range(head.num_hidden_layers)]
        self.length = 0

    @classmethod
    def load(
        cls, folder: str | Path, aux_layer_ids: tuple[int, ...], dtype: torch.dtype = torch.bfloat16
    ) -> LlamaTarget:
        """Read a Hugging Face Llama folder. Raises ConfigError for another architecture."""
        return cls(TargetHead.load(folder), aux_layer_ids, dtype)

    def start(self, capacity: int) -> None:
        """Begin an empty sequence of at most `capacity` tokens. Raises ConfigError if that is too many."""
        refuse_too_long(capacity, self.head.config.get("max_position_embeddings"))
        # Whole blocks of 64 keep the vectorised softmax free of tails.
        self.capacity = -(-capacity // 64) * 64
        shape = (len(self.layers), self.kv_heads, self.capacity, self.head_dim)
        self.keys, self.values = (torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2))
        rows = torch.arange(self.capacity, device=self.device)
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=self.device) / self.head_dim
        angles = torch.outer(rows.float(), 1.0 / self.head.rope_theta**exponents)
        self.cos = torch.cat((angles.cos(), angles.cos()), -1).to(self.dtype).unsqueeze(1)  # [C, 1, d]
        self.sin = torch.cat((-angles.sin(), angles.sin()), -1).to(self.dtype).unsqueeze(1)
        self.mask = torch.where(rows[None] > rows[:, None], float("-inf"), 0.0).to(self.dtype)  # [C, C]
        self.length, self.tree_rows = 0, 0

    def truncate(self, length: int) -> None:
        """Forget every token from `length` on. Their cache rows are masked, and overwritten later."""
        self.length = length

    @torch.inference_mode()
    def forward(self, token_ids: torch.Tensor, last_only: bool = False) -> TargetStep:
        """Process `token_ids` int64 [n] after the cached tokens."""
        rows = torch.arange(self.length, self.length + int(token_ids.numel()), device=self.device)
        step = self._run(token_ids, rows, None, last_only)
        self.length += int(token_ids.numel())
        return step

    @torch.inference_mode()
    def verify(self, tree: DraftTree) -> TargetStep:
        self._rows_read = len(tree.tokens) if tree.is_chain else 0
        token_ids = torch.tensor(tree.tokens, device=self.device)
        if tree.is_chain:
            return self.forward(token_ids)
        paths = tree.paths().to(self.device)
        self._reserve_for_tree(paths.shape[0])
        return self._run(token_ids, self.length + tree.depths().to(self.device), paths, False)

    def accept(self, path: list[int]) -> None:
        """Cache the rows of the path at the positions that plain decoding uses."""
        if self._rows_read:
            self.truncate(self.length - self._rows_read + len(path))
            return
        places = slice(self.length, self.length + len(path))
        self.keys[:, :, places] = self.tree_keys[:, path].transpose(1, 2)
        self.values[:, :, places] = self.tree_values[:, path].transpose(1, 2)
        self.length += len(path)

    def _run(
        self, token_ids: torch.Tensor, rows: torch.Tensor, paths: torch.Tensor | None, last_only: bool
    ) -> TargetStep:
        """Rows at positions `rows` int64 [n]; without `paths` they follow each other."""
        cos, sin, mask = self.cos[rows], self.sin[rows], self.mask[rows]
        if paths is None:
            mask = mask.repeat(self.heads // self.kv_heads, 1)  # [G * n, C]
        else:
            mask = mask.repeat_interleave(self.kv_heads, 0).unsqueeze(1)  # [n * K, 1, C]
        hidden = F.embedding(token_ids, self.embed_tokens)
        aux: dict[int, torch.Tensor] = {}
        for index, layer in enumerate(self.layers):
            hidden = self._layer(index, layer, hidden, cos, sin, mask, paths)
            if index + 1 in self.aux_layer_ids:
                aux[index + 1] = hidden
        last = hidden[-1:] if last_only else hidden
        logits = self.lm_head(self._rms(last, self.norm))
        return TargetStep(logits, torch.cat([aux[k] for k in self.aux_layer_ids], dim=-1))

    def _rms(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden, (hidden.shape[-1],), weight, self.head.rms_norm_eps)

    def _layer(
        self,
        index: int,
        layer: _Layer,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor,
        paths: torch.Tensor | None,
    ) -> torch.Tensor:
        new, groups = hidden.shape[0], self.heads // self.kv_heads
        qkv = layer.qkv(self._rms(hidden, layer.input_norm)).view(new, -1, self.head_dim)
        rotated = qkv[:, : self.heads + self.kv_heads]
        rotated = rotated * cos + rotated.roll(self.head_dim // 2, -1) * sin
        new_keys, new_values = rotated[:, self.heads :], qkv[:, self.heads + self.kv_heads :]
        query = rotated[:, : self.heads].reshape(new, self.kv_heads, groups, self.head_dim)
        if paths is None:
            rows = slice(self.length, self.length + new)
            self.keys[index][:, rows] = new_keys.transpose(0, 1)
            self.values[index][:, rows] = new_values.transpose(0, 1)
            query = query.permute(1, 2, 0, 3).reshape(self.kv_heads, groups * new, self.head_dim)
            mixed = self._attend(query, self.keys[index], self.values[index], mask)
            mixed = mixed.view(self.kv_heads, groups, new, self.head_dim).permute(2, 0, 1, 3)
        else:
            self.tree_keys[index], self.tree_values[index] = new_keys, new_values
            query = query.reshape(new * self.kv_heads, groups, self.head_dim)
            keys = self._along_paths(self.path_keys, self.keys[index], new_keys, paths)
            values = self._along_paths(self.path_values, self.values[index], new_values, paths)
            mixed = self._attend(query, keys, values, mask)
        hidden = hidden + layer.out(mixed.reshape(new, -1))
        gate, up = layer.gate_up(self._rms(hidden, layer.post_norm)).chunk(2, dim=-1)
        return hidden + layer.down(F.silu(gate) * up)

    def _attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Over the whole, masked cache: [b, m, d] from query [b, m, d], keys and values [b, C, d]."""
        products = torch.bmm(query, keys.transpose(1, 2))
        scores = torch.add(mask, products, alpha=self.head_dim**-0.5)
        return torch.bmm(scores.softmax(-1), values)  # which sums in float32

    def _reserve_for_tree(self, count: int) -> None:
        """Room for the rows of a tree in all layers, and for the caches along their paths in one."""
        if count == self.tree_rows:
            return
        self.tree_rows = count
        rows = (2, len(self.layers), count, self.kv_heads, self.head_dim)
        along = (2, count, self.kv_heads, self.capacity, self.head_dim)
        self.tree_keys, self.tree_values = torch.empty(rows, dtype=self.dtype, device=self.device)
        self.path_keys, self.path_values = torch.empty(along, dtype=self.dtype, device=self.device)

    def _along_paths(
        self, own: torch.Tensor, cached: torch.Tensor, new: torch.Tensor, paths: torch.Tensor
    ) -> torch.Tensor:
        """Fill `own` [n, K, C, d], a cache for every row of a tree: the cached tokens, then its path.

        Every token lies where plain decoding would put it, so that sums run in the same order. The mask
        hides the repeated rows after the end of a path.
        """
        count, depth = paths.shape
        own.copy_(cached)
        own[:, :, self.length : self.length + depth] = new[paths].transpose(1, 2)
        return own.view(count * self.kv_heads, self.capacity, self.head_dim)

    def _read_layer(self, index: int) -> _Layer:
        tensors = self.head.layer_tensors(index)
        raw = {name: tensor.to(self.device, self.dtype) for name, tensor in tensors.items()}
        return _Layer(
            qkv=Weight(torch.cat([raw[f"self_attn.{name}_proj.weight"] for name in "qkv"])),
            out=Weight(raw["self_attn.o_proj.weight"]),
            gate_up=Weight(torch.cat([raw["mlp.gate_proj.weight"], raw["mlp.up_proj.weight"]])),
            down=Weight(raw["mlp.down_proj.weight"]),
            input_norm=raw["input_layernorm.weight"],
            post_norm=raw["post_attention_layernorm.weight"],
        )


def _require_plain_llama(head: TargetHead) -> None:
    if reason := why_not_plain_llama(head.config):
        raise ConfigError(
            f"This target cannot be evaluated: {reason}.",
            why="Acceptance would be measured against another model than the one that was captured.",
            next="evaluate in the serving engine; evaluation.unsupported: skip trains without measuring",
        )
