"""Block drafts (DFlash, and the methods that add a head to it) for vLLM and SGLang: one layout, the names of
the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paceline.errors import ConfigError
from paceline.exports.blocks_config import block_config
from paceline.exports.contract import Shapes, lengths_of, refuse_others
from paceline.exports.export import Export, ExportedDraft, FolderContent
from paceline.exports.reader.block_forward import block_readers
from paceline.exports.reader.check import check_folder
from paceline.exports.reader.replay import Replay, ServedTarget, Verdict

TOP: Shapes = {"fc.weight": ("H", "F"), "hidden_norm.weight": ("H",), "norm.weight": ("H",)}
LAYER: Shapes = {
    "input_layernorm.weight": ("H",),
    "post_attention_layernorm.weight": ("H",),
    "self_attn.q_proj.weight": ("Q", "H"),
    "self_attn.k_proj.weight": ("K", "H"),
    "self_attn.v_proj.weight": ("K", "H"),
    "self_attn.o_proj.weight": ("H", "Q"),
    "self_attn.q_norm.weight": ("d",),
    "self_attn.k_norm.weight": ("d",),
    "mlp.gate_proj.weight": ("I", "H"),
    "mlp.up_proj.weight": ("I", "H"),
    "mlp.down_proj.weight": ("H", "I"),
}


@dataclass(frozen=True)
class Added:
    """What a method's head adds: tensors at the top and in every layer, and the servers that load it."""

    servers: tuple[str, ...]
    top: Shapes
    layer: Shapes


MARKOV: Shapes = {"markov_head.markov_w1.weight": ("V", "r"), "markov_head.markov_w2.weight": ("V", "r")}
CONFIDENCE: Shapes = {"confidence_head.proj.weight": ("1", "H+r"), "confidence_head.proj.bias": ("1",)}
RECURRENT: Shapes = {
    "prefix_gru.weight_ih_l0": ("3G", "H"),
    "prefix_gru.weight_hh_l0": ("3G", "G"),
    "embed_proj.0.weight": ("E", "H+G"),
    "embed_proj.2.weight": ("V", "E"),
}
SELECTOR: Shapes = {
    "candidate_selector.predecessor_codebook": ("V", "r"),
    "candidate_selector.successor_codebook": ("V", "r"),
    "candidate_selector.hidden_projection.weight": ("r", "H"),
}
CONVOLUTIONS: Shapes = {
    f"{name}.{part}": shape
    for name in ("attention_conv", "mlp_conv")
    for part, shape in {"base_kernel": ("2", "t", "H"), "kernel_projection.weight": ("2tg", "H")}.items()
}
BOTH = ("vllm", "sglang", "hf")
ADDED: Mapping[str, Added] = {
    "dflash": Added(BOTH, {}, {}),
    "dspark": Added(BOTH, {**MARKOV, **CONFIDENCE}, {}),
    "domino": Added(("sglang", "hf"), RECURRENT, {}),
    "dflash2": Added(BOTH, SELECTOR, CONVOLUTIONS),
}


@dataclass(frozen=True)
class BlockExport:
    server: str
    method: str

    def build(self, draft: ExportedDraft) -> FolderContent:
        if draft.sizes["causal"] and self.server != "vllm":
            raise ConfigError(
                f"A draft with causal blocks cannot be exported for {self.server}.",
                why="SGLang lets every place of a block attend to those after it, whatever the config says.",
                next="export it for vllm, or train with method.causal: false.",
            )
        tensors = {name: tensor.contiguous() for name, tensor in draft.tensors.items()}
        refuse_others(self.server, tensors, expected(self.method, draft.sizes))
        return FolderContent(block_config(draft), tensors)

    def check(self, folder: Path, target: ServedTarget, replays: Sequence[Replay]) -> Verdict:
        return check_folder(folder, block_readers(self.server, self.method), target, replays)


def expected(method: str, sizes: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape by name of every tensor that the servers load of a draft of `method`."""
    known, added = {**lengths_of(sizes), **_head_lengths(sizes)}, ADDED[method]
    table = {**TOP, **added.top}
    if not sizes.get("enable_confidence_head"):
        table = {name: shape for name, shape in table.items() if name not in CONFIDENCE}
    for layer in range(sizes["num_hidden_layers"]):
        table |= {f"layers.{layer}.{name}": shape for name, shape in {**LAYER, **added.layer}.items()}
    return {name: tuple(known[letter] for letter in shape) for name, shape in table.items()}


def _head_lengths(sizes: Mapping[str, Any]) -> dict[str, int]:
    """r rank, G size of the recurrent state, E size before its last matrix, t taps, g groups of channels."""
    hidden, taps = sizes["hidden_size"], sizes.get("conv_kernel_size", 0)
    rank = sizes.get("markov_rank", 0) or sizes.get("selector_rank", 0)
    state = sizes.get("gru_hidden_dim", 0)
    return {
        "1": 1,
        "2": 2,
        "r": rank,
        "H+r": hidden + rank,
        "G": state,
        "3G": 3 * state,
        "H+G": hidden + state,
        "E": sizes.get("emb_dim", 0),
        "t": taps,
        "2tg": 2 * taps * (hidden // sizes.get("conv_group_size", hidden)),
    }


def layouts(server: str) -> dict[str, Export]:
    """By method, for those that the server loads."""
    return {method: BlockExport(server, method) for method, added in ADDED.items() if server in added.servers}
