"""The tensors that a server loads of an EAGLE-3 draft: names and shapes, as data; and the comparison with
them.

Legend: H hidden size of draft and target, F width of the fused target states, Q and K widths of queries and
keys, d head_dim, I inner size of the MLP, D draft vocabulary, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from paceline.errors import ConfigError

Shapes = Mapping[str, tuple[str, ...]]

TOP: Shapes = {"fc.weight": ("H", "F"), "norm.weight": ("H",), "lm_head.weight": ("D", "H")}
MIDDLE: Shapes = {
    "input_layernorm.weight": ("H",),
    "hidden_norm.weight": ("H",),
    "post_attention_layernorm.weight": ("H",),
    "self_attn.q_proj.weight": ("Q", "2H"),
    "self_attn.k_proj.weight": ("K", "2H"),
    "self_attn.v_proj.weight": ("K", "2H"),
    "self_attn.o_proj.weight": ("H", "Q"),
    "mlp.gate_proj.weight": ("I", "H"),
    "mlp.up_proj.weight": ("I", "H"),
    "mlp.down_proj.weight": ("H", "I"),
}
# EAGLE-3.1: by the setting of that name. `fc_norm` has one tensor for each of the n fused states.
INPUT_NORM: Shapes = {"input_norm.weight": ("F",)}
FC_NORM = "fc_norm.{}.weight"
# Of P-EAGLE; the speculators package has one more dimension.
MASK, MASK_OF_PACKAGE = ("1", "F"), ("1", "1", "F")
# Only where the draft's vocabulary is smaller than the target's.
VOCABULARY_MAPS: Shapes = {"d2t": ("D",), "t2d": ("V",)}
EMBEDDING: Shapes = {"embed_tokens.weight": ("V", "H")}


def expected(sizes: Mapping[str, Any], layer: str, *, embedding: bool) -> dict[str, tuple[int, ...]]:
    """Shape by name. `layer`: the prefix of the one decoder layer; `embedding`: the folder carries it."""
    known = lengths_of(sizes)
    table = {**TOP, **{f"{layer}{name}": shape for name, shape in MIDDLE.items()}}
    table |= INPUT_NORM if sizes.get("norm_before_fc") else {}
    table |= {
        FC_NORM.format(n): ("H",) for n in range(len(sizes["aux_layer_ids"]) if sizes.get("fc_norm") else 0)
    }
    if sizes.get("mask_token_id") is not None:
        table["mask_hidden"] = MASK_OF_PACKAGE if embedding else MASK
    table |= VOCABULARY_MAPS if known["D"] != known["V"] else {}
    table |= EMBEDDING if embedding else {}
    return {name: tuple(known[letter] for letter in shape) for name, shape in table.items()}


def lengths_of(sizes: Mapping[str, Any]) -> dict[str, int]:
    """Every letter of the legend, as a number."""
    hidden, head_dim = sizes["hidden_size"], sizes["head_dim"]
    return {
        "1": 1,
        "H": hidden,
        "2H": 2 * hidden,
        "F": len(sizes["aux_layer_ids"]) * hidden,
        "d": head_dim,
        "Q": sizes["num_attention_heads"] * head_dim,
        "K": sizes["num_key_value_heads"] * head_dim,
        "I": sizes["intermediate_size"],
        "D": sizes["draft_vocab_size"],
        "V": sizes["vocab_size"],
    }


def refuse_others(
    server: str, tensors: Mapping[str, torch.Tensor], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise ConfigError unless `tensors` are exactly the wanted ones, all of them finite."""
    wrong = [f"{name} is missing" for name in wanted if name not in tensors]
    wrong += [f"{name} is surplus" for name in tensors if name not in wanted]
    for name, shape in wanted.items():
        found = tuple(tensors[name].shape) if name in tensors else shape
        if found != shape:
            wrong.append(f"{name} has the shape {found}, not {shape}")
        elif name in tensors and not bool(torch.isfinite(tensors[name]).all()):
            wrong.append(f"{name} is not finite")
    if wrong:
        raise ConfigError(
            f"The draft cannot be exported for {server}: {'; '.join(wrong)}.",
            why="Servers notice neither a missing nor a surplus tensor, and would draft with random weights.",
            next="export another checkpoint (--step), and report this if its run was not edited.",
        )
