"""A target as far as its config.json tells, weights or not: sizes, parameters, bytes. No torch.

Parameters are counted from the sizes of a Llama-like decoder, with experts where the config names them. The
bytes of weights that lie in the folder are those of the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paceline.errors import ConfigError
from paceline.target.folder import INDEX, quantisation, read_config, read_json

# The names that families give a size; the usual one first.
HIDDEN = ("hidden_size", "n_embd", "n_embed", "d_model", "dim")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
CHOSEN = ("num_experts_per_tok", "experts_per_token", "num_experts_per_token")
HEAD_DIM = 64  # of the draft, if the target has no attention heads
BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0}
# Of a matrix that a quantiser has changed, scales included.
QUANTISED_BYTES = {"mxfp4": 4.25 / 8, "awq": 4.5 / 8, "gptq": 4.5 / 8, "fp8": 1.0, "bitsandbytes": 4.5 / 8}


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of the target's decoder that a draft takes over."""

    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int

    @property
    def query_width(self) -> int:
        """Numbers in the queries of a token."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Numbers in the keys of a token, and in its values."""
        return self.num_key_value_heads * self.head_dim


@dataclass(frozen=True)
class TargetShape:
    """`parameters`: counted from the sizes; `active_parameters`: those that compute one token.

    `weights_bytes`: of the files if they are in the folder (`has_weights`), else estimated. `dtype`: as
    stored; `quantised`: the method, or "".
    """

    sizes: LayerSizes
    model_type: str
    max_positions: int | None
    dtype: str
    quantised: str
    parameters: int
    active_parameters: int
    weights_bytes: int
    has_weights: bool


def layer_parameters(sizes: LayerSizes, inputs: int) -> int:
    """Numbers in the matrices of a decoder layer whose attention reads rows of `inputs` numbers."""
    return _attention(sizes, inputs) + 3 * sizes.hidden_size * sizes.intermediate_size


def read_shape(folder: Path) -> TargetShape:
    """From config.json, and the names and sizes of the weights' files. Raises ConfigError."""
    config = read_config(folder)
    hidden = _count(config, HIDDEN)
    layers, vocab = _count(config, LAYERS), _count(config, ("vocab_size",))
    if hidden is None or layers is None or vocab is None:
        raise ConfigError(
            f"{folder / 'config.json'} does not say how wide and deep the target is.",
            why="What a sample takes follows from hidden_size, num_hidden_layers and vocab_size.",
            next="set target.model to a causal language model's folder; `paceline train` reads the sizes "
            "of unusual families by the model library.",
        )
    heads = _count(config, HEADS) or max(1, hidden // HEAD_DIM)
    sizes = LayerSizes(
        hidden_size=hidden,
        num_hidden_layers=layers,
        vocab_size=vocab,
        intermediate_size=_count(config, ("intermediate_size", "n_inner")) or 4 * hidden,
        num_attention_heads=heads,
        num_key_value_heads=_count(config, ("num_key_value_heads",)) or heads,
        head_dim=_count(config, ("head_dim",)) or hidden // heads,
    )
    outside = vocab * hidden * (1 if config.get("tie_word_embeddings") else 2)
    attention = layers * _attention(sizes, hidden)
    every, chosen = _mlp(config, sizes)
    quantised = quantisation(config)
    files = _bytes_of_files(folder)
    dtype = _stored_dtype(config)
    return TargetShape(
        sizes=sizes,
        model_type=str(config["model_type"]),
        max_positions=_count(config, POSITIONS),
        dtype=dtype,
        quantised=quantised,
        parameters=outside + attention + every,
        active_parameters=outside + attention + chosen,
        weights_bytes=files or _estimated_bytes(outside, attention, every, dtype, quantised),
        has_weights=files > 0,
    )


def _count(config: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _attention(sizes: LayerSizes, inputs: int) -> int:
    return inputs * (sizes.query_width + 2 * sizes.key_width) + sizes.query_width * sizes.hidden_size


def _mlp(config: Mapping[str, Any], sizes: LayerSizes) -> tuple[int, int]:
    """Parameters of all layers' MLPs or experts: all of them, and those that compute one token."""
    experts, chosen = _count(config, EXPERTS), _count(config, CHOSEN)
    width = 3 * sizes.hidden_size
    if experts is None or chosen is None:
        dense = sizes.num_hidden_layers * width * sizes.intermediate_size
        return dense, dense
    inner = _count(config, ("moe_intermediate_size",)) or sizes.intermediate_size
    shared = (_count(config, ("n_shared_experts",)) or 0) * width * inner
    router = sizes.hidden_size * experts
    each = [number * width * inner + shared + router for number in (experts, chosen)]
    return sizes.num_hidden_layers * each[0], sizes.num_hidden_layers * each[1]


def _stored_dtype(config: Mapping[str, Any]) -> str:
    named = config.get("dtype") or config.get("torch_dtype")
    name = str(named).removeprefix("torch.")
    return name if name in BYTES else "float32"


def _estimated_bytes(outside: int, attention: int, mlp: int, dtype: str, quantised: str) -> int:
    whole = BYTES[dtype if not quantised else "bfloat16"]
    packed = QUANTISED_BYTES.get(quantised, 1.0) if quantised else whole
    # MXFP4 checkpoints keep their attention plain.
    of_attention = whole if quantised == "mxfp4" else packed
    return int(outside * whole + attention * of_attention + mlp * packed)


def _bytes_of_files(folder: Path) -> int:
    """Of the safetensors in the folder; 0 unless all that its index names are there."""
    try:
        names = {path.name for path in folder.glob("*.safetensors")}
        if (folder / INDEX).is_file():
            weight_map = read_json(folder / INDEX).get("weight_map")
            wanted = set(weight_map.values()) if isinstance(weight_map, dict) else set()
            if not wanted <= names:
                return 0
            names = wanted
        return sum((folder / name).stat().st_size for name in names)
    except (OSError, TypeError):
        return 0
