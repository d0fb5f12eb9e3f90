"""config.json of the EAGLE-3 or P-EAGLE draft that a run starts from. No torch.

A field that asks for arithmetic that the draft here does not have is refused, whatever servers make of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from paceline.section import Section
from paceline.target.layer_ids import EAGLE_IDS, LAYER_IDS

# A window is longer than any chain of guesses, so that a guess sees all guesses before it.
WINDOW_MIN = 17
EAGLE3, P_EAGLE = "eagle3", "p-eagle"
ARCHITECTURES = {
    EAGLE3: ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "Eagle3Speculator", "Eagle3DraftModel"),
    P_EAGLE: (
        *("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "PeagleLlamaForCausalLM"),
        *("PEagleSpeculator", "PEagleDraftModel"),
    ),
}
KINDS = {EAGLE3: "eagle3", P_EAGLE: "peagle"}
# Settings that a folder decides; the last one is P-EAGLE's.
SHAPE = ("draft_vocab_size", "norm_before_fc", "fc_norm", "norm_output", "sliding_window", "mask_token_id")
MASKS = ("mask_token_id", "pard_token", "ptd_token_id")


@dataclass(frozen=True)
class StartConfig:
    """The draft's own sizes under the names of `Eagle3Config`, and the layers that it reads."""

    start: StartFolder
    sizes: Mapping[str, Any]  # without the layer ids
    block_ids: tuple[int, ...] | None  # counted in blocks
    layer_ids: tuple[int, ...] | None  # of blocks, counted from 0

    def layers(self, num_hidden_layers: int) -> tuple[int, ...] | None:
        """The layers that are fused, as numbers of blocks; None: the default ones.

        Raises ConfigError if the folder gives two meanings, or layers that this target has not.
        """
        both = [ids for ids in (self.block_ids, self._from_zero()) if ids is not None]
        if len(set(both)) > 1:
            raise self.start.refused(
                f"its two lists of layer ids mean different layers: {both[0]} and {both[1]}",
                "vLLM and SGLang would read other states; correct the list that is wrong.",
            )
        if not both:
            return None
        LAYER_IDS["vllm.eagle3"].written(both[0], num_hidden_layers)
        return both[0]

    def refuse_other_settings(self, section: Section) -> None:
        """Raise ConfigError for a setting of the draft's shape that is not the folder's."""
        names = [name for name in SHAPE if name in type(section).model_fields]
        refuse_other_settings(self.start, section, {name: self.sizes[name] for name in names})

    def _from_zero(self) -> tuple[int, ...] | None:
        return None if self.layer_ids is None else LAYER_IDS["sglang.eagle3"].read(self.layer_ids)


def read_start_config(folder: Path, method: str = EAGLE3) -> StartConfig:
    """Raises ConfigError for a folder that is missing, no draft of `method`, or not implemented here."""
    start = read_start_folder(folder)
    refuse_other_method(start, method, ARCHITECTURES[method], KINDS[method])
    config, decoder = start.config, start.decoder
    with start.reading():
        _refuse_what_is_not_here(start)
        sizes = {
            **decoder_sizes(start),
            "draft_vocab_size": int(config.get("draft_vocab_size") or decoder["vocab_size"]),
            **_variant(config, decoder),
            **_mask(config, method),
        }
        return StartConfig(
            start=start,
            sizes=sizes,
            block_ids=_ids(config.get(EAGLE_IDS)),
            layer_ids=_ids((config.get("eagle_config") or {}).get(EAGLE_IDS)),
        )


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


def _mask(config: Mapping[str, Any], method: str) -> dict[str, Any]:
    """The token that a parallel draft's further rows read. Raises ValueError if the folder names none, or
    two, or asks for norms that servers leave out of a parallel draft."""
    named = {int(config[field]) for field in MASKS if config.get(field) is not None}
    if method == EAGLE3:
        if config.get("parallel_drafting"):
            raise ValueError("it drafts in parallel: method.name is p-eagle for such a draft")
        return {}
    if len(named) != 1:
        raise ValueError(f"its mask token is {' and '.join(map(str, sorted(named))) or 'missing'}")
    if config.get("fc_norm") or config.get("use_aux_norm") or config.get("norm_output"):
        raise ValueError("servers leave fc_norm and norm_output out of a draft in parallel")
    return {"mask_token_id": named.pop()}


def _ids(value: Any) -> tuple[int, ...] | None:
    return tuple(int(layer) for layer in value) if value else None  # an empty list means the default


def _refuse_what_is_not_here(start: StartFolder) -> None:
    config, decoder = start.config, start.decoder
    refuse_other_layers(start)
    meanings = {"norm_before_residual": "the residual is the normed state", "bias": "fc has a bias"}
    for field, meaning in meanings.items():
        if config.get(field) or decoder.get(field):
            raise start.refused(f"it sets {field}: {meaning}", WHY_NOT_HERE)
    if config.get(KIND) == KINDS[EAGLE3] and "norm_before_residual" not in config:
        reason = "it does not say norm_before_residual, which servers read differently"
        raise start.refused(reason, WHY_NOT_HERE)
    if not (config.get("eagle_config") or {}).get("use_aux_hidden_state", True):
        raise start.refused("it reads only the target's last state", WHY_NOT_HERE)
    if int(decoder.get("num_hidden_layers", 1)) != 1:
        layers = decoder["num_hidden_layers"]
        raise start.refused(f"it has {layers} layers, and a draft here has one", WHY_NOT_HERE)
