"""How each server reads config.json and the names of the tensors. Sources: the servers' releases of 2026-11.

A format that several servers or versions load has several rules, and a folder must mean the same by all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]
LayerIds = Callable[[Config, int], tuple[int, ...]]
IDS = "eagle_aux_hidden_state_layer_ids"


def _default_layers(num_layers: int) -> tuple[int, ...]:
    return (2, num_layers // 2, num_layers - 3)


def vllm_ids(config: Config, num_layers: int) -> tuple[int, ...]:
    """vLLM's newer runner: the top-level list counts blocks and is sorted; the nested one is not read."""
    return tuple(sorted(set(config.get(IDS) or _default_layers(num_layers))))


def vllm_v1_ids(config: Config, num_layers: int) -> tuple[int, ...]:
    """vLLM's older runner: without a top-level list the nested one is taken, as numbers of blocks."""
    nested = (config.get("eagle_config") or {}).get(IDS)
    return tuple(sorted(set(config.get(IDS) or nested or _default_layers(num_layers))))


def sglang_ids(config: Config, num_layers: int) -> tuple[int, ...]:
    """SGLang reads the nested list only; id k is the output of block k, counted from 0.

    The output of the last block is dropped without a word.
    """
    nested = (config.get("eagle_config") or {}).get(IDS)
    if nested is None:
        return _default_layers(num_layers)
    return tuple(k + 1 for k in nested if k + 1 < num_layers)


@dataclass(frozen=True)
class Rules:
    """`residual_normed`: of a config without `norm_before_residual`; None: the field is not read at all.

    `nested`: the decoder's sizes lie in `transformer_layer_config`. `renames`: prefixes of names that the
    loader replaces. `attributes`: fields without which the loader fails.
    """

    reader: str
    layer_ids: LayerIds
    residual_normed: bool | None
    nested: bool = False
    renames: tuple[tuple[str, str], ...] = (("midlayer.", "layers.0."),)
    attributes: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM")
    biased: bool = True  # `attention_bias` is read
    parallel: bool = True  # it drafts in parallel, with P-EAGLE
    windowed: bool = True  # `sliding_window` is read where `layer_types` says so


_VLLM = (
    Rules("vLLM", vllm_ids, residual_normed=False),
    Rules("vLLM's older runner", vllm_v1_ids, residual_normed=False),
)
_SGLANG = Rules(
    "SGLang",
    sglang_ids,
    residual_normed=None,
    renames=(("model.", ""), ("midlayer.", "layers.0.")),
    attributes=("tie_word_embeddings", "draft_vocab_size"),
    architectures=("LlamaForCausalLMEagle3",),
    biased=False,
    parallel=False,
    windowed=False,  # a flag of the server sets one
)
_SPECULATORS = ("Eagle3DraftModel", "Eagle3Speculator", "PEagleDraftModel")
_PACKAGE = (
    Rules("vLLM", vllm_ids, residual_normed=True, nested=True, renames=(), architectures=_SPECULATORS),
    Rules(
        "speculators", vllm_ids, residual_normed=False, nested=True, renames=(), architectures=_SPECULATORS
    ),
)
RULES: Mapping[str, tuple[Rules, ...]] = {
    "vllm": _VLLM,
    "sglang": (_SGLANG,),
    "hf": (_SGLANG, *_VLLM),
    "speculators": _PACKAGE,
}
