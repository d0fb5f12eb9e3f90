"""Tiny random targets of many families, for tests that try all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM

from paceline.testing.tiny_folder import write_tokenizer
from paceline.testing.tiny_target import VOCAB

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_WINDOW = {"sliding_window": 6}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_RECURRENT = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
# What each family's config needs beside the sizes.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": _WINDOW,
    "gemma": {},
    "gemma2": {**_WINDOW, "query_pre_attn_scalar": 16},
    "gemma3_text": {**_WINDOW, "query_pre_attn_scalar": 16},
    "granite": {
        "logits_scaling": 4.0,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
    },
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, **_WINDOW},
    "phi": {},
    "phi3": {},
    "olmo2": {},
    "olmo3": _WINDOW,
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, **_WINDOW},
    "deepseek_v3": {
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "head_dim": 8,
    },
    "qwen3_moe": _EXPERTS,
    "mixtral": {"num_local_experts": 4},
    "stablelm": {},
    "smollm3": {},
    "starcoder2": {},
    "nemotron": {},
    "glm4": {},
    "exaone4": _WINDOW,
    "gpt_neox": {},
    "gpt2": {"n_embd": 64, "n_layer": 8, "n_head": 4, "n_positions": 256},
    "bloom": {"n_layer": 8, "n_head": 4},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 8},
    "mamba": {},
    "recurrent_gemma": {"attention_window_size": 6, "lru_width": 64},
    "qwen3_next": {**_EXPERTS, "shared_expert_intermediate_size": 16, **_RECURRENT},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 4},
}

_EYE = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
# Models with a text decoder in them, whose settings are under text_config.
WITH_VISION: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {
        "text_config": {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
        },
        "vision_config": {
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 64,
        },
    },
    "gemma3": {"text_config": FAMILIES["gemma3_text"], "vision_config": _EYE, "mm_tokens_per_image": 4},
    "mistral3": {
        "text_config": {"model_type": "mistral"},
        "vision_config": {"model_type": "pixtral", "head_dim": 16, **_EYE},
    },
    "llava": {
        "text_config": {"model_type": "llama"},
        "vision_config": {"model_type": "clip_vision_model", "projection_dim": 32, **_EYE},
    },
}
FAMILIES.update(WITH_VISION)


def family_folder(folder: Path, family: str, seed: int = 0, **config: Any) -> Path:
    """Write a float32 target of the family with the tiny tokenizer. Its output is peaked and varied."""
    values = {**FAMILIES[family], **config}
    if family in WITH_VISION:
        kind: Any = AutoModelForMultimodalLM
        values["text_config"] = {**_SIZES, **values["text_config"]}
    else:
        kind, values = AutoModelForCausalLM, {**_SIZES, **values}
    settings = AutoConfig.for_model(family, **values)
    torch.manual_seed(seed)
    model = kind.from_config(settings, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.dim() == 1:
                parameter.uniform_(0.2, 0.9)
            elif "embed" in name or "wte" in name or "lm_head" in name:
                parameter.normal_(0.0, 0.5)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
            elif "sinks" in name:
                parameter.normal_(0.0, 1.0)
            elif parameter.dim() == 2:
                parameter.normal_(0.0, 0.1)
    model.save_pretrained(folder)
    write_tokenizer(folder, template=None)
    return folder
