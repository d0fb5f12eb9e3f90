"""A run that ends with exported folders, and the commands that export again and serve."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from paceline.cli import export, main, measure
from paceline.config.run import RunConfig
from paceline.errors import EngineError
from paceline.exports.settings import ExportSection
from paceline.testing.tiny_folder import make_tiny_folder
from paceline.testing.tiny_run import TinyRun

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REFUSAL = "vLLM 0.32 refuses this target with a draft (MixtralForCausalLM: "


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyRun, str]:
    """A run and what its training printed. Its run file asks for two formats; its target lies in a cache of
    the hub, and names a class that vLLM is known to refuse."""
    section = {"formats": ["vllm", "speculators"], "dtype": "float32"}
    cache = tmp_path_factory.mktemp("hub")
    model = make_tiny_folder(cache / "models--org--tiny" / "snapshots" / COMMIT)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "architectures": ["MixtralForCausalLM"]}))
    run = TinyRun(tmp_path_factory.mktemp("run"), model, export=section)
    result = run.command("train")
    assert result.returncode == 0, result.stderr
    assert "vllm: " in result.stdout
    return run, result.stdout


@pytest.fixture(scope="module")
def finished(trained: tuple[TinyRun, str]) -> TinyRun:
    return trained[0]


def paceline(run: TinyRun, verb: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run.run([*run.arguments(verb), *arguments])


def test_training_ends_with_the_exports_that_the_run_file_names(finished: TinyRun) -> None:
    """Self-checked on rows of the target, with the acceptance that the evaluation measured."""
    weights = finished.final_weights()
    for name in ("vllm", "speculators"):
        folder = finished.directory / "export" / name
        note = json.loads((folder / "paceline.json").read_text())
        assert note["self_check"]["guesses"] >= 12
        assert "held-out prompts" in note["self_check"]["rows"]
        assert note["origin"]["step"] == 10
        card = (folder / "README.md").read_text()
        assert "The acceptance length is 1 + accepted guesses / cycles" in card
        assert "Sound: every rule holds." in card
        assert "| consumer | 1 | 0 |" in card
        assert "3 held-out prompts of heldout.jsonl, up to 16 tokens an answer" in card
        assert f"vllm serve org/tiny --revision {COMMIT}" in card
        assert (load_file(folder / "model.safetensors")["fc.weight"] == weights["fc.weight"]).all()


def test_a_server_that_refuses_the_target_is_told_before_training_with_the_export_and_in_its_card(
    trained: tuple[TinyRun, str],
) -> None:
    """The export is written all the same: another release may take the target."""
    run, printed = trained
    words = " ".join(printed.split())
    first, last = words.index(f"note: {REFUSAL}"), words.rindex(f"note: {REFUSAL}")
    assert first < words.index("captured") < words.index("exporting for") < last
    assert REFUSAL in (run.directory / "export" / "vllm" / "README.md").read_text()


def test_a_kept_checkpoint_is_exported_and_the_server_is_told_how_to_load_it(
    finished: TinyRun, tmp_path: Path
) -> None:
    """The older step, in bfloat16, by the run's directory; it was not measured, which the card says."""
    kept = [record.step for record in finished.ledger().snapshot().checkpoints]
    asked = ["--to", "sglang", str(tmp_path / "draft"), "--step", str(kept[0]), "--target-name", "org/tiny"]
    older = paceline(finished, "export", *asked)
    assert older.returncode == 0, older.stderr
    assert "was not measured" in (tmp_path / "draft" / "README.md").read_text()
    assert str(load_file(tmp_path / "draft" / "model.safetensors")["fc.weight"].dtype) == "torch.float32"
    served = paceline(finished, "serve", "--host", "127.0.0.2")
    assert served.stdout.startswith("python -m sglang.launch_server --model-path org/tiny --host 127.0.0.2")
    assert str(tmp_path / "draft") in served.stdout
    assert "vllm serve org/tiny" in paceline(finished, "serve", "--server", "vllm").stdout
    server = tmp_path / "vllm"
    server.write_text("#!/bin/sh\necho serves $1 $2\n")
    server.chmod(0o755)
    environment = {**finished.environment(), "PATH": f"{tmp_path}:/usr/bin:/bin"}
    started = subprocess.run(
        [*finished.arguments("serve"), "--server", "vllm", "--run"],
        env=environment,
        text=True,
        capture_output=True,
        check=False,
    )
    assert started.stdout == "serves serve org/tiny\n"
    other = paceline(finished, "serve", "--folder", "no/such")
    assert other.returncode == 2
    assert "paceline export" in other.stderr


def test_a_failed_evaluation_does_not_cancel_the_exports(
    finished: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its error comes afterwards, with its exit code: nothing measured is no reason to export nothing."""

    def killed(*_: object) -> bool:
        raise EngineError("The evaluation was killed (-9).")

    exported: list[tuple[str, ...]] = []

    def written(_: object, __: Path, ___: RunConfig, request: ExportSection) -> bool:
        exported.append(request.formats)
        return True

    monkeypatch.setattr(measure, "evaluate_run", killed)
    monkeypatch.setattr(export, "export_checkpoint", written)
    ended = CliRunner().invoke(main.app, ["train", str(finished.run_file)])
    assert (ended.exit_code, exported) == (4, [("vllm", "speculators")])
    assert "not measured: The evaluation was killed (-9). | 40 samples trained" in ended.output
    assert "error The evaluation was killed (-9)." in ended.output


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--to", "vlm"], "did you mean 'vllm'"), (["--dtype", "int4"], "dtype")]
)
def test_a_mistaken_export_is_one_clear_error(finished: TinyRun, arguments: list[str], message: str) -> None:
    """What, why and the next command."""
    result = paceline(finished, "export", *arguments)
    assert (result.returncode, message in result.stderr) == (2, True), result.stderr
    assert "Traceback" not in result.stderr
