"""Samples captured from the tiny random Llama, shared by the tests of methods and evaluation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM

from paceline.demo.target import HIDDEN, LAYERS, VOCAB, tiny_target

__all__ = ["AUX_LAYER_IDS", "HIDDEN", "LAYERS", "VOCAB", "captured_sample", "save_target", "tiny_target"]
AUX_LAYER_IDS = (2, 4, 5)


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
