"""Reads a written folder by one server's rules, into what the forward needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from paceline.exports.reader.replay import ServedTarget
from paceline.exports.reader.rope import frequencies, rope_of
from paceline.exports.reader.rules import Rules

AS_STORED = ("d2t", "embed_tokens.weight")
UNUSED = frozenset({"t2d"})  # every loader skips it


@dataclass(frozen=True)
class Draft:
    """A draft as a server has it in memory; weights float32 under short names, the embedding as stored."""

    weights: Mapping[str, torch.Tensor]
    layers: tuple[int, ...]  # numbers of blocks, in the order of the columns of `fc`
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    angles: torch.Tensor  # float64 [d/2]
    sharpness: float
    residual_normed: bool
    feedback_normed: bool
    mask: int | None  # P-EAGLE: the token that the guesses after the first read
    window: int | None  # a row attends to itself and the `window` - 1 rows before it
    target_ids: torch.Tensor  # int64 [D]


def read_draft(folder: Path, target: ServedTarget, rules: Rules) -> Draft:
    """Raises ValueError with the reason for a folder that the server would refuse or get wrong."""
    config = json.loads((folder / "config.json").read_text())
    decoder = config["transformer_layer_config"] if rules.nested else config
    _refuse_fields(config, decoder, rules, target)
    tensors = _renamed(load_file(folder / "model.safetensors"), rules)
    ids = rules.layer_ids(config, target.num_hidden_layers)
    hidden, vocab = int(decoder["hidden_size"]), int(decoder["vocab_size"])
    size = config.get("draft_vocab_size") or vocab
    heads = int(decoder["num_attention_heads"])
    kv_heads = int(decoder.get("num_key_value_heads") or heads)
    head_dim = int(decoder.get("head_dim") or hidden // heads)
    inner = int(decoder["intermediate_size"])
    shapes = {
        "fc.weight": (hidden, len(ids) * target.hidden_size),
        "norm.weight": (hidden,),
        "lm_head.weight": (size, hidden),
        "layers.0.input_layernorm.weight": (hidden,),
        "layers.0.hidden_norm.weight": (hidden,),
        "layers.0.post_attention_layernorm.weight": (hidden,),
        "layers.0.self_attn.q_proj.weight": (heads * head_dim, 2 * hidden),
        "layers.0.self_attn.k_proj.weight": (kv_heads * head_dim, 2 * hidden),
        "layers.0.self_attn.v_proj.weight": (kv_heads * head_dim, 2 * hidden),
        "layers.0.self_attn.o_proj.weight": (hidden, heads * head_dim),
        "layers.0.mlp.gate_proj.weight": (inner, hidden),
        "layers.0.mlp.up_proj.weight": (inner, hidden),
        "layers.0.mlp.down_proj.weight": (hidden, inner),
    }
    mask = _mask_token(config, rules)
    if mask is not None:
        shapes["mask_hidden"] = (*((1, 1) if rules.nested else (1,)), len(ids) * target.hidden_size)
    joint, alone = _norms_before_fc(config)
    if joint:
        shapes["input_norm.weight"] = (len(ids) * target.hidden_size,)
    for n in range(len(ids) if alone else 0):
        shapes[f"fc_norm.{n}.weight"] = (target.hidden_size,)
    if size != vocab:
        shapes["d2t"] = (size,)
    if "embed_tokens.weight" in tensors:
        shapes["embed_tokens.weight"] = (vocab, hidden)
    weights = taken(tensors, shapes)
    embedding = weights.setdefault("embed_tokens.weight", target.embed_tokens)
    if tuple(embedding.shape) != (vocab, hidden):
        raise ValueError(
            f"the target's embedding is {tuple(embedding.shape)}, the draft needs {(vocab, hidden)}"
        )
    angles, sharpness = frequencies(rope_of(decoder), head_dim)
    return Draft(
        weights={name: tensor if name in AS_STORED else tensor.float() for name, tensor in weights.items()},
        layers=ids,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        eps=float(decoder["rms_norm_eps"]),
        angles=angles,
        sharpness=sharpness,
        residual_normed=bool(config.get("norm_before_residual", rules.residual_normed))
        and rules.residual_normed is not None,
        feedback_normed=bool(config.get("norm_output", False)),
        mask=mask,
        window=_window(decoder, rules),
        target_ids=_target_ids(weights.get("d2t"), size, vocab),
    )


def _refuse_fields(
    config: Mapping[str, Any], decoder: Mapping[str, Any], rules: Rules, target: ServedTarget
) -> None:
    names = config.get("architectures") or []
    if not set(names) & set(rules.architectures):
        raise ValueError(f"the architecture {names} is none of {list(rules.architectures)}")
    if rules.nested and config.get("speculators_model_type") not in ("eagle3", "peagle"):
        raise ValueError(f"speculators_model_type is {config.get('speculators_model_type')!r}")
    if decoder.get("model_type") != "llama":
        raise ValueError(f"model_type is {decoder.get('model_type')!r}, not 'llama'")
    missing = [name for name in rules.attributes if name not in config]
    if missing:
        raise ValueError(f"the field {missing[0]} is missing")
    if decoder.get("num_hidden_layers") != 1:
        raise ValueError(f"num_hidden_layers is {decoder.get('num_hidden_layers')}, and there is one layer")
    if rules.biased and (decoder.get("attention_bias") or decoder.get("bias") or decoder.get("qkv_bias")):
        raise ValueError("the projections have biases by the config, and there is no tensor for them")
    if decoder.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act is {decoder['hidden_act']!r}, not 'silu'")
    if config.get("tie_word_embeddings"):
        raise ValueError("tie_word_embeddings is set, so lm_head would not be read")
    if not (config.get("eagle_config") or {}).get("use_aux_hidden_state", True):
        raise ValueError("use_aux_hidden_state is off, so fc would not be read")
    positions = int(decoder.get("max_position_embeddings", 0))
    if target.max_positions is not None and positions < target.max_positions:
        raise ValueError(f"max_position_embeddings is {positions}, the target's is {target.max_positions}")


def _norms_before_fc(config: Mapping[str, Any]) -> tuple[bool, bool]:
    """(all fused states are normed as one, each of them alone)."""
    nested = config.get("eagle_config") or {}
    joint = bool(nested.get("norm_before_fc", config.get("norm_before_fc", False)))
    # SGLang reads the older name, too, and vLLM does not.
    if config.get("use_aux_norm") and not config.get("fc_norm"):
        raise ValueError("use_aux_norm is set without fc_norm, which servers read differently")
    return joint, bool(config.get("fc_norm"))


def _mask_token(config: Mapping[str, Any], rules: Rules) -> int | None:
    """The token that all guesses but the first read; None: each reads the guess before it."""
    found = config.get("mask_token_id", config.get("pard_token"))
    if found is None:
        if config.get("parallel_drafting") or config.get("speculators_model_type") == "peagle":
            raise ValueError("the draft guesses in parallel, and mask_token_id is missing")
        return None
    if not rules.parallel:
        raise ValueError("the draft guesses in parallel, which the server does not")
    for name in ("fc_norm", "norm_output"):
        if config.get(name):
            raise ValueError(f"{name} is set, which a server drops of a draft that guesses in parallel")
    return int(found)


def _window(decoder: Mapping[str, Any], rules: Rules) -> int | None:
    if "sliding_attention" not in (decoder.get("layer_types") or []):
        return None
    if not rules.windowed:
        raise ValueError("a sliding window is set, and the server would attend to all rows")
    return int(decoder["sliding_window"])


def _renamed(tensors: Mapping[str, torch.Tensor], rules: Rules) -> dict[str, torch.Tensor]:
    renamed = {}
    for given, tensor in tensors.items():
        name = given
        for prefix, other in rules.renames:
            name = other + name.removeprefix(prefix) if name.startswith(prefix) else name
        renamed[name] = tensor
    return renamed


def taken(
    tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, torch.Tensor]:
    """The tensors that the server takes; missing and unknown ones are refused, whatever the server does."""
    for name, shape in shapes.items():
        if name not in tensors:
            raise ValueError(f"{name} is missing: the server would draft with what its memory held")
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"{name} has the shape {tuple(tensors[name].shape)}, not {shape}")
    unknown = sorted(tensors.keys() - shapes.keys() - UNUSED)
    if unknown:
        raise ValueError(f"no parameter takes {unknown[0]} ({len(unknown)} such names)")
    return {name: tensors[name] for name in shapes}


def _target_ids(offsets: torch.Tensor | None, size: int, vocab: int) -> torch.Tensor:
    """The target's id of every draft token, from offsets."""
    ids = torch.arange(size) if offsets is None else torch.arange(size) + offsets.long()
    if int(ids.min()) < 0 or int(ids.max()) >= vocab:
        raise ValueError(f"d2t leads to the target id {int(ids.max())}, beyond the {vocab} tokens")
    if ids.unique().numel() != size:
        raise ValueError("d2t leads to one target id from two draft ids")
    return ids
