"""Which tokens of an answer were the draft's, kept beside a run."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from paceline.evaluation.marked import (
    FILE,
    PROMPTS_MAX,
    SAMPLES,
    TOKENS_MAX,
    MarkedAnswer,
    MarkedAnswers,
    MarkedSample,
    drafted_places,
    keep_samples,
    marked_words,
    read_marked,
    read_samples,
    within_limits,
    write_marked,
)
from paceline.ledger.facts import RENDERING_DATE

FACTS = {RENDERING_DATE: "2026-11-29"}


def marked(began: str = "2026-11-29", **changed: object) -> MarkedAnswers:
    answer = MarkedAnswer.of("p", (1, 2), (3, 4, 5, 6), (1, 3))
    answer = msgspec.structs.replace(answer, **changed)
    return MarkedAnswers(
        began=began, step=7, checkpoint="step-7", guesses={"chain": "chain of 3"}, ways={"chain": (answer,)}
    )


def test_the_first_token_and_one_of_every_cycle_are_the_targets_own() -> None:
    """And the end of an answer cuts the last cycle."""
    assert drafted_places((2, 0, 1), 10, 99) == ((11, 13), (15, 16))
    assert drafted_places((2, 0, 3), 10, 16) == ((11, 13), (15, 16))
    assert drafted_places((0, 0), 10, 13) == ()
    assert drafted_places((), 10, 11) == ()
    assert drafted_places((4, 4), 0, 2) == ((1, 2),)


def test_what_was_kept_is_read_again(tmp_path: Path) -> None:
    write_marked(tmp_path, marked())
    assert read_marked(tmp_path, FACTS) == marked()


def test_an_odd_prompt_id_can_be_kept(tmp_path: Path) -> None:
    """JSON lines may give half a surrogate as an id, which no file can hold."""
    answer = MarkedAnswer.of("a\ud800\x1b", (1,), (2,), ())
    write_marked(tmp_path, msgspec.structs.replace(marked(), ways={"chain": (answer,)}))
    found = read_marked(tmp_path, FACTS)
    assert found is not None
    assert found.ways["chain"][0].prompt_id == "a\\ud800\\x1b"


def test_answers_of_another_run_or_another_program_are_none(tmp_path: Path) -> None:
    """A run that was deleted may have left its file; and anything may lie there."""
    assert read_marked(tmp_path, FACTS) is None
    write_marked(tmp_path, marked(began="another day"))
    assert read_marked(tmp_path, FACTS) is None
    for wrong in (
        {"drafted": ((4, 3),)},
        {"drafted": ((2, 9),)},
        {"drafted": ((-1, 3),)},
        {"drafted": ((3, 5), (4, 6))},
        {"prompt_tokens": 9},
        {"token_ids": (1, -1)},
        {"token_ids": (1, 1 << 40)},
        {"cycles": -1},
    ):
        write_marked(tmp_path, marked(**wrong))
        assert read_marked(tmp_path, FACTS) is None, wrong
    for text in (b"", b"{}", b"[" * 100_000, b'{"began": 1}', b"\xff"):
        (tmp_path / FILE).write_bytes(text)
        assert read_marked(tmp_path, FACTS) is None


@pytest.mark.parametrize(("tokens", "kept"), [(10, PROMPTS_MAX), (TOKENS_MAX // 8, 4)])
def test_the_file_stays_small(tokens: int, kept: int) -> None:
    """The first prompts are kept, in every way of guessing the same ones."""
    answers = [MarkedAnswer.of(str(n), (), (1,) * tokens, ()) for n in range(PROMPTS_MAX + 3)]
    ways, left_out = within_limits({"tree": answers, "chain": answers})
    assert [len(one) for one in ways.values()] == [kept, kept]
    assert left_out == len(answers) - kept


def sample(ordinal: int, tokens: int = 4) -> MarkedSample:
    answer = MarkedAnswer.of("t", (1,), (2,) * tokens, (1,))
    return MarkedSample(ordinal=ordinal, step=3, checkpoint="c", guesses="chain of 3", answer=answer)


def test_samples_are_kept_and_the_oldest_go(tmp_path: Path) -> None:
    """One that is marked again comes last; those of another run are not kept."""
    keep_samples(tmp_path, FACTS, [sample(n) for n in range(PROMPTS_MAX)])
    keep_samples(tmp_path, FACTS, [sample(0), sample(99)])
    kept = read_samples(tmp_path, FACTS)
    assert [one.ordinal for one in kept.samples] == [*range(2, PROMPTS_MAX), 0, 99]
    assert kept.find(1) is None
    assert (
        marked_words(sample(0))
        == "the draft of step 3, a chain of 3, guesses 1 of its tokens; acceptance length 2.00"
    )
    keep_samples(tmp_path, FACTS, [sample(5, TOKENS_MAX - 2)])
    assert [one.ordinal for one in read_samples(tmp_path, FACTS).samples] == [5]
    other = {RENDERING_DATE: "another"}
    assert read_samples(tmp_path, other).samples == ()
    (tmp_path / SAMPLES).write_bytes(b"{")
    assert read_samples(tmp_path, FACTS).samples == ()
