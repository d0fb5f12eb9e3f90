"""Held-out prompts that the target cannot decode are left out with their reasons."""

from __future__ import annotations

import pytest
import torch

from paceline.data.prompts import Prompt
from paceline.errors import ConfigError, EngineError
from paceline.evaluation.heldout import Asked, HeldOut, Room, encode_held_out, refuse_nothing_to_measure
from paceline.evaluation.speculative import MAX_DRAFT_TOKENS, _remainder
from paceline.evaluation.suites import SuitePrompt


class LengthEncoder:
    """As many tokens as the text has letters; "!" is a token beyond the target's, "?" is refused."""

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        if "?" in prompt.text:
            raise EngineError("the template refuses it")
        return tuple(99 if letter == "!" else 5 for letter in prompt.text)


def asked(*texts: tuple[str, str]) -> list[SuitePrompt]:
    return [SuitePrompt(Prompt(name, text)) for name, text in texts]


def test_each_reason_is_told_and_the_others_are_measured() -> None:
    """Too long for the target's positions, a token that it has no row for, no token, refused, no prompt."""
    texts = [
        *asked(("good", "aaa"), ("long", "a" * 30), ("foreign", "a!"), ("empty", ""), ("refused", "?")),
        SuitePrompt(Prompt("unread", "x", broken="line 6: it is not JSON")),
    ]
    positions = 3 + 10 + MAX_DRAFT_TOKENS
    encoder = LengthEncoder()
    room = Room(vocab_size=61, positions=positions, prompt_tokens=40, answer_tokens=10)
    held = encode_held_out(texts, encoder.encode, room)
    assert held.prompts == ((5, 5, 5),)
    assert {name: word in held.left_out[name] for name, word in _WORDS.items()} == dict.fromkeys(_WORDS, True)
    assert held.note.startswith("5 of 6 held-out prompts are left out, the first: long: ")
    assert encode_held_out(texts[:1], encoder.encode, Room(61, None, 40, 10)).note == ""
    short = encode_held_out(asked(("long", "a" * 41)), encoder.encode, Room(61, None, 40, 10))
    assert "more than the 40 of data.max_prompt_tokens" in short.left_out["long"]
    with pytest.raises(ConfigError, match="No held-out prompt can be decoded: 1 of 1"):
        refuse_nothing_to_measure(short)


_WORDS = {
    "long": "positions",
    "foreign": "token 99",
    "empty": "no token",
    "refused": "template",
    "unread": "line 6: it is not JSON",
}


def test_everything_that_is_not_measured_is_told() -> None:
    """Also what the run file leaves out, and what stands twice."""
    held = HeldOut((Asked("a", (5,)), Asked("b", (6,))), {"x": "too long"}, repeated=2, beyond=7)
    assert held.note == (
        "1 of 3 held-out prompts are left out, the first: x: too long; 7 held-out prompts are beyond "
        "evaluation.max_prompts; 2 held-out prompts repeat an earlier one and are measured once"
    )


@pytest.mark.parametrize("off", [0.0, 1e-9])
def test_a_rejection_that_leaves_nothing_draws_from_the_target(off: float) -> None:
    """Where draft and target agree to rounding the remainder is all zero, which nothing can be drawn from."""
    wanted = torch.tensor([0.25, 0.75])
    assert torch.equal(_remainder(wanted, wanted + off), wanted)
    assert torch.equal(_remainder(wanted, torch.tensor([0.5, 0.5])), torch.tensor([0.0, 0.25]))
