"""Texts of samples and answers: marked token by token, and harmless wherever they are shown."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from paceline.data.answers import Answer, AnswerFiles
from paceline.evaluation.marked import MarkedAnswer, MarkedAnswers, write_marked
from paceline.ledger.facts import CONFIG, RENDERING_DATE
from paceline.monitoring.texts import RunTexts

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


@pytest.fixture
def facts(tmp_path: Path) -> dict[str, object]:
    """Of a run whose target has a token for every byte, and none else."""
    tokenizer = Tokenizer(models.BPE({byte: n for n, byte in enumerate(BYTES)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    (tmp_path / "target").mkdir()
    tokenizer.save(str(tmp_path / "target" / "tokenizer.json"))
    return {CONFIG: {"target.model": str(tmp_path / "target")}, RENDERING_DATE: "d"}


def ids(text: str) -> tuple[int, ...]:
    """One for each byte of the text."""
    tokenizer = Tokenizer(models.BPE({byte: n for n, byte in enumerate(BYTES)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tuple(tokenizer.encode(text).ids)


def keep(folder: Path, answer: MarkedAnswer) -> None:
    write_marked(
        folder,
        MarkedAnswers(
            began="d", step=4, checkpoint="step-4", guesses={"chain": "chain of 3"}, ways={"chain": (answer,)}
        ),
    )


def test_the_drafts_tokens_are_marked_in_the_text(tmp_path: Path, facts: dict[str, object]) -> None:
    """The prompt, the target's own tokens, the draft's; a character of several tokens comes whole."""
    keep(tmp_path, MarkedAnswer.of("p", ids("Q? "), ids("a漢cd"), (3, 1)))
    found = RunTexts(tmp_path).of_measured(facts)
    assert found is not None
    [way] = found.ways
    [answer] = way.answers
    assert [(one.text, one.is_answer, one.is_drafted) for one in answer.text.pieces] == [
        ("Q? ", False, False),
        ("a", True, False),
        ("漢", True, True),
        ("c", True, False),
        ("d", True, True),
    ]
    assert (answer.drafted_tokens, answer.answer_tokens, answer.acceptance_length) == (4, 6, 3.0)
    assert (found.step, way.guesses) == (4, "chain of 3")


def test_nothing_that_a_screen_obeys_is_in_a_text(tmp_path: Path, facts: dict[str, object]) -> None:
    """Control characters and marks of direction become escapes, in names too; half a character is told."""
    keep(tmp_path, MarkedAnswer.of("\x1b]0;x\x07", ids("\x1b[2J"), ids("\u202ea\n") + ids("漢")[:1], ()))
    found = RunTexts(tmp_path).of_measured(facts)
    assert found is not None
    [answer] = found.ways[0].answers
    shown = "".join(piece.text for piece in answer.text.pieces)
    assert shown == "\\x1b[2J\\u202ea\n\ufffd"
    assert answer.prompt_id == "\\x1b]0;x\\x07"
    assert answer.acceptance_length is None


def test_without_the_tokenizer_ids_are_shown(tmp_path: Path, facts: dict[str, object]) -> None:
    """Also where the tokenizer does not know them; neighbours stay apart."""
    AnswerFiles(tmp_path / "answers").keep([Answer(3, "t", (5, 6, 7, 8), ((2, 4),))])
    text = RunTexts(tmp_path).of_sample(3, {})
    assert text is not None
    assert text.are_ids
    assert [(one.text, one.is_answer) for one in text.pieces] == [("5 6 ", False), ("7 8 ", True)]
    AnswerFiles(tmp_path / "answers").keep([Answer(4, "t", (1 << 33, 6), ((1, 2),))])
    foreign = RunTexts(tmp_path).of_sample(4, facts)
    assert foreign is not None
    assert foreign.are_ids
    assert RunTexts(tmp_path).of_sample(5, facts) is None


def test_a_text_that_its_parts_do_not_make_is_shown_as_ids(tmp_path: Path, facts: dict[str, object]) -> None:
    """Bytes that are no character: the first three are one, all of them are not. Nothing is shown twice."""
    names = ("<unk>", "!", "<0xE6>", "<0xA2>", "<0xBC>")
    odd = Tokenizer(models.BPE({name: n for n, name in enumerate(names)}, [], byte_fallback=True))
    odd.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    odd.save(str(tmp_path / "target" / "tokenizer.json"))
    keep(tmp_path, MarkedAnswer.of("p", (1,), (2, 3, 4, 2), (2,)))
    found = RunTexts(tmp_path).of_measured(facts)
    assert found is not None
    [answer] = found.ways[0].answers
    assert answer.text.are_ids
    assert "".join(piece.text for piece in answer.text.pieces) == "1 2 3 4 2 "
