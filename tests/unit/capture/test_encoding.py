"""Prompts become token ids group by group; one that cannot be fails alone, with its reason."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from paceline.capture.backpressure import Backpressure, Watermarks
from paceline.capture.encoding import EncodedPrompt, Encoding, PromptLimits, rendering_of
from paceline.capture.producer import Producer
from paceline.capture.settings import CaptureSettings
from paceline.data.answers import Answer, AnswerFiles
from paceline.data.kept import KeptAnswers
from paceline.data.opening import open_file
from paceline.data.source import BLOCK, PromptList, RunPrompts
from paceline.errors import ConfigError
from paceline.ledger.producer_session import ProducerSession
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.target.chat import EncodedChat
from paceline.target.facts import TargetFacts
from paceline.testing.light_adapters import LIGHT_FEATURES, InMemoryLightFeatureStore, LightEngine


class BytesEngine(LightEngine):
    """A token is a byte; `chats` renders a message as its role's letter, its text and a full stop."""

    def __init__(self, max_positions: int | None = None) -> None:
        super().__init__()
        self._positions = max_positions

    @property
    def facts(self) -> TargetFacts:
        return replace(super().facts, max_positions=self._positions)

    @property
    def chats(self) -> Any:
        return BytesChats()


class BytesChats:
    """A ChatEncoder over bytes: u(ser), a(ssistant), s(ystem), t(ool)."""

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = ()) -> tuple[int, ...]:
        return tuple(b"".join(_bytes(message) for message in messages) + b"a")

    def answered(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = ()) -> EncodedChat:
        ids, spans = b"", []
        for message in messages:
            if message["role"] == "assistant":
                spans.append((len(ids) + 1, len(ids) + len(_bytes(message))))
            ids += _bytes(message)
        return EncodedChat(tuple(ids), tuple(spans))


def _bytes(message: Mapping[str, Any]) -> bytes:
    return f"{message['role'][0]}{message['content']}.".encode()


def encoding(max_tokens: int | None = None, *, positions: int | None = None, **settings: Any) -> Encoding:
    given = CaptureSettings(features=LIGHT_FEATURES, max_prompt_tokens=max_tokens, **settings)
    return Encoding(BytesEngine(positions), given)


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


def test_what_the_target_writes_anew_makes_no_chat_too_long() -> None:
    """Nor do the turns behind its first place to write, whatever becomes of them later."""
    one = encoding(10)
    whole = encoded(one, chat("why", "so " * 9999), chat("why", "so", "and " * 9999, "thus"))
    assert [(text_of(prompt), prompt.broken) for prompt in whole] == [("uwhy.a", ""), ("uwhy.a", "")]
    assert "999 characters cannot be within 10" in broken(one, chat("x" * 999, "so"))[0]


def test_a_tokenizer_or_template_that_raises_over_a_prompt_sets_it_aside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What its code makes of one input says nothing of the others."""
    monkeypatch.setattr(BytesEngine, "encode", lambda self, text: {"fine": (1, 2)}[text])
    assert broken(encoding(), "fine", "other") == ["", "the prompt cannot be encoded: KeyError: 'other'"]


def test_prompt_and_answer_must_fit_into_the_targets_positions() -> None:
    """A shorter limit of the run stays; where not even an answer fits, the run is refused."""
    limits = PromptLimits(256, 192)
    assert limits.for_positions(None, 128) is limits
    assert limits.for_positions(4096, 128) is limits
    one = encoding(192, positions=40, max_answer_tokens=30)
    assert broken(one, "x" * 10, "x" * 11) == [
        "",
        "the prompt has 11 tokens, more than the 10 of the target's 40 positions less 30 for the answer",
    ]
    with pytest.raises(ConfigError, match=r"has only 40 .* Next: set data.max_answer_tokens well below"):
        encoding(192, positions=40, max_answer_tokens=40)


def chat(*texts: str) -> dict[str, Any]:
    """Turns of user and assistant in turn."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]}


def encoded(one: Encoding, *prompts: object) -> list[EncodedPrompt]:
    return one.group(0, PromptList(prompts).read(0, 99))  # type: ignore[arg-type]


def text_of(prompt: EncodedPrompt) -> str:
    return bytes(prompt.token_ids).decode()


def test_a_chat_ends_where_the_target_writes_first() -> None:
    """After its last user turn, or in the place of its last assistant turn; of several answers, the first."""
    one = encoding()
    for given, text, is_open in (
        (chat("why"), "uwhy.a", False),
        (chat("why", "so"), "uwhy.a", False),
        (chat("why", "so", "and"), "uwhy.a", True),
        (chat("why", "so", "and", "thus"), "uwhy.a", True),
    ):
        [prompt] = encoded(one, given)
        assert (text_of(prompt), prompt.spans, prompt.is_whole) == (text, (), False)
        assert (prompt.chat is not None) is is_open


def test_the_first_message_and_a_call_with_its_result_are_given() -> None:
    """The target writes what answers a user or a tool, not what the data's tools have answered."""
    call = {"role": "assistant", "content": "call", "tool_calls": [{}]}
    result = {"role": "tool", "content": "42"}
    greeting = {"role": "assistant", "content": "hi"}
    [prompt] = encoded(
        encoding(), {"messages": [*chat("why")["messages"], call, result, *chat("so")["messages"]]}
    )
    assert (text_of(prompt), prompt.chat) == ("uwhy.acall.t42.uso.a", None)
    [greeted] = encoded(
        encoding(), {"messages": [{"role": "assistant", "content": "hi"}, *chat("why")["messages"]]}
    )
    assert text_of(greeted) == "ahi.uwhy.a"
    assert "says anything to answer" in broken(encoding(), {"messages": [greeting]})[0]
    assert "says anything to answer" in broken(encoding(), {"messages": []})[0]
    system = {"role": "system", "content": "be brief"}
    assert "says anything to answer" in broken(encoding(), {"messages": [system]})[0]
    [ended] = encoded(encoding(), {"messages": [*chat("why", "so")["messages"], system]})
    assert (text_of(ended), ended.chat) == ("uwhy.a", None), "nothing is asked after the answer"


