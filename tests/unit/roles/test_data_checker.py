"""What the target's tokenizer says of a source, as a producer would have it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paceline.data.settings import SourceSection
from paceline.errors import PacelineError
from paceline.roles import data_checker
from paceline.roles.data_check import CheckRequest
from paceline.roles.data_checker import check
from paceline.testing.tiny_folder import make_tiny_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("target") / "model")


def request_of(model: Path, path: Path, *records: dict[str, Any], **settings: Any) -> CheckRequest:
    path.write_text("\n".join(map(json.dumps, records)))
    return CheckRequest(source=SourceSection(path=path), model=model, **settings)


def chat(answer: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": "a wheel"}, {"role": "assistant", "content": answer}]
    return {"id": answer, "messages": turns}


def test_the_masks_are_those_that_would_be_trained(model: Path, tmp_path: Path) -> None:
    """Of given answers, if most samples have one; others cannot be captured then."""
    found = check(request_of(model, tmp_path / "f", chat("turns"), chat("lets go"), {"prompt": "hi"}))
    assert found.answers == "data"
    assert [(part.text, part.is_target) for part in found.samples[0].parts] == [
        ("<bos>a wheel<eos><bos>", False),
        ("turns<eos>", True),
    ]
    assert not found.samples[0].is_open
    assert found.num_targets == len("turns") + len("lets go") + 2
    [problem] = found.problems
    assert (problem.count, "it has no answer" in problem.reason) == (1, True)


def test_answers_of_the_target_are_announced(model: Path, tmp_path: Path) -> None:
    """The sample ends where the target begins to write."""
    found = check(request_of(model, tmp_path / "f", chat("turns"), answers="target", max_answer_tokens=9))
    [sample] = found.samples
    assert sample.is_open
    assert [part.text for part in sample.parts] == ["<bos>a wheel<eos><bos>"]
    assert found.sample_bytes > 0


def test_reasons_are_counted_without_their_particulars(model: Path, tmp_path: Path) -> None:
    """Two samples that are too long have one problem, however long they are."""
    prompts = [{"prompt": "x" * length} for length in (5, 90, 91)]
    found = check(request_of(model, tmp_path / "f", *prompts, max_prompt_tokens=40))
    [problem] = found.problems
    assert (problem.count, len(problem.first), found.answers) == (2, 2, "target")
    assert found.lengths == (8,)


def test_of_a_large_source_samples_are_spread_over_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole is counted elsewhere."""
    monkeypatch.setattr(data_checker, "LOOKED_AT_MAX", 4)
    found = check(request_of(model, tmp_path / "f", *({"id": n, "prompt": "x" * n} for n in range(1, 13))))
    assert len(found.lengths) == 4
    assert found.lengths[-1] - found.lengths[0] == 9


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    """As a run would be."""
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 8, "vocab_size": 9}'
    )
    with pytest.raises(PacelineError):
        check(request_of(tmp_path, tmp_path / "f", {"prompt": "hi"}))
