"""Exports of EAGLE-3.1 drafts: what servers read of them, and mistakes that no server would tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from exports_case import Case, make_case
from safetensors.torch import load_file

from paceline.errors import ConfigError
from paceline.exports.serving import Served, commands
from paceline.exports.table import EXPORTS
from paceline.methods.eagle3.method import Eagle3Method
from paceline.target.head import TargetHead

WINDOW = 18
VARIANTS: dict[str, dict[str, Any]] = {
    "aux_layers": {"aux_layers": (1, 3, 4, 7)},
    "fc_norm": {"fc_norm": True, "norm_output": True},
    "norm_before_fc": {"norm_before_fc": True},
    "parallel": {"name": "p-eagle", "norm_before_fc": True, "mask_token_id": 9},
    "sliding_window": {"norm_output": True, "sliding_window": WINDOW},
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("targets")
    return {name: make_case(folder / name, **choices) for name, choices in VARIANTS.items()}


def _edited(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize("name", ["fc_norm", "norm_before_fc"])
@pytest.mark.parametrize("server", EXPORTS.names())
def test_every_server_drafts_with_the_norms(
    cases: dict[str, Case], name: str, server: str, tmp_path: Path
) -> None:
    """By each one's rules the guesses are the trainer's, and not if the field is lost."""
    folder = cases[name].export(server, tmp_path / "draft")
    verdict = cases[name].check(server, folder)
    assert verdict.problems == ()
    assert verdict.error < 1e-5
    assert cases[name].check(server, _edited(folder, **{name: False})).problems


@pytest.mark.parametrize("server", EXPORTS.names())
def test_every_server_is_told_which_states_the_draft_reads(
    cases: dict[str, Case], server: str, tmp_path: Path
) -> None:
    """Four of them, where a server that is told nothing takes three others."""
    folder = cases["aux_layers"].export(server, tmp_path / "draft")
    config = json.loads((folder / "config.json").read_text())
    told = [
        config.get("eagle_aux_hidden_state_layer_ids"),  # in blocks
        [k + 1 for k in config.get("eagle_config", {}).get("eagle_aux_hidden_state_layer_ids", [])],
    ]
    assert [1, 3, 4, 7] in told
    verdict = cases["aux_layers"].check(server, folder)
    assert verdict.problems == ()
    assert verdict.error < 1e-5


def test_a_lost_norm_of_the_output_is_found(cases: dict[str, Case], tmp_path: Path) -> None:
    """It is a flag alone, with no tensor: servers would feed back another state without a word."""
    folder = cases["fc_norm"].export("vllm", tmp_path / "draft")
    assert "logits" in cases["fc_norm"].check("vllm", _edited(folder, norm_output=False)).problems[0]


@pytest.mark.parametrize("server", ["vllm", "speculators"])
def test_a_parallel_draft_is_for_the_servers_that_guess_in_parallel(
    cases: dict[str, Case], server: str, tmp_path: Path
) -> None:
    """With the mask token that the trainer's decoder read; with another one the guesses are others."""
    case = cases["parallel"]
    folder = case.export(server, tmp_path / "draft")
    assert case.check(server, folder).problems == ()
    mask = load_file(folder / "model.safetensors")["mask_hidden"]
    assert torch.equal(mask.view(1, -1), case.draft.tensors["mask_hidden"])
    assert case.check(server, _edited(folder, mask_token_id=8)).problems
    lost = json.loads((folder / "config.json").read_text())
    lost = {key: value for key, value in lost.items() if key not in ("mask_token_id", "pard_token")}
    (folder / "config.json").write_text(json.dumps(lost))
    assert "mask_token_id" in case.check(server, folder).problems[0]


@pytest.mark.parametrize("server", ["sglang", "hf"])
def test_a_parallel_draft_is_refused_for_servers_that_guess_one_by_one(
    cases: dict[str, Case], server: str, tmp_path: Path
) -> None:
    """SGLang would ignore `mask_hidden` and feed the draft its own outputs, without a word."""
    with pytest.raises(ConfigError, match="p-eagle"):
        cases["parallel"].export(server, tmp_path / "draft")


def test_the_command_of_a_parallel_draft_says_so() -> None:
    """vLLM's method is EAGLE-3's, and a flag makes it draft in parallel."""
    command = commands("vllm", Served("org/target", "/there", "p-eagle", 4))["vllm"]
    speculation = json.loads(command[command.index("--speculative-config") + 1])
    assert (speculation["method"], speculation["parallel_drafting"]) == ("eagle3", True)


def test_a_window_is_in_the_config_of_the_server_that_reads_it(
    cases: dict[str, Case], tmp_path: Path
) -> None:
    """vLLM does; an export for servers that do not is refused, since they would attend to all rows."""
    case = cases["sliding_window"]
    folder = case.export("vllm", tmp_path / "draft")
    config = json.loads((folder / "config.json").read_text())
    assert (config["sliding_window"], config["layer_types"]) == (WINDOW, ["sliding_attention"])
    assert case.check("vllm", folder).problems == ()
    assert case.check("vllm", _edited(folder, sliding_window=WINDOW - 1)).problems
    assert case.check("vllm", _edited(folder, layer_types=["full_attention"])).problems
    for server in EXPORTS.names():
        if server != "vllm":
            with pytest.raises(ConfigError, match="sliding window"):
                case.export(server, tmp_path / server)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "parallel"])
def test_a_draft_starts_from_its_export_with_the_same_choices(
    cases: dict[str, Case], name: str, tmp_path: Path
) -> None:
    """Weights and choices come from the folder, without a word in the settings."""
    case = cases[name]
    method = Eagle3Method({"start_from": case.export("vllm", tmp_path / "draft")})
    draft = method.build(TargetHead.load(case.folder), [], seed=0)
    sizes = method.describe(draft)
    assert sizes == case.draft.sizes
    assert all(torch.equal(tensor, case.draft.tensors[key]) for key, tensor in draft.state_dict().items())
    loaded = draft.state_dict().keys()
    assert loaded == case.draft.tensors.keys()
