"""Suites are measured part by part: greedy and sampled, by category, with the lookup beside the draft."""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console

from paceline.cli.evaluate import show_report
from paceline.config.load import load_run_config
from paceline.config.run import RunConfig
from paceline.errors import ConfigError
from paceline.evaluation.picture import picture_of
from paceline.evaluation.settings import EvaluationRequest
from paceline.evaluation.target import LlamaTarget
from paceline.evaluation.unfinished import Unfinished
from paceline.methods.eagle3.decode import Eagle3Decoder
from paceline.methods.eagle3.method import Eagle3Method
from paceline.roles import suite_report
from paceline.roles.measured_draft import MeasuredDraft
from paceline.roles.suite_report import measure_suites, read_suites
from paceline.target.head import TargetHead
from paceline.target.tokenizer import PromptEncoder
from paceline.testing.tiny_folder import make_tiny_folder
from paceline.testing.tiny_run import TinyRun
from paceline.testing.tiny_target import AUX_LAYER_IDS, captured_sample, tiny_target


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("suites")
    run = TinyRun(folder, make_tiny_folder(folder / "model"), evaluation={"max_new_tokens": 12})
    return load_run_config(run.run_file)


@pytest.fixture(scope="module")
def measured(config: RunConfig) -> MeasuredDraft:
    head = TargetHead.load(config.target.model)
    method = Eagle3Method({"draft_vocab_size": 40, "init": "random"})
    drafter = Eagle3Decoder(method.build(head, [captured_sample(tiny_target(), 40, 2, 1)], 1), torch.float32)
    target = LlamaTarget(head, AUX_LAYER_IDS, torch.float32)
    encoder = PromptEncoder(config.target.model)
    return MeasuredDraft(7, 3, drafter, target, head, encoder, torch.float32, torch.device("cpu"))


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """Two categories; a chat whose last message is an answer; a prompt that takes too many positions."""
    chat = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "no part of it"}]
    records = [
        {"id": "one", "prompt": "ab ab ab", "category": "x"},
        {"id": "two", "messages": chat, "category": "y"},
        {"id": "three", "prompt_ids": [5, 6, 7, 5], "category": "y"},
        {"id": "long", "prompt": "a" * 250, "category": "y"},
    ]
    path = tmp_path / "suite.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def asked(suites: Sequence[object], folder: Path, *temperatures: float) -> EvaluationRequest:
    return EvaluationRequest(
        suites=tuple(map(str, suites)), temperatures=temperatures or (0.0,), report=folder / "r.json"
    )


def test_a_suite_is_measured_at_each_temperature_and_by_category(
    config: RunConfig, measured: MeasuredDraft, suite: Path, tmp_path: Path
) -> None:
    request = asked([suite], tmp_path, 0.0, 1.0)
    with Unfinished(tmp_path / "unfinished", {}) as unfinished:
        parts = measure_suites(
            config, measured, read_suites(config, request), request.temperatures, unfinished
        )
    greedy, sampled = parts
    assert [group["category"] for group in greedy["groups"]] == ["all", "x", "y"]
    assert [list(part["groups"][0]["ways"]) for part in parts] == [
        ["tree", "chain", "lookup"],
        ["chain", "lookup"],
    ]
    whole = greedy["groups"][0]
    assert [whole["ways"][way]["identical"] for way in whole["ways"]] == [3, 3, 3]
    assert sampled["groups"][0]["ways"]["chain"]["speed_up"] is None
    assert set(whole["against_lookup"]) == {"tree", "chain"}
    assert {each["prompt_id"]: each["prompt_tokens"] for each in greedy["prompts"]} == {
        "one": len(measured.encoder.encode("ab ab ab")),
        "two": len(measured.encoder.encode("abc")),
        "three": 4,
    }
    assert "positions" in greedy["left_out"]["long"]
    report = {"run": "tiny", "checkpoint_step": 7, "suites": parts}
    assert _shown(report, tmp_path).count("prompt lookup") == 2 * 3
    assert ElementTree.fromstring(picture_of(report)).tag.endswith("svg")  # noqa: S314 (ours)


def _shown(report: dict[str, object], folder: Path) -> str:
    path = folder / "shown.json"
    path.write_text(json.dumps(report))
    console = Console(width=160, record=True, file=StringIO())
    show_report(console, path)
    return console.export_text()


def test_an_evaluation_that_was_killed_measures_only_what_is_left(
    config: RunConfig, measured: MeasuredDraft, suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report is that of an evaluation without the kill, except for seconds."""
    request, decode = asked([suite], tmp_path, 1.0), suite_report.decode_prompts
    suites, path = read_suites(config, request), tmp_path / "unfinished"
    with Unfinished(tmp_path / "other", {}) as unfinished:
        [expected] = measure_suites(config, measured, suites, (1.0,), unfinished)

    def killed_after_two(target, ways, prompts, decoding):  # type: ignore[no-untyped-def]
        for place, figures in enumerate(decode(target, ways, prompts, decoding)):
            yield figures
            if place == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(suite_report, "decode_prompts", killed_after_two)
    with pytest.raises(KeyboardInterrupt), Unfinished(path, {}) as unfinished:
        measure_suites(config, measured, suites, (1.0,), unfinished)
    decoded: list[str] = []

    def counted(target, ways, prompts, decoding):  # type: ignore[no-untyped-def]
        decoded.extend(prompt.prompt_id for prompt in prompts)
        return decode(target, ways, prompts, decoding)

    monkeypatch.setattr(suite_report, "decode_prompts", counted)
    with Unfinished(path, {}) as unfinished:
        [found] = measure_suites(config, measured, suites, (1.0,), unfinished)
    assert decoded == ["three"]
    assert _kept(found) == _kept(expected)


def _kept(part: dict[str, list[dict[str, dict[str, dict[str, object]]]]]) -> list[object]:
    return [[answer["kept"] for answer in prompt["ways"].values()] for prompt in part["prompts"]]


def test_training_prompts_in_a_suite_are_counted(config: RunConfig, tmp_path: Path) -> None:
    """Acceptance on what was trained says nothing about new prompts, and the report says so."""
    trained = Path(config.data.sources[0].path or "").read_text().splitlines()
    path = tmp_path / "suite.jsonl"
    path.write_text("\n".join([*trained[:2], json.dumps({"prompt": "new"})]))
    [read] = read_suites(config, asked([path], tmp_path))
    assert read.also_trained == 2


def test_a_suite_of_which_no_prompt_can_be_decoded_is_refused(
    config: RunConfig, measured: MeasuredDraft, tmp_path: Path
) -> None:
    path = tmp_path / "suite.jsonl"
    path.write_text(json.dumps({"id": "p", "prompt": "a" * 250}) + "\n")
    suites = read_suites(config, asked([path], tmp_path))
    refusal = pytest.raises(ConfigError, match=r"No prompt of the suite .* the first, p: .* positions")
    with refusal, Unfinished(tmp_path / "u", {}) as unfinished:
        measure_suites(config, measured, suites, (0.0,), unfinished)
