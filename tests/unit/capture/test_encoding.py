"""Prompts become token ids group by group; one that cannot be fails alone, with its reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paceline.capture.backpressure import Backpressure, Watermarks
from paceline.capture.encoding import Encoding, PromptLimits, rendering_of
from paceline.capture.producer import Producer
from paceline.capture.settings import CaptureSettings
from paceline.data.opening import open_file
from paceline.data.source import BLOCK, PromptList, RunPrompts
from paceline.errors import ConfigError
from paceline.ledger.producer_session import ProducerSession
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.testing.light_adapters import LIGHT_FEATURES, InMemoryLightFeatureStore, LightEngine


def encoding(max_tokens: int | None = None) -> Encoding:
    return Encoding(lambda text: tuple(text.encode()), PromptLimits(256, max_tokens))


def broken(encoding: Encoding, *prompts: object) -> list[str]:
    source = PromptList(prompts)  # type: ignore[arg-type]
    return [prompt.broken for prompt in encoding.group(0, source.read(0, 99))]


def test_a_prompt_that_is_too_long_fails_alone() -> None:
    """The reason says how long it is; one of exactly the limit is taken."""
    assert broken(encoding(5), "12345", "123456", "1") == [
        "",
        "the prompt has 6 tokens, more than the 5 of data.max_prompt_tokens",
        "",
    ]


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("", "0 token ids"),
        ({"prompt_ids": [1, 256]}, "2 token ids, not all within the target's 256"),
        ({"prompt_ids": [-1]}, "1 token ids, not all within the target's 256"),
        ({"nothing": "here"}, "it has neither text nor token ids"),
    ],
)
def test_what_the_target_cannot_read_fails_alone(prompt: object, reason: str) -> None:
    """With its reason."""
    before, found, after = broken(encoding(), "fine", prompt, "fine")
    assert (before, after) == ("", "")
    assert found.startswith(reason)


def test_a_text_of_ten_megabytes_is_not_given_to_the_tokenizer() -> None:
    """It would take minutes over it, in silence."""
    one = encoding(192)
    [reason] = broken(one, "x" * 10_000_000)
    assert "its 10000000 characters cannot be within 192 tokens" in reason
    assert one.num_encoded == 0


def test_a_tokenizer_or_template_that_raises_over_a_prompt_sets_it_aside() -> None:
    """What its code makes of one input says nothing of the others."""

    def encode(text: str) -> tuple[int, ...]:
        return {"fine": (1, 2)}[text]

    one = Encoding(encode, PromptLimits(256))
    assert broken(one, "fine", "other") == ["", "the prompt cannot be encoded: KeyError: 'other'"]


def test_prompt_and_answer_must_fit_into_the_targets_positions() -> None:
    """A shorter limit of the run stays; where not even an answer fits, the run is refused."""
    limits = PromptLimits(256, 192)
    assert limits.for_positions(None, 128) is limits
    assert limits.for_positions(4096, 128) is limits
    shorter = limits.for_positions(40, 30)
    one = Encoding(lambda text: tuple(text.encode()), shorter)
    assert broken(one, "x" * 10, "x" * 11) == [
        "",
        "the prompt has 11 tokens, more than the 10 of the target's 40 positions less 30 for the answer",
    ]
    with pytest.raises(ConfigError, match=r"has only 40 .* Next: set data.max_answer_tokens well below"):
        limits.for_positions(40, 40)


def test_the_rendering_of_a_group_is_its_token_ids() -> None:
    """Other ids, another order, or one prompt fewer that can be encoded give another digest."""
    one = encoding(9)
    groups = [["a", "b"], ["b", "a"], ["a", "c"], ["a", ""], ["a"]]
    digests = {rendering_of(one.group(0, PromptList(group).read(0, 9))) for group in groups}
    assert len(digests) == 5
    assert rendering_of(one.group(0, PromptList(["a", "b"]).read(0, 9))) in digests


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"id": n, "prompt": text}) + "\n" for n, text in enumerate(texts)))
    return path


def test_long_prompts_are_told_of_before_the_start(tmp_path: Path) -> None:
    """How many, the longest, and the first three places; found without encoding every prompt."""
    texts = [f"question {n}" for n in range(5000)]
    for place, length in ((30, 200), (4000, 260), (7, 193), (100, 500)):
        texts[place] = "x" * length
    file, one = open_file(write(tmp_path / "prompts.jsonl", texts)), encoding(192)
    assert one.look_for_long(RunPrompts(file, rounds=2, stretches=[5000])) == (
        "4 prompts fail, longer than the 192 tokens of data.max_prompt_tokens (the longest has "
        "500); "
        f"the first: {file.name}, line 8; {file.name}, line 31; {file.name}, line 101"
    )
    assert one.num_encoded < 100
    assert encoding(1000).look_for_long(file) == ""


def test_a_start_among_a_hundred_thousand_prompts_costs_what_it_reads(tmp_path: Path) -> None:
    """The first group is captured, and a later start goes on, with a block read and a few prompts encoded."""
    path = write(tmp_path / "prompts.jsonl", [f"question {n}" for n in range(100_000)])
    open_file(path, index_path=tmp_path / "index.json")
    ledger, features, engine = SQLiteLedger(), InMemoryLightFeatureStore(), LightEngine()
    settings = CaptureSettings(max_answer_tokens=4, features=LIGHT_FEATURES, max_prompt_tokens=192)
    for rounds in (1, 0, 1):
        file = open_file(path, index_path=tmp_path / "index.json")
        session = ProducerSession(ledger, "run")
        pressure = Backpressure(features, session, Watermarks(1 << 20, 64 * 256, group_samples=64))
        producer = Producer(session, engine, features, RunPrompts(file, 1, [100_000]), settings, pressure)
        lines_before = file.source.num_read
        assert producer.run(max_rounds=rounds) == 64 * rounds
        if ledger.snapshot().committed > 64 or not rounds:
            assert file.source.num_read - lines_before <= BLOCK + 1
        assert producer.encoding.num_encoded <= 64 * (1 + rounds) + 64
    assert len(engine.captured) == 2
