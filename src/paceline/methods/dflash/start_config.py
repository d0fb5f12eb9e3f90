"""config.json of the block draft that a run starts from. No torch.

Servers look for a value at the top of the config, in `dflash_config`, or in both; two that differ are
refused, and so is arithmetic that the draft here does not have. What decides the draft's shape becomes the
method's settings, so that everything behind them is the same as without a folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.methods.start.folder import (
    KIND,
    WHY_NOT_HERE,
    StartFolder,
    decoder_sizes,
    read_start_folder,
    refuse_other_layers,
    refuse_other_method,
    refuse_other_settings,
)
from paceline.target.layer_ids import EAGLE_IDS, LAYER_IDS

if TYPE_CHECKING:
    from paceline.methods.dflash.settings import BlockSection

ARCHITECTURES = {
    "dflash": ("DFlashDraftModel", "DFlashSpeculator"),
    "dspark": ("Qwen3DSparkModel", "DSparkDraftModel", "DSparkSpeculator"),
    "domino": ("DFlashDraftModel", "DFlashSpeculator"),
    "dflash2": ("DFlash2DraftModel", "DFlash2Speculator"),
}
KINDS = {"domino": "dflash"}  # the speculators package's names, where they are not the method's
# What the library's class of these layers takes for a field that a config leaves out.
QWEN3 = {"head_dim": 128, "num_key_value_heads": 32, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768}
# Settings that a head reads, under the servers' names too.
HEAD_SETTINGS = {
    "dflash": (),
    "dspark": ("markov_rank",),
    "domino": ("gru_hidden_dim", "emb_dim"),
    "dflash2": ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k"),
}
# What a head needs to be the one here.
HEAD_FIELDS: Mapping[str, Mapping[str, Any]] = {
    "dflash": {},
    "dspark": {"markov_head_type": "vanilla"},
    "domino": {"projector_type": "domino", "pure_draft_prefix_len": 1, "shift_label": False},
    "dflash2": {},
}
# Fields that ask for something else, unless they have this value or none.
NOT_HERE = {
    "use_swa": False,
    "dflash_query_causal": False,
    "attention_sink_bias": False,
    "is_neox_style": True,
    "rope_is_neox_style": True,
    "input_embedding_scale": 1.0,
    "output_multiplier": 1.0,
    "final_logit_softcapping": 0.0,
}


@dataclass(frozen=True)
class BlockStart:
    """`settings`: those of the method that the folder decides; `sizes`: the rest of `DFlashConfig`, without
    the layers; `layers`: the target's states that are fused, as numbers of blocks."""

    start: StartFolder
    settings: Mapping[str, Any]
    sizes: Mapping[str, Any]
    layers: tuple[int, ...]

    def layers_of(self, num_hidden_layers: int) -> tuple[int, ...]:
        """Raises ConfigError for layers that this target has not."""
        LAYER_IDS["dflash"].written(self.layers, num_hidden_layers)
        told = self.start.config.get("num_target_layers")
        if told is not None and told != num_hidden_layers:
            reason = f"its target has {told} layers, and this one {num_hidden_layers}"
            raise self.start.refused(reason, "Its features are another model's.")
        return self.layers

    def applied(self, section: BlockSection) -> BlockSection:
        """The section with the folder's shape. Raises ConfigError if it asks for another shape itself."""
        refuse_other_settings(self.start, section, {**self.settings, "aux_layers": self.layers})
        return type(section).parse({**section.model_dump(), **self.settings})


