"""What every process of a run plans from its run file: the target's folder, and what cannot be measured."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest

from paceline.config.load import parse_run_config
from paceline.config.run import RunConfig
from paceline.errors import ConfigError
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.roles.binding import bind_run
from paceline.roles.plan import RunPlan, plan_run
from paceline.roles.target_binding import REVISION, bind_target
from paceline.testing.ledger_calls import capture, producer_of
from paceline.testing.tiny_folder import make_tiny_folder

COMMIT, NEWER = "0" * 40, "1" * 40


def plan(folder: Path, model: str, unsupported: str = "skip") -> RunPlan:
    for name in ("train", "heldout"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"id": name, "prompt": name}))
    return plan_run(run_config(folder, model, unsupported))


def run_config(folder: Path, model: str, unsupported: str = "skip") -> RunConfig:
    sections = {
        "run": {"name": "r", "directory": str(folder / "run")},
        "target": {"model": model},
        "data": {"path": str(folder / "train.jsonl")},
        "evaluation": {"prompts": str(folder / "heldout.jsonl"), "unsupported": unsupported},
    }
    return parse_run_config(sections, source="run.yaml")


def test_a_quantised_target_is_trained_without_measuring_or_refused(tmp_path: Path) -> None:
    """Before anything starts, by the run file's own choice."""
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}'
    )
    assert "quantised (fp8)" in plan(tmp_path, str(tmp_path)).evaluation_obstacle
    with pytest.raises(ConfigError, match=r"evaluation cannot decode .*quantised .fp8"):
        plan(tmp_path, str(tmp_path), unsupported="refuse")


@pytest.mark.parametrize("positions", [0, -1, 1])
def test_a_target_without_positions_is_told_to_be_wrong(tmp_path: Path, positions: int) -> None:
    """No setting of the run file would mend it."""
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "max_position_embeddings": positions})
    )
    with pytest.raises(
        ConfigError, match=f"config.json says that the target has {positions} positions"
    ) as caught:
        plan(tmp_path, str(tmp_path))
    assert "max_answer_tokens" not in str(caught.value)


def test_a_held_out_file_without_prompts_is_refused_with_the_setting_that_names_it(tmp_path: Path) -> None:
    """data.path is another file."""
    plan(tmp_path, str(make_tiny_folder(tmp_path / "model")))
    (tmp_path / "heldout.jsonl").write_text("no JSON")
    with pytest.raises(ConfigError, match=r"heldout.jsonl holds no prompt") as caught:
        plan_run(run_config(tmp_path, str(tmp_path / "model")))
    assert "evaluation.prompts" in caught.value.next
    assert "data.path" not in str(caught.value)


def test_a_target_of_the_hub_is_one_folder_for_all_roles_and_bound_by_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run file's name is recorded; where the branch has moved on, the error says how to go on."""
    old, new = (make_tiny_folder(tmp_path / commit, seed=seed) for seed, commit in enumerate((COMMIT, NEWER)))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(old))
    ledger, planned = SQLiteLedger(), plan(tmp_path, "wind/tiny")
    assert planned.config.target.model == old
    bind_run(planned, ledger)
    bind_target(ledger, planned.config)
    assert ledger.facts()["config"]["target.model"] == "wind/tiny"
    assert ledger.facts()[REVISION] == COMMIT
    capture(producer_of(ledger), 0)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(new))
    with pytest.raises(ConfigError, match=f"set target.revision to {COMMIT}"):
        bind_target(ledger, plan(tmp_path, "wind/tiny").config)