def test_an_answer_of_weight_0_is_given() -> None:
    """It is context, whoever writes the others; a chat ends with one that is learnt."""
    messages = chat("why", "so", "and", "thus")["messages"]
    first, last = (
        [dict(m, weight=0) if n == place else m for n, m in enumerate(messages)] for place in (1, 3)
    )
    [prompt, other] = encoded(encoding(), {"messages": first}, {"messages": last})
    assert (text_of(prompt), prompt.chat) == ("uwhy.aso.uand.a", None)
    assert (text_of(other), other.chat) == ("uwhy.a", None)
    one = encoding(answers="data")
    assert [text_of(p)[-5:] for p in encoded(one, {"messages": first}, {"messages": last})] == [
        "thus.",
        ".aso.",
    ]


def test_given_answers_are_read_up_to_the_end_of_the_last_one() -> None:
    """With the places of all; what has no answer fails."""
    one = encoding(answers="data")
    ids = {"prompt_ids": [1, 2, 3, 4, 5], "spans": [[1, 2], [3, 4]]}
    first, second, tokens = encoded(one, chat("why", "so"), chat("why", "so", "and", "thus", "hm"), ids)
    assert (text_of(first), first.spans, first.is_whole) == ("uwhy.aso.", ((6, 9),), True)
    assert (text_of(second), second.spans) == ("uwhy.aso.uand.athus.", ((6, 9), (15, 20)))
    assert (tokens.token_ids, tokens.spans, tokens.is_whole) == ((1, 2, 3, 4), ((1, 2), (3, 4)), True)
    reasons = broken(one, "why", chat("why"), {"prompt_ids": [1, 2]}, {"prompt_ids": [7], "spans": [[0, 1]]})
    assert all("it has no answer" in reason for reason in reasons[:3])
    assert "single token" in reasons[3]


def test_token_ids_with_answers_are_answered_anew_in_the_last_ones_place() -> None:
    """The answers before it were not written by the target: they are context."""
    [prompt] = encoded(encoding(), {"prompt_ids": [1, 2, 3, 4, 5], "spans": [[1, 2], [3, 4]]})
    assert (prompt.token_ids, prompt.spans, prompt.is_whole) == ((1, 2, 3), (), False)


def test_a_sample_that_is_too_long_is_skipped_cut_or_ends_the_run() -> None:
    """Cut at the end of a turn; where not even the first answer fits, within it; never before it."""
    long = chat("why", "so", "and", "thus", "hm", "x" * 99)
    room = {"answers": "data", "max_answer_tokens": 10}
    [reason] = broken(encoding(10, **room), long)
    assert reason.startswith("the sample has 125 tokens, more than the 20 of data.max_prompt_tokens and ")
    with pytest.raises(ConfigError, match=r"^0: the sample has 125 tokens.* too_long is 'refuse'"):
        encoded(encoding(10, too_long="refuse", **room), long)
    cut = encoding(10, too_long="truncate", **room)
    turns, inside, none = encoded(cut, long, chat("why", "y" * 99), chat("z" * 30, "so"))
    assert (text_of(turns), turns.spans) == ("uwhy.aso.uand.athus.", ((6, 9), (15, 20)))
    assert (text_of(inside), inside.spans) == ("uwhy.a" + "y" * 14, ((6, 20),))
    assert "no answer begins within the 20 tokens" in none.broken
    ids = {"prompt_ids": list(range(40)), "spans": [[5, 10], [15, 19], [30, 40]]}
    assert encoded(cut, ids)[0].spans == ((5, 10), (15, 19))
    assert encoded(cut, ids)[0].token_ids == tuple(range(19))
    assert "prompt has 32 tokens" in broken(encoding(10, too_long="truncate"), chat("z" * 29))[0]


def test_a_run_that_must_leave_nothing_out_is_refused_at_its_start(tmp_path: Path) -> None:
    """If one of the longest texts is too long."""
    file = open_file(write(tmp_path / "prompts.jsonl", ["short", "x" * 200]))
    with pytest.raises(ConfigError, match=r"1 prompts are longer than the 192 .*line 2.*too_long is"):
        encoding(192, too_long="refuse").look_for_long(file)


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


def test_kept_answers_that_do_not_fit_are_counted_before_the_start(tmp_path: Path) -> None:
    """All of them; another run with greater limits kept them. None is read but those that are named."""
    lengths = [30, 8, 21, 20, 90, 40]
    AnswerFiles(tmp_path / "answers").keep(
        Answer(ordinal, f"0/{ordinal}", tuple(range(length)), ((4, length),))
        for ordinal, length in enumerate(lengths, start=3)
    )
    kept = RunPrompts(KeptAnswers(tmp_path, lambda ordinal: ordinal < 9), rounds=2)
    one = encoding(12, answers="data", max_answer_tokens=8)
    assert one.look_for_long(kept) == (
        "4 of 6 kept answers fail, longer than the 20 tokens of data.max_prompt_tokens and "
        "data.max_answer_tokens together (the longest has 90); the first: 0/0/3; 0/0/5; 0/0/7"
    )
    assert one.num_encoded == 0
    with pytest.raises(ConfigError, match="4 of 6 kept answers are longer than the 20 "):
        encoding(12, answers="data", max_answer_tokens=8, too_long="refuse").look_for_long(kept)
    assert encoding(82, answers="data", max_answer_tokens=8).look_for_long(kept) == ""


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
