"""A tiny random Llama and samples captured from it, shared by the tests of methods and evaluation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB, HIDDEN, LAYERS = 61, 32, 8
AUX_LAYER_IDS = (2, 4, 5)


def tiny_target(seed: int = 0, tied: bool = False) -> LlamaForCausalLM:
    """An 8-layer float32 Llama whose weights are large enough for a peaked, varied output."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    torch.manual_seed(seed)
    model: LlamaForCausalLM = LlamaForCausalLM(config)
    model.train(False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 0.15)
            else:
                parameter.uniform_(0.5, 1.5)
            if name == "lm_head.weight":
                parameter.mul_(4.0)
    return model


def save_target(model: LlamaForCausalLM, folder: Path, max_shard_size: str = "1GB") -> Path:
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def captured_sample(
    model: LlamaForCausalLM, length: int, prompt: int, seed: int, input_ids: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """What capture gives EAGLE-3 for `length` processed tokens, `prompt` of them the prompt.

    `input_ids`: all tokens, one more than are processed; random ones by default.
    """
    if input_ids is None:
        generator = torch.Generator().manual_seed(seed)
        input_ids = torch.randint(3, VOCAB, (length + 1,), generator=generator)
    states: dict[int, torch.Tensor] = {}

    def keep(layer_id: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            states[layer_id] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [model.model.layers[k - 1].register_forward_hook(keep(k)) for k in (*AUX_LAYER_IDS, LAYERS)]
    with torch.no_grad():
        model.model(input_ids=input_ids[None, :-1], use_cache=False)
    for handle in handles:
        handle.remove()
    loss_mask = torch.zeros(length + 1, dtype=torch.uint8)
    loss_mask[prompt:] = 1
    return {
        "input_ids": input_ids.to(torch.int32),
        "loss_mask": loss_mask,
        "aux_hidden_states": torch.cat([states[k][0] for k in AUX_LAYER_IDS], dim=-1),
        "last_hidden_states": states[LAYERS][0][loss_mask[1:].bool()],
    }
