"""An exported folder is whole or absent, replaces only its like, and holds exactly what the tables name."""

from __future__ import annotations

import json
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from exports_case import Case, adapter, without
from safetensors.torch import load_file
from transformers import LlamaConfig

from paceline.dashboard.report import report_page
from paceline.errors import ConfigError
from paceline.exports.card import model_card
from paceline.exports.folder import write_folder
from paceline.exports.reader.replay import Verdict
from paceline.exports.serving import Served, commands
from paceline.run_report.document import Check, MeasuredCheckpoint, MeasuredWay, RoleCost, Rule, RunReport
from paceline.run_report.tables import acceptance, cost, guarantee


def test_config_names_the_layers_in_both_meanings_and_every_flag(case: Case, tmp_path: Path) -> None:
    """What vLLM and SGLang each read, and nothing left to a default."""
    config = json.loads((case.export("vllm", tmp_path / "draft") / "config.json").read_text())
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 3, 4]
    assert config["num_aux_hidden_states"] == 3
    for flag in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "tie_word_embeddings"):
        assert config[flag] is False
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 50000.0
    assert config["max_position_embeddings"] == 256
    assert config["paceline"]["target"]["model"] == case.draft.target.version.model
    assert config["paceline"]["step"] == 7


def test_the_library_reads_the_rotary_embedding_that_was_written(case: Case, tmp_path: Path) -> None:
    """transformers, through which servers read config.json, has the same base."""
    library = LlamaConfig.from_pretrained(case.export("sglang", tmp_path / "draft"))
    assert library.rope_parameters["rope_theta"] == 50000.0


def test_names_are_those_of_each_server(case: Case, tmp_path: Path) -> None:
    """vLLM and speculators number the layer, SGLang calls it midlayer; the weights are the same bits."""
    vllm, sglang, speculators = (
        load_file(case.export(name, tmp_path / name) / "model.safetensors")
        for name in ("vllm", "sglang", "speculators")
    )
    assert (
        {name.replace("layers.0.", "midlayer.") for name in vllm}
        == sglang.keys()
        == case.draft.tensors.keys()
    )
    assert speculators.keys() == {*vllm, "embed_tokens.weight"}
    for name, tensor in case.draft.tensors.items():
        assert torch.equal(vllm[name.replace("midlayer.", "layers.0.")], tensor)


def test_a_missing_surplus_or_misshapen_tensor_is_an_error_before_anything_is_written(case: Case) -> None:
    """With the names."""
    with pytest.raises(ConfigError, match=r"layers.0.mlp.up_proj.weight is missing"):
        adapter("vllm").build(without(case, "midlayer.mlp.up_proj.weight").draft)
    tensors = {**case.draft.tensors, "extra.weight": torch.ones(1), "norm.weight": torch.ones(7)}
    with pytest.raises(ConfigError, match=r"extra.weight is surplus; norm.weight has the shape \(7,\)"):
        adapter("sglang").build(replace(case.draft, tensors=tensors))


def test_a_folder_that_no_export_wrote_is_not_overwritten(case: Case, tmp_path: Path) -> None:
    """Nor one that somebody has added to, or changed."""
    folder = tmp_path / "draft"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not overwritten"):
        case.export("vllm", folder)
    (folder / "notes.txt").unlink()
    case.export("vllm", folder)
    case.export("sglang", folder)
    assert "midlayer.mlp.up_proj.weight" in load_file(folder / "model.safetensors")
    (folder / "README.md").write_text("my own words")
    with pytest.raises(ConfigError, match=r"README.md was changed"):
        case.export("vllm", folder)
    assert (folder / "README.md").read_text() == "my own words"


def test_a_failed_check_leaves_the_old_folder(case: Case, tmp_path: Path) -> None:
    """And nothing beside it."""
    folder = case.export("vllm", tmp_path / "draft")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fails(aside: Path) -> tuple[str, dict[str, object]]:
        raise ConfigError("no")

    with pytest.raises(ConfigError):
        write_folder(folder, adapter("sglang").build(case.draft), fails)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["draft"]


def test_a_draft_of_another_method_is_refused(case: Case) -> None:
    """Its tensors would mean something else."""
    with pytest.raises(ConfigError, match="method 'other'"):
        adapter("vllm").build(replace(case.draft, method="other"))


MEASURED = MeasuredCheckpoint(
    step=7,
    prompts=24,
    prompts_file="heldout.jsonl",
    max_new_tokens=96,
    dtype="float32",
    device="cpu",
    identical=24,
    ways=(
        MeasuredWay(
            name="draft",
            guesses="chain of 3",
            acceptance_length=1.48,
            acceptance_length_interval=(1.4, 1.56),
            emitted_per_cycle=1.457,
            acceptance_rate=(0.35, 0.1, 0.03),
            speed_up=1.31,
            speed_up_interval=(1.25, 1.375),
        ),
        MeasuredWay(
            name="prompt lookup, no draft",
            guesses="chain of 7",
            acceptance_length=1.2,
            emitted_per_cycle=1.19,
            acceptance_rate=(0.2,),
        ),
    ),
)
RULES = (Rule(name="C1", promise="every sample is trained"), Rule(name="C5", promise="bytes | are kept"))
REPORT = RunReport(
    version="1",
    time=0.0,
    run="a run",
    directory="/home/someone/run",
    state="complete",
    steps=9,
    restarts=1,
    samples={"committed": 8, "trained": 8, "provisional": 0, "quarantined": 0, "failed": 0},
    checkpoint="step-9, manifest abc",
    plans="def",
    measured=(MEASURED,),
    best_step=7,
    check=Check(sound=True, looked_at={"samples": 8}, rules=RULES),
    cost=(RoleCost(role="consumer", starts=2, killed=1, seconds=3900.0),),
    seconds=4000.0,
    settings={"target.model": "/home/someone/model"},
)


