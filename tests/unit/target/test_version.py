"""A target's version covers what each role reads."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_head import change_weights, edit

from paceline.errors import ConfigError
from paceline.target.version import TargetVersion


def one_weight(name: str) -> Callable[[Path], None]:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights[name].view(-1)[-1] += 1

    return lambda folder: change_weights(folder, change)


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


@pytest.mark.parametrize(
    ("change", "model", "tokenizer"),
    [
        (lambda folder: None, True, True),
        (one_weight("model.embed_tokens.weight"), False, True),
        (one_weight("lm_head.weight"), False, True),
        (one_weight("model.norm.weight"), False, True),
        (one_weight("model.layers.5.self_attn.q_proj.weight"), False, True),
        (lambda folder: edit(folder / "config.json", rms_norm_eps=1e-4), False, True),
        (lambda folder: edit(folder / "generation_config.json", eos_token_id=[2, 9]), False, True),
        (text("chat_template.jinja", "{{ messages }}"), True, False),
        (text("special_tokens_map.json", "{}"), True, False),
        (text("README.md", "a model"), True, True),
    ],
)
def test_the_version_changes_with_what_a_role_reads(
    tiny_model: Path, folder: Path, change: Callable[[Path], object], model: bool, tokenizer: bool
) -> None:
    """Weights of the head whole, of the layers, configuration, end of text, tokenizer, template; no more."""
    before = TargetVersion.of(tiny_model)
    change(folder)
    after = TargetVersion.of(folder)
    assert (after.model == before.model, after.tokenizer == before.tokenizer) == (model, tokenizer)


def test_a_copy_has_the_same_version(tiny_model: Path, tmp_path: Path) -> None:
    """Whatever its folder is called."""
    copy = Path(shutil.copytree(tiny_model, tmp_path / "another name"))
    assert TargetVersion.of(copy) == TargetVersion.of(tiny_model)


def test_a_cut_weight_file_has_no_version(folder: Path) -> None:
    """A download that was interrupted is said to be one."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="incomplete"):
        TargetVersion.of(folder)
