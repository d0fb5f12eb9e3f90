"""What the target's tokenizer says of a source, as a producer would have it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paceline.data.answers import Answer, AnswerFiles
from paceline.data.settings import DataSection
from paceline.errors import ConfigError, PacelineError
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.roles import data_checker
from paceline.roles.data_check import CheckRequest
from paceline.roles.data_checker import check
from paceline.target.settings import TargetSection
from paceline.testing.ledger_calls import capture, producer_of
from paceline.testing.tiny_folder import TEMPLATE, make_tiny_folder, write_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("target") / "model")


def request_of(model: Path, path: Path, *records: dict[str, Any], **settings: Any) -> CheckRequest:
    path.write_text("\n".join(map(json.dumps, records)))
    data = DataSection.parse({"path": path, **settings})
    return CheckRequest(data=data, target=TargetSection(model=model))


def chat(answer: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": "a wheel"}, {"role": "assistant", "content": answer}]
    return {"id": answer, "messages": turns}


def test_the_masks_are_those_that_would_be_trained(model: Path, tmp_path: Path) -> None:
    """Of given answers; samples without one cannot be captured then."""
    records = chat("turns"), chat("lets go"), {"prompt": "hi"}
    found = check(request_of(model, tmp_path / "f", *records, answers="data"))
    assert [(part.text, part.is_target) for part in found.samples[0].parts] == [
        ("<bos>a wheel<eos><bos>", False),
        ("turns<eos>", True),
    ]
    assert not found.samples[0].is_open
    assert found.num_targets == len("turns") + len("lets go") + 2
    [problem] = found.problems
    assert (problem.count, "it has no answer" in problem.reason) == (1, True)


def test_a_chat_is_measured_with_every_answer_that_the_target_writes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Turn by turn, as in a run: the last turn alone would promise a cheaper round."""
    real, most = data_checker.TransformersEngine.capture, []

    def capture(self: Any, group: Any, features: Any) -> Any:
        most.append([request.max_new_tokens for request in group])
        return real(self, group, features)

    monkeypatch.setattr(data_checker.TransformersEngine, "capture", capture)
    turns = [{"role": ("user", "assistant")[n % 2], "content": "ab"} for n in range(6)]
    request = request_of(model, tmp_path / "f", {"messages": turns}, {"prompt": "hi"}, max_answer_tokens=3)
    found = check(request.model_copy(update={"measure": True}))
    assert most == [[3], [3], [3], [3, 3]], "one to begin with, two turns of the chat, and the group"
    assert (found.group_samples, found.group_seconds > 0) == (2, True)


def test_answers_of_the_target_are_announced(model: Path, tmp_path: Path) -> None:
    """The sample ends where the target begins to write, unless the run says otherwise."""
    found = check(request_of(model, tmp_path / "f", chat("turns"), max_answer_tokens=9))
    [sample] = found.samples
    assert sample.is_open
    assert [part.text for part in sample.parts] == ["<bos>a wheel<eos><bos>"]
    assert found.sample_bytes > 0


def test_reasons_are_counted_without_their_particulars(model: Path, tmp_path: Path) -> None:
    """Two samples that are too long have one problem, however long they are."""
    prompts = [{"prompt": "x" * length} for length in (5, 90, 91)]
    found = check(request_of(model, tmp_path / "f", *prompts, max_prompt_tokens=40))
    [problem] = found.problems
    assert (problem.count, len(problem.first), found.num_samples) == (2, 2, 1)
    assert found.lengths == (8,)


def test_what_is_too_long_becomes_what_the_run_would_make_of_it(model: Path, tmp_path: Path) -> None:
    """A cut sample, or the error of the run's start."""
    settings = {"answers": "data", "max_prompt_tokens": 20, "max_answer_tokens": 5}
    long = chat("turns" * 9)
    cut = check(request_of(model, tmp_path / "f", long, too_long="truncate", **settings))
    assert cut.lengths == (25,)
    with pytest.raises(ConfigError, match=r"1 prompts are longer than the 25 .* too_long is 'refuse'"):
        check(request_of(model, tmp_path / "f", long, too_long="refuse", **settings))


def test_the_template_has_the_variables_of_the_run(tmp_path: Path) -> None:
    """Masks of another rendering would be another run's."""
    model = make_tiny_folder(tmp_path / "model")
    write_tokenizer(model, TEMPLATE + "{% if not brief is defined %} hm{% endif %}")
    request = request_of(model, tmp_path / "f", {"prompt": "hi"})
    brief = request.model_copy(update={"target": TargetSection(model=model, template={"brief": True})})
    assert check(request).lengths[0] == check(brief).lengths[0] + 3


def test_kept_answers_of_another_run_are_shown(model: Path, tmp_path: Path) -> None:
    """They are the samples, and those that do not fit are told."""
    AnswerFiles(tmp_path / "answers").keep(
        Answer(n, f"0/{n}", tuple(range(4, 14 + 20 * n)), ((8, 14 + 20 * n),)) for n in range(3)
    )
    capture(producer_of(SQLiteLedger(tmp_path / "ledger.db")), 0, 1)  # and the third was never committed
    data = DataSection.parse({"answers": str(tmp_path), "max_prompt_tokens": 8, "max_answer_tokens": 8})
    found = check(CheckRequest(data=data, target=TargetSection(model=model)))
    assert (found.lengths, found.num_targets, found.num_samples) == ((10,), 6, 1)
    assert found.problems[0].count == 1


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
