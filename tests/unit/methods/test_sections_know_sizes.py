"""A method's section says without torch what its draft is in the end: `paceline plan` relies on it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from paceline.errors import ConfigError
from paceline.methods.table import METHODS
from paceline.target.facts import TargetFacts
from paceline.target.head import TargetHead
from paceline.target.shape import LayerSizes
from paceline.testing.tiny_target import HIDDEN, LAYERS, VOCAB, save_target, tiny_target
from paceline.types import States

SIZES = LayerSizes(HIDDEN, LAYERS, VOCAB, 48, 4, 2, 8)
CHOICES: list[tuple[str, dict[str, Any]]] = [
    ("eagle3", {"draft_vocab_size": 48}),
    ("eagle3", {"draft_vocab_size": 8192, "norm_before_fc": True}),
    ("eagle3", {"draft_vocab_size": 48, "fc_norm": True, "train_lm_head": False}),
    ("eagle3", {"draft_vocab_size": 48, "fc_norm": True, "aux_layers": (1, 3, 5, 7)}),
    ("p-eagle", {"draft_vocab_size": 48}),
    ("p-eagle", {"draft_vocab_size": 48, "aux_layers": (3, 6)}),
    ("dflash", {"layers": 3, "target_states": 2}),
    ("dflash", {"layers": 1, "aux_layers": (1, 4, 5, 7)}),
    ("dspark", {"markov_rank": 6, "target_states": 3}),
    ("dspark", {"confidence_weight": 0.0, "target_states": 3}),
    ("domino", {"gru_hidden_dim": 12, "emb_dim": 5, "target_states": 3}),
    ("dflash2", {"selector_rank": 6, "conv_kernel_size": 3, "target_states": 3}),
]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> TargetHead:
    return TargetHead.load(save_target(tiny_target(), tmp_path_factory.mktemp("target")))


@pytest.mark.parametrize(
    ("name", "knobs"), CHOICES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_the_parameters_are_those_of_the_draft(head: TargetHead, name: str, knobs: dict[str, Any]) -> None:
    section = METHODS.find(name).parse({"name": name, "init": "random", **knobs})
    with torch.device("meta"):
        draft = section.build()._empty(head)
    assert section.num_parameters(SIZES) == sum(part.numel() for part in draft.parameters())


@pytest.mark.parametrize("name", METHODS.own)
def test_the_states_that_a_run_file_names_are_captured(name: str) -> None:
    """In its order, which is that of the draft's columns; states that some server cannot give are refused,
    and so is a second count of them."""
    facts = TargetFacts(32, 12, 61, "float32", (2,), "model", "tokenizer")
    section = METHODS.find(name)
    chosen = section.parse({"name": name, "aux_layers": [1, 6, 9, 11]}).features(facts)
    assert [f.source.layers for f in chosen if isinstance(f.source, States)] == [(1, 6, 9, 11), (12,)]
    for wrong in ([6, 1], [3, 3], [0, 5], [5, 12]):
        with pytest.raises(ConfigError, match=r"method\.aux_layers is \["):
            section.parse({"name": name, "aux_layers": wrong}).features(facts)
    with pytest.raises(ConfigError, match="aux_layers"):
        section.parse({"name": name, "aux_layers": []})
    if "target_states" in section.model_fields:
        with pytest.raises(ConfigError, match="target_states is 3, and aux_layers names 2"):
            section.parse({"name": name, "aux_layers": [1, 6], "target_states": 3})


def test_features_are_known_without_torch(tmp_path: Path) -> None:
    """Every method's, in a process of its own."""
    code = (
        "import sys\n"
        "from paceline.methods.table import METHODS\n"
        "from paceline.target.facts import TargetFacts\n"
        f"facts = {TargetFacts(32, 12, 61, 'float32', (2,), 'model', 'tokenizer')!r}\n"
        "for name in METHODS.own:\n"
        "    assert METHODS.find(name).parse({'name': name}).features(facts), name\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
