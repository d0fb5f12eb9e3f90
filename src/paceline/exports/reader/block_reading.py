"""Reads a written folder of a block draft by one server's rules, into what the forward needs.

Sources: the servers' releases of 2026-11.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from paceline.exports.reader.reading import taken
from paceline.exports.reader.replay import ServedTarget
from paceline.exports.reader.rope import frequencies, rope_of

Config = Mapping[str, Any]


@dataclass(frozen=True)
class BlockRules:
    """How one server reads a config. `causal_field`: whether `dflash_config.causal` is read at all."""

    reader: str
    architectures: Mapping[str, str]  # by method
    causal_field: bool
    block_size_nested_first: bool


@dataclass(frozen=True)
class BlockDraft:
    """A block draft as a server has it in memory; weights float32, the target's tensors as stored."""

    weights: Mapping[str, torch.Tensor]
    config: Config
    method: str
    target: ServedTarget
    layers: tuple[int, ...]  # numbers of blocks, in the order of the columns of `fc`
    num_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    angles: torch.Tensor  # float64 [d/2]
    sharpness: float
    block_size: int
    mask_token_id: int
    causal: bool
    from_anchor: bool

    @property
    def target_ids(self) -> torch.Tensor:
        return torch.arange(self.target.lm_head.shape[0])

    @property
    def nested(self) -> Config:
        return nested(self.config)


def nested(config: Config) -> Config:
    return config.get("dflash_config") or {}


def read_block_draft(folder: Path, target: ServedTarget, rules: BlockRules, method: str) -> BlockDraft:
    """Raises ValueError with the reason for a folder that the server would refuse or get wrong."""
    config = json.loads((folder / "config.json").read_text())
    _refuse_fields(config, rules, method, target)
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or hidden // heads)
    kv_heads, count = int(config.get("num_key_value_heads") or heads), int(config["num_hidden_layers"])
    # Both servers sort the ids of the captured states; id k is the output of block k, counted from 0.
    ids = tuple(sorted({k + 1 for k in nested(config)["target_layer_ids"]}))
    angles, sharpness = frequencies(rope_of(config), head_dim)
    draft = BlockDraft(
        weights={},
        config=config,
        method=method,
        target=target,
        layers=tuple(k for k in ids if k < target.num_hidden_layers),
        num_layers=count,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        eps=float(config["rms_norm_eps"]),
        angles=angles,
        sharpness=sharpness,
        block_size=_block_size(config, rules),
        mask_token_id=int(nested(config).get("mask_token_id", config.get("mask_token_id"))),
        causal=bool(rules.causal_field and nested(config).get("causal")),
        from_anchor=_from_anchor(config, method),
    )
    tensors = taken(load_file(folder / "model.safetensors"), _shapes(draft, hidden))
    exact = {name: tensor.float() for name, tensor in tensors.items()}
    return BlockDraft(**{**draft.__dict__, "weights": exact})


def _block_size(config: Config, rules: BlockRules) -> int:
    """vLLM's block is what it is told to guess, and one more; the printed command says the config's size."""
    top, inner = config.get("block_size"), nested(config).get("block_size")
    found = (inner or top) if rules.block_size_nested_first else (top or inner)
    if found is None or (top and inner and top != inner):
        raise ValueError(f"block_size is {top} at the top and {inner} in dflash_config")
    return int(found)


def _from_anchor(config: Config, method: str) -> bool:
    """Only DSpark's loaders read it, with another default each; it must be written."""
    if method != "dspark":
        if config.get("sample_from_anchor") or nested(config).get("sample_from_anchor"):
            raise ValueError("sample_from_anchor is set, which this method's loader refuses")
        return False
    if "sample_from_anchor" not in config:
        raise ValueError("the field sample_from_anchor is missing, whose default differs between loaders")
    return bool(config["sample_from_anchor"])


def _refuse_fields(config: Config, rules: BlockRules, method: str, target: ServedTarget) -> None:
    names, wanted = config.get("architectures") or [], rules.architectures[method]
    if names != [wanted]:
        raise ValueError(f"the architecture {names} is not {wanted}")
    if config.get("model_type") != "qwen3":
        raise ValueError(f"model_type is {config.get('model_type')!r}, not 'qwen3'")
    hidden = int(config["hidden_size"])
    if hidden != target.hidden_size:
        raise ValueError(f"hidden_size is {hidden}, the target's is {target.hidden_size}")
    vocab = target.lm_head.shape[0]
    if (config.get("draft_vocab_size") or config["vocab_size"]) != vocab or config["vocab_size"] != vocab:
        raise ValueError("the vocabulary is not the target's, whose embedding and lm_head the draft reads")
    if config.get("attention_bias"):
        raise ValueError("the projections have biases by the config, and there is no tensor for them")
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act is {config['hidden_act']!r}, not 'silu'")
    if "sliding_attention" in (config.get("layer_types") or []) or nested(config).get("use_swa"):
        raise ValueError("a layer slides a window, and the draft was trained without")
    if not config.get("is_neox_style", True) or not config.get("rope_is_neox_style", True):
        raise ValueError("is_neox_style is off, so halves of a head would be turned as pairs")
    positions = int(config.get("max_position_embeddings", 0))
    if target.max_positions is not None and positions < target.max_positions:
        raise ValueError(f"max_position_embeddings is {positions}, the target's is {target.max_positions}")