def test_the_card_tells_both_acceptance_lengths_and_how_they_were_measured(case: Case) -> None:
    """Each by its name; or that nothing was measured."""
    lines = commands("vllm", Served("org/target", "/there", "eagle3", 3))
    card = model_card(case.draft, lines, REPORT, Verdict((), 24, 3e-7), "rows of 3 prompts")
    measured = (
        "24 held-out prompts of heldout.jsonl, up to 96 tokens an answer, in float32 on cpu. 24 answers"
    )
    assert measured in card
    assert "The checkpoint's own weights were measured, before they were written here in float32." in card
    for told in (
        "| chain of 3 | 1.480 [1.400, 1.560] | 1.457 | 0.350, 0.100, 0.030 | 1.31 [1.25, 1.38] |",
        "prompt lookup, no draft: chain of 7 | 1.200 | 1.190",
        "24 held-out prompts",
        "vllm serve org/target",
    ):
        assert told in card
    assert case.draft.target.version.model in card
    never = msgspec.structs.replace(REPORT, measured=())
    unmeasured = model_card(case.draft, lines, never, Verdict((), 24, 3e-7), "rows")
    assert "was not measured" in unmeasured
    assert "weights were measured" not in unmeasured


def test_the_card_and_the_report_cannot_disagree(case: Case) -> None:
    """What was measured, checked and paid is made once; a page and a card only set it."""
    broken = Rule(name="C5", promise="bytes | are kept", errors=("/home/someone/run: <b>gone",))
    unsound = msgspec.structs.replace(REPORT, check=Check(sound=False, rules=(RULES[0], broken)))
    unknown = msgspec.structs.replace(REPORT, check=Check(sound=None, why="it is another user's"))
    noted = msgspec.structs.replace(REPORT, check=Check(sound=True, rules=RULES, notes=2))
    assert any("noted" in words and "2;" in words for words in guarantee(noted.check).told)
    for report in (REPORT, unsound, unknown, noted):
        card = model_card(case.draft, {}, report, Verdict((), 24, 3e-7), "rows")
        page = report_page(report, None)
        for part in (acceptance(MEASURED, is_best=True), guarantee(report.check), cost(report)):
            for words in part.told:
                assert f">{escape(words)}</p>" in page
                assert (f"**{words}**\n" if part.is_bad else f"\n{words}\n") in card
            for row in part.rows:
                assert "".join(f"<td>{escape(cell)}</td>" for cell in row) in page
                assert f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" in card
        assert "/home/someone" not in card, "a card is for others"
    assert "1 error |" in model_card(case.draft, {}, unsound, Verdict((), 24, 3e-7), "rows")


def test_the_card_tells_that_the_draft_has_not_the_targets_rotary_scaling(case: Case) -> None:
    """One that changes with the length of the text cannot be taken over; a fixed one is, without a word."""

    def card(kind: str, scaling: dict[str, Any] | None) -> str:
        config = {**case.draft.target.config, "rope_parameters": {"rope_type": kind}}
        target = replace(case.draft.target, config=config)
        draft = replace(case.draft, target=target, sizes={**case.draft.sizes, "rope_scaling": scaling})
        return model_card(draft, {}, REPORT, Verdict((), 24, 3e-7), "rows")

    line = "| rotary embedding | plain frequencies; the target's are of the kind 'longrope' |"
    assert line in card("longrope", None).splitlines()
    assert "plain frequencies" not in card("default", None) + card("yarn", {"rope_type": "yarn"})


def test_a_server_is_never_given_a_name_as_an_option() -> None:
    """The note of a run's exports is a file, and what it says may have been written by others."""
    with pytest.raises(ConfigError, match="no name of a target"):
        commands("vllm", Served("--trust-remote-code", "/there", "eagle3", 3))
    with pytest.raises(ConfigError, match="no name of a target"):
        commands("vllm", Served("org/target", "/there", "eagle3", 3, revision="--trust-remote-code"))
    assert commands("of another package", Served("org/target", "/there", "other", 3)) == {}


def test_servers_are_told_the_revision_of_a_target_of_the_hub() -> None:
    """A branch moves; the draft belongs to one commit. A path has none."""
    served = Served("org/target", "/there", "eagle3", 3, revision="abc")
    for command in commands("sglang", served).values():
        assert command[command.index("org/target") + 1 :][:2] == ["--revision", "abc"]
    for command in commands("sglang", replace(served, revision="")).values():
        assert "--revision" not in command
