"""The command that starts a vLLM server which writes the states that a run trains on. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from paceline.engines.vllm.settings import VllmSection
from paceline.target.layer_ids import LAYER_IDS
from paceline.types import Feature, layers_of

HOST = "127.0.0.1"


def served_layers(features: Sequence[Feature], num_hidden_layers: int) -> tuple[int, ...]:
    """The layers whose states the server writes: the features' own, and the last, which proves the text."""
    return tuple(sorted(layers_of(features) | {num_hidden_layers}))


def serve_command(
    section: VllmSection, model: Path, dtype: str, layers: Sequence[int], num_hidden_layers: int, folder: Path
) -> list[str]:
    """The command without its port. Raises ConfigError for layers that vLLM cannot write.

    Cached prefixes have no states, so the cache of prefixes is off. Defaults that the model's folder names
    for sampling do not apply.
    """
    ids = LAYER_IDS["vllm.extract_hidden_states"].written(layers, num_hidden_layers)
    speculative = {
        "method": "extract_hidden_states",
        "num_speculative_tokens": 1,
        "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": ids}},
    }
    module, _, connector = section.connector.rpartition(":")
    transfer = {
        "kv_connector": connector,
        **({"kv_connector_module_path": module} if module else {}),
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"shared_storage_path": str(folder.absolute())},
    }
    parallel = ["--tensor-parallel-size", str(len(section.devices))] if len(section.devices) > 1 else []
    return [
        *section.program,
        *(str(model.absolute()), "--dtype", dtype, "--host", HOST),
        *("--generation-config", "vllm", "--no-enable-prefix-caching"),
        *("--speculative-config", json.dumps(speculative, separators=(",", ":"))),
        *("--kv-transfer-config", json.dumps(transfer, separators=(",", ":"))),
        *parallel,
        *section.args,
    ]
