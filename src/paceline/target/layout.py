"""Where a family keeps embedding, final norm and lm_head, and how it changes its logits.

The answer comes from the library's model class, built without weights: names and ties of tensors from its
modules and from the renaming that the library does when it loads, the kind of the final norm from what the
norm computes. Families in `PLAIN` have a known answer and need no model class (a test compares each with the
library). In any case the producer compares the result with the model's own logits before it captures.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  (the name PyTorch's own documents use)

from paceline.errors import ConfigError
from paceline.target.folder import TensorFiles
from paceline.target.model import build_empty, text_config


@dataclass(frozen=True)
class HeadLayout:
    """Names are those of the folder's tensors; an empty name: the family has no such tensor. Where the folder
    has no tensor for a tied lm_head, its name is the embedding's.

    The final norm is RMSNorm, or LayerNorm if `centred`; its gain is the tensor plus `gain_offset`. Logits
    x are multiplied by `logit_scale`, then become `soft_cap` * tanh(x / `soft_cap`) unless that is 0.
    """

    embedding: str = "model.embed_tokens.weight"
    norm: str = "model.norm.weight"
    lm_head: str = "lm_head.weight"
    norm_bias: str = ""
    lm_head_bias: str = ""
    centred: bool = False
    gain_offset: float = 0.0
    eps: float = 1e-6
    logit_scale: float = 1.0
    soft_cap: float = 0.0


LLAMA = HeadLayout()
# Families with the defaults of `HeadLayout`, "rms_norm_eps" as eps, and lm_head tied only by config.json.
PLAIN = frozenset({"llama", "qwen2", "qwen3", "mistral"})
_IN_A_LAYER = re.compile(r"\.\d+\.")


def head_layout(folder: Path, config: Mapping[str, Any]) -> HeadLayout:
    """The layout of the folder's head. Raises ConfigError, with the family's name, if it is unsupported."""
    if config["model_type"] in PLAIN and "rms_norm_eps" in config:
        layout, files = HeadLayout(eps=float(config["rms_norm_eps"])), TensorFiles(folder)
        if config.get("tie_word_embeddings", False) and layout.lm_head not in files:
            layout = replace(layout, lm_head=layout.embedding)
        if all(name in files for name in (layout.embedding, layout.norm, layout.lm_head)):
            return layout
    return layout_by_library(folder)


def layout_by_library(folder: Path) -> HeadLayout:
    """The layout of the model that the installed transformers builds. Raises ConfigError."""
    model = build_empty(folder)
    parts = decoder_parts(model)
    scale, cap = _logit_changes(text_config(model.config))
    stored = _stored_names(model, TensorFiles(folder))

    def name(module: nn.Module, kind: str = "weight") -> str:
        parameter = getattr(module, kind, None)
        if not isinstance(parameter, nn.Parameter):
            return ""
        own = next(f"{name}.{kind}" for name, other in model.named_modules() if other is module)
        tied = [name for name, p in model.named_parameters(remove_duplicate=False) if p is parameter]
        return next((stored[name] for name in (own, *tied) if name in stored), own)

    return replace(
        _describe_norm(parts.norm, model.config.model_type),
        embedding=name(parts.embedding),
        norm=name(parts.norm),
        norm_bias=name(parts.norm, "bias"),
        lm_head=name(parts.lm_head),
        lm_head_bias=name(parts.lm_head, "bias"),
        logit_scale=scale,
        soft_cap=cap,
    )


def _stored_names(model: Any, files: TensorFiles) -> dict[str, str]:
    """The folder's name of each of the model's tensors outside the repeated layers, by the model's name."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    changes, tensors = get_model_conversion_mapping(model), model.state_dict()
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    names = {}
    for stored in files.shard_of:
        if not _IN_A_LAYER.search(stored):
            name, _ = rename_source_key(stored, renamings, converters, model.base_model_prefix, tensors)
            names[name if name in tensors else stored] = stored
    return names


@dataclass(frozen=True)
class DecoderParts:
    """The modules of a causal language model that capture and the draft need."""

    decoder: nn.Module
    embedding: nn.Embedding
    layers: nn.ModuleList
    norm: nn.Module
    lm_head: nn.Linear


