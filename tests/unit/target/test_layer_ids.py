"""Layer ids: one number more or less is another state, and no server notices it."""

from __future__ import annotations

import pytest

from paceline.errors import ConfigError
from paceline.target.layer_ids import LAYER_IDS

# What each format holds for the states after 2, 15 and 27 of 30 blocks, and where.
SAME, ONE_LESS = [2, 15, 27], [1, 14, 26]
WRITTEN = {
    "vllm.extract_hidden_states": (SAME, "draft_model_config.hf_config.eagle_aux_hidden_state_layer_ids"),
    "vllm.eagle3": (SAME, "eagle_aux_hidden_state_layer_ids"),
    "speculators.eagle3": (SAME, "eagle_aux_hidden_state_layer_ids"),
    "speculators.dflash": (SAME, "aux_hidden_state_layer_ids"),
    "speculators.dspark": (SAME, "aux_hidden_state_layer_ids"),
    "sglang.eagle3": (ONE_LESS, "eagle_config.eagle_aux_hidden_state_layer_ids"),
    "dflash": (ONE_LESS, "dflash_config.target_layer_ids"),
    "dspark": (ONE_LESS, "target_layer_ids"),
}


def test_every_format_names_the_same_states_by_its_own_ids() -> None:
    """Written and read again, they are the layers that were asked for."""
    assert WRITTEN.keys() == LAYER_IDS.keys()
    for name, (ids, field) in WRITTEN.items():
        numbering = LAYER_IDS[name]
        assert numbering.field == field
        assert numbering.written((2, 15, 27), 30) == ids
        assert numbering.read(ids) == (2, 15, 27)


def test_the_first_input_and_the_last_output_are_named_where_a_server_gives_them() -> None:
    """vLLM gives both; who counts blocks from 0 has no id for the input, and SGLang drops the last output."""
    assert LAYER_IDS["vllm.extract_hidden_states"].written((0, 30), 30) == [0, 30]
    for name in ("sglang.eagle3", "dflash", "dspark"):
        assert LAYER_IDS[name].written((1, 29), 30) == [0, 28]
        for layer in (0, 30):
            with pytest.raises(ConfigError, match=f"The state after {layer} of 30 blocks cannot be named"):
                LAYER_IDS[name].written((layer,), 30)
    with pytest.raises(ConfigError, match="from 0 to 30"):
        LAYER_IDS["vllm.eagle3"].written((2, 31), 30)


def test_layers_that_a_server_would_sort_are_refused() -> None:
    """The draft's columns would belong to other layers."""
    for layers in ((15, 2), (2, 2)):
        with pytest.raises(ConfigError, match="do not ascend"):
            LAYER_IDS["vllm.eagle3"].written(layers, 30)
