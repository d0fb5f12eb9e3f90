"""config.json of the public EAGLE-3 folder that a run starts from. No torch.

Public folders come flat, for vLLM or SGLang, or in the layout of the speculators package. A field that asks
for arithmetic that the draft here does not have is refused, whatever servers make of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paceline.errors import ConfigError
from paceline.target.folder import read_json
from paceline.target.layer_ids import EAGLE_IDS, LAYER_IDS
from paceline.target.rope import rope_parameters

# A window is longer than any chain of guesses, so that a guess sees all guesses before it.
WINDOW_MIN = 17
ARCHITECTURES = frozenset(
    {"LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "Eagle3Speculator", "Eagle3DraftModel"}
)
NOT_HERE = {
    "norm_before_residual": "the residual is the normed state",
    "attention_bias": "its projections have biases",
    "qkv_bias": "its projections have biases",
    "bias": "fc has a bias",
    "mlp_bias": "its projections have biases",
    "parallel_drafting": "it drafts in parallel",
}


@dataclass(frozen=True)
class StartConfig:
    """The draft's own sizes under the names of `Eagle3Config`, and what the folder says of its target."""

    folder: Path
    sizes: Mapping[str, Any]  # without the layer ids
    rope: Mapping[str, Any]  # rope_theta, rope_scaling and rope_parameters, as far as given
    target_hidden_size: int
    target_name: str  # "" if the folder does not say
    target_version: str  # "" if the folder does not say
    block_ids: tuple[int, ...] | None  # counted in blocks
    layer_ids: tuple[int, ...] | None  # of blocks, counted from 0

    @property
    def names_its_target(self) -> bool:
        return bool(self.target_name or self.target_version)

    def layers(self, num_hidden_layers: int) -> tuple[int, ...] | None:
        """The layers that are fused, as numbers of blocks; None: the default ones.

        Raises ConfigError if the folder gives two meanings, or layers that this target has not.
        """
        both = [ids for ids in (self.block_ids, self._from_zero()) if ids is not None]
        if len(set(both)) > 1:
            raise refused(
                self.folder,
                f"its two lists of layer ids mean different layers: {both[0]} and {both[1]}",
                "vLLM and SGLang would read other states; correct the list that is wrong.",
            )
        if not both:
            return None
        LAYER_IDS["vllm.eagle3"].written(both[0], num_hidden_layers)
        return both[0]

    def _from_zero(self) -> tuple[int, ...] | None:
        return None if self.layer_ids is None else LAYER_IDS["sglang.eagle3"].read(self.layer_ids)


def read_start_config(folder: Path) -> StartConfig:
    """Raises ConfigError for a folder that is missing, no EAGLE-3 draft's, or not implemented here."""
    config = read_json(folder / "config.json")
    nested = config.get("transformer_layer_config")
    decoder = nested if isinstance(nested, dict) else config
    _refuse_what_is_not_here(folder, config, decoder)
    try:
        heads, hidden = int(decoder["num_attention_heads"]), int(decoder["hidden_size"])
        sizes = {
            "hidden_size": hidden,
            "intermediate_size": int(decoder["intermediate_size"]),
            "num_attention_heads": heads,
            "num_key_value_heads": int(decoder.get("num_key_value_heads") or heads),
            "head_dim": int(decoder.get("head_dim") or hidden // heads),
            "vocab_size": int(decoder["vocab_size"]),
            "draft_vocab_size": int(config.get("draft_vocab_size") or decoder["vocab_size"]),
            "rms_norm_eps": float(decoder["rms_norm_eps"]),
            "max_position_embeddings": int(decoder.get("max_position_embeddings", 2048)),
            **_variant(config, decoder),
        }
        known = config.get("paceline", {}).get("target", {})
        verifier = config.get("speculators_config", {}).get("verifier", {})
        return StartConfig(
            folder=folder,
            sizes=sizes,
            rope={k: decoder[k] for k in ("rope_theta", "rope_scaling", "rope_parameters") if k in decoder},
            target_hidden_size=int(config.get("target_hidden_size") or hidden),
            target_name=str(known.get("name") or verifier.get("name_or_path") or ""),
            target_version=str(known.get("model", "")),
            block_ids=_ids(config.get(EAGLE_IDS)),
            layer_ids=_ids((config.get("eagle_config") or {}).get(EAGLE_IDS)),
        )
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        reason = f"{error} is missing in its config.json" if isinstance(error, KeyError) else str(error)
        raise refused(folder, reason, "Its sizes are the draft's.") from error


def _variant(config: Mapping[str, Any], decoder: Mapping[str, Any]) -> dict[str, Any]:
    """EAGLE-3.1's choices, under the names of `Eagle3Config`. Raises ValueError for two that exclude each
    other, and for a window that a chain of guesses may outgrow."""
    nested = config.get("eagle_config") or {}
    before = bool(nested.get("norm_before_fc", config.get("norm_before_fc", False)))
    each = bool(config.get("fc_norm") or config.get("use_aux_norm"))
    if before and each:
        raise ValueError("it norms the target's states twice, as one and each alone")
    is_windowed = "sliding_attention" in (decoder.get("layer_types") or [])
    window = int(decoder["sliding_window"]) if is_windowed else None
    if window is not None and window < WINDOW_MIN:
        raise ValueError(f"its sliding window is {window}, less than {WINDOW_MIN}")
    return {
        "norm_before_fc": before,
        "fc_norm": each,
        "norm_output": bool(config.get("norm_output")),
        "sliding_window": window,
    }


def _ids(value: Any) -> tuple[int, ...] | None:
    return tuple(int(layer) for layer in value) if value else None  # an empty list means the default


def _refuse_what_is_not_here(folder: Path, config: Mapping[str, Any], decoder: Mapping[str, Any]) -> None:
    why = "Paceline's draft does not compute that, so its first outputs would be others than the folder's."
    if not ARCHITECTURES & set(config.get("architectures") or []):
        raise refused(folder, f"its architectures are {config.get('architectures')}", why)
    if config.get("speculators_model_type", "eagle3") != "eagle3":
        raise refused(folder, f"its speculators_model_type is {config['speculators_model_type']!r}", why)
    if "speculators_model_type" in config and "norm_before_residual" not in config:
        raise refused(folder, "it does not say norm_before_residual, which servers read differently", why)
    for field, meaning in NOT_HERE.items():
        if config.get(field) or decoder.get(field):
            raise refused(folder, f"it sets {field}: {meaning}", why)
    if not (config.get("eagle_config") or {}).get("use_aux_hidden_state", True):
        raise refused(folder, "it reads only the target's last state", why)
    if int(decoder.get("num_hidden_layers", 1)) != 1:
        raise refused(folder, f"it has {decoder['num_hidden_layers']} layers, and a draft here has one", why)
    if ({**decoder, **rope_parameters(decoder)}.get("partial_rotary_factor") or 1.0) != 1.0:
        raise refused(folder, "its rotary embedding is partial", why)
    if decoder.get("hidden_act", "silu") != "silu":
        raise refused(folder, f"its hidden_act is {decoder['hidden_act']!r}", why)


def refused(folder: Path, reason: str, why: str) -> ConfigError:
    return ConfigError(
        f"A run cannot start from {folder}: {reason}.",
        why=why,
        next="set method.start_from to another EAGLE-3 folder of the same target, or leave it out.",
    )