def read_block_start(folder: Path, method: str) -> BlockStart:
    """Raises ConfigError for a folder that is missing, no draft of `method`, or not implemented here."""
    start = read_start_folder(folder)
    if method not in ARCHITECTURES:
        raise start.refused(f"no folder of the method {method} is known", "Its layout is not known here.")
    refuse_other_method(start, method, ARCHITECTURES[method], KINDS.get(method, method))
    refuse_other_layers(start)
    with start.reading():
        _refuse_what_is_not_here(start, method)
        layers = _layers(start)
        sizes = decoder_sizes(start, QWEN3)
        vocab = start.config.get("draft_vocab_size") or sizes["vocab_size"]
        if vocab != sizes["vocab_size"]:
            whole = sizes["vocab_size"]
            raise ValueError(f"it guesses {vocab} of {whole} tokens, and a block draft here all")
        settings = {
            "layers": int(start.decoder["num_hidden_layers"]),
            "target_states": len(layers),
            "block_size": int(_field(start, "block_size")),
            "mask_token_id": int(_field(start, "mask_token_id")),
            "causal": bool(_field(start, "causal", False)),
            **{name: int(_field(start, name)) for name in HEAD_SETTINGS[method]},
            **_of_dspark(start, method),
        }
        return BlockStart(start, settings, sizes, layers)


def _field(start: StartFolder, name: str, *default: Any) -> Any:
    """A value at the top or in `dflash_config`. Raises KeyError if there is none and no default, ValueError
    for two."""
    parts = start.config.get("dflash_config") or {}, start.config
    found = [part[name] for part in parts if part.get(name) is not None]
    if not found:
        if default:
            return default[0]
        raise KeyError(name)
    if found[0] != found[-1]:
        raise ValueError(f"{name} is {found[-1]} at the top and {found[0]} in dflash_config")
    return found[0]


def _layers(start: StartFolder) -> tuple[int, ...]:
    """Raises KeyError without any ids, ValueError for lists that mean different layers."""
    config, lists = start.config, list[tuple[int, ...]]()
    for name, numbering in (
        (EAGLE_IDS, "vllm.eagle3"),
        ("aux_hidden_state_layer_ids", "speculators.dflash"),
        ("dspark_target_layer_ids", "dspark"),
    ):
        if config.get(name):
            lists.append(LAYER_IDS[numbering].read([int(k) for k in config[name]]))
    if not lists or _field(start, "target_layer_ids", None):
        lists.append(LAYER_IDS["dflash"].read([int(k) for k in _field(start, "target_layer_ids")]))
    if len(set(lists)) > 1:
        raise ValueError(f"its lists of layer ids mean different layers: {' and '.join(map(str, lists))}")
    return lists[0]


def _of_dspark(start: StartFolder, method: str) -> dict[str, Any]:
    """Whether the first place guesses, and whether there is a confidence head."""
    if method != "dspark":
        return {}
    is_packaged = KIND in start.config
    from_anchor = _field(start, "sample_from_anchor", *([] if is_packaged else [True]))
    enabled = bool(_field(start, "enable_confidence_head", *([] if is_packaged else [True])))
    if enabled and not _field(start, "confidence_head_with_markov", False):
        raise ValueError("its confidence head does not read the token before a place, and the one here does")
    return {"sample_from_anchor": bool(from_anchor), **({} if enabled else {"confidence_weight": 0.0})}


def _refuse_what_is_not_here(start: StartFolder, method: str) -> None:
    """Raises ConfigError, ValueError."""
    for name, usual in NOT_HERE.items():
        if (value := _field(start, name, usual)) != usual:
            raise start.refused(f"it sets {name} to {value}", WHY_NOT_HERE)
    for name, wanted in HEAD_FIELDS[method].items():
        if (value := _field(start, name)) != wanted:
            raise start.refused(f"its {name} is {value!r}, and the head here has {wanted!r}", WHY_NOT_HERE)
    projector = _field(start, "projector_type", method)  # some folders write the method's name there
    if projector not in ("dflash", method):
        raise start.refused(f"its projector_type is {projector!r}, and method.name is {method}", WHY_NOT_HERE)
    if method != "dspark" and _field(start, "sample_from_anchor", False):
        raise start.refused("its first place guesses, which servers refuse of this method", WHY_NOT_HERE)
    if "sliding_attention" in (start.decoder.get("layer_types") or []):
        raise start.refused("a layer of it slides a window", WHY_NOT_HERE)
    if start.decoder.get("use_sliding_window") and not start.decoder.get("layer_types"):
        raise start.refused("it does not say which of its layers slide a window", WHY_NOT_HERE)
    if (start.path / "mask_embedding.pt").exists():
        raise start.refused("it has a mask token's embedding of its own", WHY_NOT_HERE)
