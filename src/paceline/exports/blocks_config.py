"""config.json of an exported block draft: DFlash, and the methods that add a head to it.

vLLM and SGLang read it flat, with a part in `dflash_config`. Each looks for some values in one place and
some in the other, so what either reads is in both.
"""

from __future__ import annotations

from typing import Any

from paceline.exports.config import decoder_config, provenance
from paceline.exports.export import ExportedDraft
from paceline.target.layer_ids import LAYER_IDS

ARCHITECTURES = {
    "dflash": "DFlashDraftModel",
    "dspark": "Qwen3DSparkModel",
    "domino": "DFlashDraftModel",  # with its `projector_type`
    "dflash2": "DFlash2DraftModel",
}
# What a head adds, by the servers' names.
HEAD_FIELDS: dict[str, tuple[str, ...]] = {
    "dflash": (),
    "dspark": ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov"),
    "domino": ("projector_type", "gru_hidden_dim", "emb_dim", "pure_draft_prefix_len", "shift_label"),
    "dflash2": ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k"),
}


def block_config(draft: ExportedDraft) -> dict[str, Any]:
    """The layout that vLLM and SGLang load."""
    sizes, layers = draft.sizes, int(draft.sizes["num_hidden_layers"])
    depth = int(draft.target.config["num_hidden_layers"])
    both = {
        "target_layer_ids": LAYER_IDS["dflash"].written(sizes["aux_layer_ids"], depth),
        "block_size": sizes["block_size"],
        "mask_token_id": sizes["mask_token_id"],
        "sample_from_anchor": sizes["sample_from_anchor"],
        **{name: sizes[name] for name in HEAD_FIELDS[draft.method]},
    }
    return {
        "architectures": [ARCHITECTURES[draft.method]],
        **decoder_config(draft, "qwen3", layers),
        "layer_types": ["full_attention"] * layers,
        "sliding_window": None,
        "use_sliding_window": False,
        "is_neox_style": True,
        "draft_vocab_size": sizes["vocab_size"],
        "target_hidden_size": sizes["hidden_size"],
        "num_target_layers": depth,
        **both,
        "dflash_config": {**both, "causal": sizes["causal"]},
        "paceline": provenance(draft),
    }