def _shapes(draft: BlockDraft, hidden: int) -> dict[str, tuple[int, ...]]:
    queries, keys = draft.heads * draft.head_dim, draft.kv_heads * draft.head_dim
    inner = int(draft.config["intermediate_size"])
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (hidden, len(draft.layers) * draft.target.hidden_size),
        "hidden_norm.weight": (hidden,),
        "norm.weight": (hidden,),
    }
    for number in range(draft.num_layers):
        layer = f"layers.{number}."
        shapes |= {
            f"{layer}input_layernorm.weight": (hidden,),
            f"{layer}post_attention_layernorm.weight": (hidden,),
            f"{layer}self_attn.q_proj.weight": (queries, hidden),
            f"{layer}self_attn.k_proj.weight": (keys, hidden),
            f"{layer}self_attn.v_proj.weight": (keys, hidden),
            f"{layer}self_attn.o_proj.weight": (hidden, queries),
            f"{layer}self_attn.q_norm.weight": (draft.head_dim,),
            f"{layer}self_attn.k_norm.weight": (draft.head_dim,),
            f"{layer}mlp.gate_proj.weight": (inner, hidden),
            f"{layer}mlp.up_proj.weight": (inner, hidden),
            f"{layer}mlp.down_proj.weight": (hidden, inner),
        }
    return shapes | _head_shapes(draft, hidden)


def _head_shapes(draft: BlockDraft, hidden: int) -> dict[str, tuple[int, ...]]:
    config, inner, vocab = draft.config, draft.nested, draft.target.lm_head.shape[0]
    if draft.method == "dspark":
        rank = int(config["markov_rank"])
        if rank < 1 or config["markov_head_type"] != "vanilla":
            raise ValueError(f"markov_rank is {rank} and markov_head_type {config['markov_head_type']!r}")
        shapes: dict[str, tuple[int, ...]] = {
            f"markov_head.markov_{name}.weight": (vocab, rank) for name in ("w1", "w2")
        }
        # vLLM takes a missing field for off, SGLang for on.
        if config["enable_confidence_head"]:
            width = hidden + (rank if config["confidence_head_with_markov"] else 0)
            shapes |= {"confidence_head.proj.weight": (1, width), "confidence_head.proj.bias": (1,)}
        return shapes
    if draft.method == "domino":
        if inner.get("projector_type") != "domino":
            raise ValueError(f"projector_type is {inner.get('projector_type')!r}, so the head is not loaded")
        if inner["shift_label"] or inner["pure_draft_prefix_len"] != 1:
            raise ValueError("the server corrects the second guess first, at the place that holds it")
        size, width = int(inner["gru_hidden_dim"]), int(inner["emb_dim"])
        return {
            "prefix_gru.weight_ih_l0": (3 * size, hidden),
            "prefix_gru.weight_hh_l0": (3 * size, size),
            "embed_proj.0.weight": (width, hidden + size),
            "embed_proj.2.weight": (vocab, width),
        }
    return _selector_shapes(draft, hidden, vocab) if draft.method == "dflash2" else {}


def _selector_shapes(draft: BlockDraft, hidden: int, vocab: int) -> dict[str, tuple[int, ...]]:
    inner = draft.nested
    rank, taps, group = (int(inner[key]) for key in ("selector_rank", "conv_kernel_size", "conv_group_size"))
    if hidden % group:
        raise ValueError(f"conv_group_size {group} does not divide the hidden size {hidden}")
    shapes: dict[str, tuple[int, ...]] = {
        "candidate_selector.predecessor_codebook": (vocab, rank),
        "candidate_selector.successor_codebook": (vocab, rank),
        "candidate_selector.hidden_projection.weight": (rank, hidden),
    }
    for number in range(draft.num_layers):
        for name in ("attention_conv", "mlp_conv"):
            prefix = f"layers.{number}.{name}."
            shapes[f"{prefix}base_kernel"] = (2, taps, hidden)
            shapes[f"{prefix}kernel_projection.weight"] = (2 * taps * (hidden // group), hidden)
    return shapes