def decoder_parts(model: Any) -> DecoderParts:
    """Find the modules by type rather than by name. Raises ConfigError if one is missing."""
    family = model.config.model_type
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    layers, num_layers = None, text_config(model.config).num_hidden_layers
    # Some families wrap the decoder in another module.
    for candidate in (decoder, *decoder.children()):
        lists = [c for c in candidate.children() if isinstance(c, nn.ModuleList)]
        layers = next((c for c in lists if len(c) == num_layers), None)
        if layers is not None:
            decoder = candidate
            break
    if layers is None:
        raise unsupported(family, "its decoder keeps no list of num_hidden_layers blocks")
    norms = [child for child in decoder.children() if _is_norm(child)]
    # A norm of the embedding comes before the blocks, the final norm usually after them.
    finals = [c for n, c in decoder.named_children() if _is_norm(c) and not _is_embedding_norm(n, family)]
    if len(finals) != 1:
        raise unsupported(family, f"its decoder has {len(norms)} norms of which {len(finals)} may be final")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise unsupported(family, "it has no embedding or no lm_head of one matrix")
    return DecoderParts(decoder, embedding, layers, finals[0], head)


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not list(module.children())


def _is_embedding_norm(name: str, family: str) -> bool:
    if family in ("lfm2", "lfm2_moe"):
        return False  # this family calls its final norm embedding_norm
    return "embed" in name or "per_layer" in name


def _describe_norm(norm: nn.Module, family: str) -> HeadLayout:
    """The kind of `norm`, found by running a copy of it with known weights."""
    probe = copy.deepcopy(norm).to_empty(device="cpu").float()
    weight = getattr(probe, "weight", None)
    size = weight.numel() if isinstance(weight, nn.Parameter) else 64
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(4, size, generator=generator)
    gain = torch.rand(size, generator=generator) + 0.5
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.zero_()
        silent = probe(states)
        has_gain = isinstance(weight, nn.Parameter)
        offset = 1.0 if has_gain and bool(silent.abs().max() > 1e-3) else 0.0
        if has_gain:
            weight.copy_(gain)  # type: ignore[union-attr]
        centred = bool(torch.allclose(probe(states + 1.0), probe(states), atol=1e-3))
        layout = HeadLayout(centred=centred, gain_offset=offset, eps=_eps(probe))
        whole = gain + offset if has_gain else torch.ones(size)
        for scale in (1e-3, 1.0, 30.0):  # the smallest scale shows eps
            ours = apply_norm(states * scale, whole, None, layout)
            if not torch.allclose(probe(states * scale), ours, atol=1e-4, rtol=1e-4):
                raise unsupported(family, f"its final norm ({type(norm).__name__}) is of no known kind")
    return layout


def _eps(norm: nn.Module) -> float:
    for name in ("variance_epsilon", "eps", "epsilon", "norm_eps"):
        if isinstance(value := getattr(norm, name, None), float):
            return value
    return 1e-5


def apply_norm(
    states: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor | None, layout: HeadLayout
) -> torch.Tensor:
    """The final norm of `states` [..., H], in float32."""
    exact, size = states.float(), (states.shape[-1],)
    if not layout.centred:
        normed = F.rms_norm(exact, size, gain.float(), layout.eps)
        return normed if bias is None else normed + bias.float()
    return F.layer_norm(exact, size, gain.float(), None if bias is None else bias.float(), layout.eps)


def bent(logits: torch.Tensor, layout: HeadLayout) -> torch.Tensor:
    """The family's logits from the products of lm_head: scaled, then capped."""
    if layout.logit_scale != 1.0:
        logits = logits * layout.logit_scale
    if layout.soft_cap:
        logits = torch.tanh(logits / layout.soft_cap) * layout.soft_cap
    return logits


def _logit_changes(config: Any) -> tuple[float, float]:
    """(scale, cap) of the logits, under any of the names that families use in their configuration."""
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    scale *= float(getattr(config, "lm_head_multiplier", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None) or 0.0
    if not (math.isfinite(scale) and math.isfinite(float(cap)) and float(cap) >= 0.0):
        raise unsupported(config.model_type, "the scale or the cap of its logits is not a number")
    return scale, float(cap)


def unsupported(family: str, reason: str) -> ConfigError:
    return ConfigError(
        f"Targets of the family {family!r} cannot be trained from: {reason}.",
        why="Features and target distributions must be exactly the target's own, or the draft imitates "
        "another model.",
        next="choose a target of another family (docs/targets.md lists those that are tested).",
    )
