"""A run knows its target: no role goes on with another one, and what it cannot measure it says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from paceline.config.load import load_run_config
from paceline.testing.tiny_families import family_folder
from paceline.testing.tiny_folder import make_tiny_folder
from paceline.testing.tiny_run import TinyRun


def another_model(model: Path) -> None:
    make_tiny_folder(model, seed=1)


def fine_tuned(model: Path) -> None:
    """Same names, shapes and configuration."""
    weights = load_file(model / "model.safetensors")
    weights["model.layers.7.mlp.down_proj.weight"].mul_(1.001)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def another_tokenizer(model: Path) -> None:
    path = model / "tokenizer.json"
    path.write_text(path.read_text().replace('"a":4', '"a":5').replace('"a": 4', '"a": 5'))
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}")


def test_no_role_goes_on_with_another_target(tiny_model: Path, tmp_path: Path) -> None:
    """The folder is replaced while the run is stopped, all its samples captured; the old one goes on."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    run = TinyRun(tmp_path / "run", model)
    assert run.command("produce").returncode == 0
    swaps = [("train", fine_tuned), ("consume", another_tokenizer), ("produce", another_model)]
    for verb, swap in swaps:
        swap(model)
        refused = run.command(verb)
        assert refused.returncode == 2, (verb, refused.stderr)
        assert "than the one this run was started with" in " ".join(refused.stderr.split())
        assert "Traceback" not in refused.stderr
        shutil.rmtree(model)
        shutil.copytree(tiny_model, model)
    assert not run.ledger().snapshot().checkpoints
    finished = run.command("train")
    assert finished.returncode == 0, finished.stderr
    assert "40 samples trained" in finished.stdout
    fine_tuned(model)
    assert run.command("evaluate").returncode == 2


def test_another_type_of_numbers_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    """What "auto" stood for when the run began is a fact of it: another machine would give other bits."""
    run = TinyRun(tmp_path, tiny_model)
    assert run.command("produce").returncode == 0
    ledger = run.ledger()
    ledger.set_facts(None, {"target_numerics": {"dtype": "bfloat16", "device": "cuda"}})
    ledger.close()
    refused = run.command("produce")
    assert refused.returncode == 2
    assert "computed its target in bfloat16 on cuda, and would now compute in float32" in refused.stderr


def test_a_target_binds_only_what_was_captured_from_it(tiny_model: Path, tmp_path: Path) -> None:
    """A first start on a target that is refused is followed by one on another: the advice can be taken."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    run = TinyRun(tmp_path / "run", model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    assert run.command("produce").returncode in (2, 4)
    (model / "config.json").write_text(json.dumps(config))
    assert run.command("produce").returncode == 0


def test_a_target_of_another_family_is_trained_and_measured_on_its_own_forward(tmp_path: Path) -> None:
    """Windows, caps and norms of its own; every held-out answer is that of plain decoding."""
    run = TinyRun(tmp_path / "run", family_folder(tmp_path / "model", "gemma2"), features={"budget_mib": 16})
    trained = run.command("train")
    assert trained.returncode == 0, trained.stderr
    report = json.loads((run.directory / "evaluation.json").read_text())
    assert report["identical"] == report["chain"]["identical"] == report["prompts"] == 3
    assert 1.0 <= report["emitted_per_cycle"] <= report["acceptance_length"]


def config_is_a_list(model: Path) -> None:
    (model / "config.json").write_text("[]")


def quantised(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))


def cut_weights(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def nan_in_the_head(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"][9].fill_(float("nan"))
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def broken_template(model: Path) -> None:
    (model / "chat_template.jinja").write_text("{{ raise_exception('never') }}")


def empty_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (config_is_a_list, "holds a list"),
        (quantised, "quantised (awq)"),
        (cut_weights, "incomplete"),
        (nan_in_the_head, "lm_head.weight"),
        (broken_template, "chat template does not render"),
        (empty_tokenizer, "holds no tokenizer"),
    ],
)
def test_a_broken_target_ends_the_command_at_once(
    tiny_model: Path, tmp_path: Path, damage: Callable[[Path], None], reason: str
) -> None:
    """One error that names it, nothing started again, nothing trained, no memory left taken."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    damage(model)
    run = TinyRun(tmp_path / "run", model)
    result = run.command("train")
    assert result.returncode in (2, 4), result.stderr
    assert reason in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert not load_run_config(run.run_file).feature_folder.exists()
    if run.directory.exists():
        known = run.ledger().snapshot()
        assert all(epoch <= 1 for epoch in known.epochs.values())
        assert not known.checkpoints


def test_held_out_prompts_that_cannot_be_decoded_are_left_out(tiny_model: Path, tmp_path: Path) -> None:
    """Too long, refused by the template or no JSON: the others are measured, and the report names them."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    template = (model / "chat_template.jinja").read_text()
    refuses = "{% if 'Zz' in messages[0].content %}{{ raise_exception('no Zz') }}{% endif %}"
    (model / "chat_template.jinja").write_text(refuses + template)
    run = TinyRun(tmp_path / "run", model)
    with (run.folder / "heldout.jsonl").open("a") as file:
        file.write(json.dumps({"id": "long", "prompt": "wind " * 80}) + "\n")
        file.write(json.dumps({"id": "refused", "prompt": "Zz"}) + "\n")
        turns = [("user", "who leads"), ("assistant", "a rider"), ("user", "until when"), ("assistant", "x")]
        chat = [{"role": role, "content": content} for role, content in turns]
        file.write(json.dumps({"id": "chat", "messages": chat}) + "\nbroken\n")
    result = run.command("train")
    assert result.returncode == 0, result.stderr
    report = json.loads((run.directory / "evaluation.json").read_text())
    assert report["prompts"] == report["identical"] == 4
    assert list(report["prompts_set_aside"]) == ["long", "refused", "unreadable-line-7"]
    assert "3 of 7 held-out prompts are left out, the first: long: " in result.stdout


def test_held_out_prompts_of_which_none_can_be_decoded(tiny_model: Path, tmp_path: Path) -> None:
    """Said before the first capture; the draft is trained and not measured, or nothing is captured."""
    long = json.dumps({"id": "long", "prompt": "wind " * 80}) + "\n"
    for unsupported, code in (("refuse", 2), ("skip", 0)):
        run = TinyRun(tmp_path / unsupported, tiny_model)
        run.config["evaluation"]["unsupported"] = unsupported
        run = TinyRun(tmp_path / unsupported, tiny_model, **run.config)
        (run.folder / "heldout.jsonl").write_text(long)
        result = run.command("train")
        assert result.returncode == code, result.stderr
        words = " ".join((result.stdout + result.stderr).split())
        assert "1 of 1 held-out prompts are left out, the first: long: " in words
        assert run.ledger().snapshot().committed == (0 if code else 40)
    assert "not measured: No held-out prompt can be decoded" in result.stdout
