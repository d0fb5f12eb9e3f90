"""Chats that the target writes turn by turn: a function of their group, and all words the target's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from paceline.data.answers import AnswerFiles
from paceline.engines.engine import Captured, CaptureRequest
from paceline.errors import ConfigError
from paceline.ledger.records import State
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.target.chat import EncodedChat
from paceline.target.facts import TargetFacts
from paceline.testing.small_run import RUN_ID, SmallRun, same_bits, weights
from paceline.testing.synthetic import SyntheticEngine

START, END = 1, 2


class Chats:
    """A ChatEncoder: a message is [START, its numbers, END]; an answer's END is given, it writes its own.

    `forgets`: the first number of each answer is left out of the history. `refuses`: the beginning of an
    answer that it does not render.
    """

    forgets = False
    refuses = [-1]

    def prompt(self, messages: Sequence[Any], tools: Sequence[Any] = ()) -> tuple[int, ...]:
        ids: list[int] = []
        for message in messages:
            numbers = [int(number) for number in message["content"].split()]
            if self.refuses == numbers[: len(self.refuses)] and message["role"] == "assistant":
                raise ValueError("it is not rendered")
            kept = numbers[1:] if self.forgets and message["role"] == "assistant" else numbers
            ids += [START, *kept] if message["role"] == "assistant" else [START, *kept, END]
        return (*ids, START)

    def message(self, answer: Sequence[int], prompt: Sequence[int]) -> dict[str, Any]:
        return {"role": "assistant", "content": " ".join(map(str, answer))}

    def answered(self, messages: Sequence[Any], tools: Sequence[Any] = ()) -> EncodedChat:
        raise AssertionError("no answer is given")


class ChatEngine(SyntheticEngine):
    """Keeps every request; what it answers follows from the request's seed."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Chats()
        self.requests: list[list[CaptureRequest]] = []

    @property
    def chats(self) -> Any:
        return self.encoder

    def capture(self, group: Sequence[CaptureRequest], features: Sequence[Any]) -> list[Captured]:
        self.requests.append(list(group))
        return super().capture(group, features)


class RestlessChats(ChatEngine):
    """Other answers and other states at every call."""

    calls = 0

    @property
    def facts(self) -> TargetFacts:
        return replace(super().facts, repeats_bits=False)

    def capture(self, group: Sequence[CaptureRequest], features: Sequence[Any]) -> list[Captured]:
        self.calls += 1
        moved = self.calls
        return super().capture([replace(request, seed=request.seed + moved) for request in group], features)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


THREE = {"messages": [user("5 6"), {"role": "assistant", "content": "old"}, user("7"), *[user("8")] * 0]}
THREE["messages"] += [{"role": "assistant", "content": "old"}, user("9")]
TWO = {"messages": THREE["messages"][:4]}


class Run(SmallRun):
    """Two groups of four: chats of three, two and one answers, and plain prompts."""

    engine: ChatEngine

    def __init__(self, folder: Path, **settings: Any) -> None:
        super().__init__(folder, num_prompts=8, **settings)
        self.engine = ChatEngine()
        self.prompts = [THREE, "plain", TWO, {"messages": [user("5")]}, TWO, "plain too", "and", THREE]

    def samples(self) -> dict[str, dict[str, torch.Tensor]]:
        records = SQLiteLedger(self.db).find(state=State.PRESENT).values()
        return {record.sample_id: self.features.get(record.ref) for record in records}


def targets(tensors: dict[str, torch.Tensor]) -> list[int]:
    return tensors["loss_mask"].nonzero()[:, 0].tolist()


def test_the_turns_of_a_group_are_written_together_and_the_last_by_the_capture(tmp_path: Path) -> None:
    """First turns of the chats of several answers, then their second turns, then the whole group."""
    run = Run(tmp_path)
    run.producer()[1]()
    ids = [[request.sample_id.partition(":")[2] for request in group] for group in run.engine.requests]
    assert ids == [["0", "2"], ["0"], ["0", "1", "2", "3"], ["4", "7"], ["7"], ["4", "5", "6", "7"]]
    seeds = [request.seed for group in run.engine.requests for request in group]
    assert len(set(seeds)) == len(seeds), "no noise is drawn twice"


def test_what_the_target_wrote_is_in_the_sample_and_is_what_is_learnt(tmp_path: Path) -> None:
    """Three answers of six tokens, each between the turns of the user; and the record says the same."""
    run = Run(tmp_path)
    run.producer()[1]()
    tensors = run.samples()[f"{RUN_ID}:0"]
    tokens = tensors["input_ids"].tolist()
    assert (tokens[:5], tokens[11:15], tokens[21:]) == (
        [1, 5, 6, 2, 1],
        [1, 7, 2, 1],
        [1, 9, 2, 1, *tokens[25:]],
    )
    assert targets(tensors) == [*range(5, 11), *range(15, 21), *range(25, 31)]
    answer = AnswerFiles(tmp_path / "answers").get(0)
    assert answer is not None
    assert (list(answer.token_ids), answer.spans) == (tokens, ((5, 11), (15, 21), (25, 31)))
    written = [" ".join(map(str, tokens[start:stop])) for start, stop in answer.spans]
    assert [f'{{"role": "assistant", "content": "{text}"}}' for text in written[:2]] == list(answer.turns)


def test_an_earlier_answer_that_the_template_changes_is_no_target(tmp_path: Path) -> None:
    """Its tokens were written after others; only the last answer stands as it was written."""
    run = Run(tmp_path)
    run.engine.encoder.forgets = True
    run.producer()[1]()
    tensors = run.samples()[f"{RUN_ID}:0"]
    assert targets(tensors) == list(range(23, 29))


