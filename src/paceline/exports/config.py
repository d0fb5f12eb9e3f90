"""config.json of an exported EAGLE-3 draft, in the flat form and in that of the speculators package; and what
the configs of all drafts share.

The flat one carries the ids of the fused layers in the two meanings of its servers. No default of a server is
relied on where another server's is different.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paceline.exports.export import ExportedDraft
from paceline.target.layer_ids import EAGLE_IDS, LAYER_IDS

ARCHITECTURE = "LlamaForCausalLMEagle3"
SPECULATORS_VERSION = "0.9.0"


def flat_config(draft: ExportedDraft) -> dict[str, Any]:
    """The layout that vLLM and SGLang load."""
    return {
        "architectures": [ARCHITECTURE],
        **decoder_config(draft, "llama", 1),
        "draft_vocab_size": draft.sizes["draft_vocab_size"],
        "target_hidden_size": draft.sizes["hidden_size"],
        **_layer_ids(draft),
        **_norms(draft),
        "use_aux_norm": False,  # an older name of fc_norm
        **_window(draft),
        **_parallel(draft),
        "paceline": provenance(draft),
    }


def speculators_config(draft: ExportedDraft) -> dict[str, Any]:
    """The layout of the speculators package, which vLLM loads too."""
    sizes, target = draft.sizes, draft.target
    mask = sizes.get("mask_token_id")
    kind = "eagle3" if mask is None else "peagle"
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": draft.chain,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    return {
        "architectures": ["Eagle3DraftModel" if mask is None else "PEagleDraftModel"],
        "speculators_model_type": kind,
        "speculators_version": SPECULATORS_VERSION,
        "draft_vocab_size": sizes["draft_vocab_size"],
        "target_hidden_size": None,  # the draft's hidden size is the target's
        EAGLE_IDS: _ids("speculators.eagle3", draft),
        **_norms(draft),
        **({} if mask is None else {"mask_token_id": mask}),
        "embed_requires_grad": False,
        "tie_word_embeddings": False,
        "dtype": draft.dtype,
        "transformer_layer_config": {
            **decoder_config(draft, "llama", 1),
            "architectures": ["LlamaForCausalLM"],
        },
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {
                "name_or_path": target.name,
                "architectures": target.config.get("architectures", []),
            },
        },
        "paceline": provenance(draft),
    }


def provenance(draft: ExportedDraft) -> dict[str, Any]:
    """What the draft was trained for and where it comes from; `method.start_from` reads it again."""
    target = draft.target
    named = {"name": target.name, "revision": target.revision, **target.version.to_dict()}
    return {"method": draft.method, "target": named, **draft.origin}


def _norms(draft: ExportedDraft) -> dict[str, bool]:
    chosen = ("norm_before_fc", "fc_norm", "norm_output")
    return {"norm_before_residual": False, **{name: bool(draft.sizes.get(name)) for name in chosen}}


def _window(draft: ExportedDraft) -> dict[str, Any]:
    window = draft.sizes.get("sliding_window")
    return {"sliding_window": window, "layer_types": ["sliding_attention"]} if window else {}


def _parallel(draft: ExportedDraft) -> dict[str, Any]:
    """P-EAGLE's mask token, under the two names that vLLM's versions read, and a mark for other readers."""
    mask = draft.sizes.get("mask_token_id")
    return {} if mask is None else {"mask_token_id": mask, "pard_token": mask, "parallel_drafting": True}


def decoder_config(draft: ExportedDraft, model_type: str, layers: int) -> dict[str, Any]:
    """Sizes, norm, rotary embedding and tokens of a draft of `layers` decoder layers."""
    sizes, target = draft.sizes, draft.target.config
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {
        "model_type": model_type,
        "hidden_size": sizes["hidden_size"],
        "intermediate_size": sizes["intermediate_size"],
        "num_hidden_layers": layers,
        "num_attention_heads": sizes["num_attention_heads"],
        "num_key_value_heads": sizes["num_key_value_heads"],
        "head_dim": sizes["head_dim"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": sizes["rms_norm_eps"],
        "vocab_size": sizes["vocab_size"],
        "max_position_embeddings": sizes["max_position_embeddings"],
        **_rope(sizes),
        "tie_word_embeddings": False,
        "use_cache": True,
        "dtype": draft.dtype,
        "torch_dtype": draft.dtype,
        **{name: target[name] for name in tokens if target.get(name) is not None},
    }


def _rope(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary embedding as older and newer servers read it: a base and a scaling, and both in one."""
    scaling = dict(sizes.get("rope_scaling") or {})
    theta = sizes["rope_theta"]
    nested = {"rope_type": "default", **scaling, "rope_theta": theta}
    return {"rope_theta": theta, "rope_scaling": scaling or None, "rope_parameters": nested}


def _layer_ids(draft: ExportedDraft) -> dict[str, Any]:
    blocks = _ids("vllm.eagle3", draft)
    return {
        EAGLE_IDS: blocks,
        "num_aux_hidden_states": len(blocks),
        "eagle_config": {EAGLE_IDS: _ids("sglang.eagle3", draft), "use_aux_hidden_state": True},
    }


def _ids(format_name: str, draft: ExportedDraft) -> list[int]:
    layers = int(draft.target.config["num_hidden_layers"])
    return LAYER_IDS[format_name].written(draft.sizes["aux_layer_ids"], layers)