def test_a_lost_chat_is_captured_again_with_its_group_to_the_same_bits(tmp_path: Path) -> None:
    """Its earlier turns are written again, in the same groups."""
    run = Run(tmp_path)
    run.producer()[1]()
    first, requests = run.samples(), run.engine.requests[:3]
    run.engine.requests = []
    run.features.free([written for written in run.features.written() if written[0] == f"{RUN_ID}:2"])
    run.producer()[1]()
    assert run.engine.requests == requests
    assert all(same_bits(tensors, first[sample_id]) for sample_id, tensors in run.samples().items())


def test_an_engine_that_does_not_repeat_its_bits_reads_the_whole_chat_again(tmp_path: Path) -> None:
    """A lost chat keeps its words and its targets: no turn of it is written a second time."""
    run = Run(tmp_path)
    run.engine = RestlessChats()
    run.producer()[1]()
    first = run.samples()[f"{RUN_ID}:0"]
    run.features.free([written for written in run.features.written() if written[0] == f"{RUN_ID}:0"])
    run.engine.requests = []
    run.producer()[1]()
    again = run.samples()[f"{RUN_ID}:0"]
    assert [len(group) for group in run.engine.requests] == [1]
    assert torch.equal(again["input_ids"], first["input_ids"])
    assert torch.equal(again["loss_mask"], first["loss_mask"])
    assert not torch.equal(again["aux_hidden_states"], first["aux_hidden_states"])


def test_a_chat_that_cannot_go_on_fails_alone(tmp_path: Path) -> None:
    """With the template's reason; the others of its group are captured without it, and no group in halves."""
    run = Run(tmp_path)
    run.producer()[1]()
    wrong = run.samples()[f"{RUN_ID}:2"]["input_ids"].tolist()[5:9]
    second = Run(tmp_path / "second")
    second.engine.encoder.refuses = wrong
    second.run()
    ledger = SQLiteLedger(second.db)
    assert ledger.snapshot().prompts.failed == 1
    assert ledger.failed()[2] == "2: ValueError: it is not rendered"
    asked = [[request.sample_id.partition(":")[2] for request in group] for group in second.engine.requests]
    assert ["0", "1", "3"] in asked
    assert ["1", "3"] not in asked
    assert asked.count(["0", "2"]) == 1, "the same group would end in the same way"


def test_a_chat_that_cannot_go_on_is_written_again_if_it_may_be_written_otherwise(tmp_path: Path) -> None:
    """An engine that does not repeat its bits may write an answer that the template renders."""
    run = Run(tmp_path)
    run.engine = RestlessChats()
    real, refused = Chats.message, []

    class Once(Chats):
        def message(self, answer: Sequence[int], prompt: Sequence[int]) -> dict[str, Any]:
            if not refused:
                refused.append(answer)
                raise ValueError("it is no message")
            return real(self, answer, prompt)

    run.engine.encoder = Once()
    run.producer()[1]()
    ledger = SQLiteLedger(run.db)
    assert (len(refused), ledger.snapshot().prompts.failed, ledger.snapshot().committed) == (1, 0, 8)


@pytest.mark.parametrize(("too_long", "answers"), [("truncate", [2, 2]), ("skip", []), ("refuse", None)])
def test_a_chat_that_outgrows_its_limit(tmp_path: Path, too_long: str, answers: list[int] | None) -> None:
    """It ends with the answer before, fails alone, or ends the run; the third turn's prompt has 25 tokens."""
    run = Run(tmp_path, max_prompt_tokens=24, too_long=too_long)
    if answers is None:
        with pytest.raises(ConfigError, match=r"^0: after 2 answers the prompt has 25 tokens"):
            run.producer()[1]()
        assert SQLiteLedger(run.db).snapshot().prompts.leased == 0
        return
    run.producer()[1]()
    found = [run.samples().get(f"{RUN_ID}:{n}") for n in (0, 7)]
    assert [len(targets(tensors)) // 6 for tensors in found if tensors] == answers
    if answers:
        assert targets(found[0]) == [*range(5, 11), *range(15, 21)]  # type: ignore[arg-type]
        assert len(found[0]["input_ids"]) == 21  # type: ignore[index]


@pytest.mark.parametrize(("too_long", "answers"), [("truncate", 1), ("skip", 0)])
def test_a_later_turn_of_megabytes_is_not_given_to_the_tokenizer(
    tmp_path: Path, too_long: str, answers: int
) -> None:
    """The chat ends with the answer before, or fails alone with the number of its characters."""
    run = Run(tmp_path, too_long=too_long)
    run.prompts[2] = {"messages": [user("5"), {"role": "assistant", "content": "old"}, user("x" * 10**6)]}
    run.producer()[1]()
    found = run.samples().get(f"{RUN_ID}:2")
    assert (len(targets(found)) // 6 if found else 0) == answers
    if not answers:
        assert "after 1 answers the prompt has 10000" in SQLiteLedger(run.db).failed()[2]


def test_a_run_of_chats_ends_in_the_same_weights_after_a_crash(tmp_path: Path) -> None:
    """Producer and consumer die in the middle, features and all; the same bits come out."""
    plain = Run(tmp_path / "plain")
    whole = weights(plain.run())
    run = Run(tmp_path / "killed")
    run.producer()[1](max_rounds=1)
    run.features.free(run.features.written())
    again = Run(tmp_path / "killed")
    assert same_bits(weights(again.run()), whole)
