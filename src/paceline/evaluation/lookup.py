"""Prompt lookup: guesses copied from the text itself, the baseline that a trained draft must beat.

What followed the longest earlier occurrence of the text's newest tokens is guessed to follow again (Saxena
2023, "prompt lookup decoding"; Yang et al. 2023, arXiv 2304.04487). It needs no weights and no training,
and where answers repeat their prompts it accepts a lot.
"""

from __future__ import annotations

from collections import defaultdict

import torch

from paceline.methods.drafter import Choose
from paceline.precision import CPU

LONGEST_MATCH = 16  # tokens; longer occurrences count as equally good


class LookupDrafter:
    """See `Drafter`. Guesses nothing where the newest token is new in the text.

    The text begins with the prompt's second token, because `propose` is not told the first one.
    """

    layers: tuple[int, ...] = ()

    def __init__(self, vocab_size: int, device: torch.device = CPU) -> None:
        self.target_ids = torch.arange(vocab_size, device=device)
        self.start(0)

    def start(self, capacity: int) -> None:  # noqa: ARG002 (it has no cache)
        self._text: list[int] = []
        self._places: defaultdict[int, list[int]] = defaultdict(list)  # of each token, ascending

    def propose(
        self,
        aux: torch.Tensor,  # noqa: ARG002 (it reads no states)
        next_ids: torch.Tensor,
        count: int,
        choose: Choose,  # noqa: ARG002 (it has no distribution to choose from)
    ) -> tuple[list[int], list[torch.Tensor | None]]:
        for token in next_ids.tolist():
            self._places[token].append(len(self._text))
            self._text.append(token)
        after, end = self._after_longest_match(), len(self._text)
        guesses: list[int] = []
        for place in range(after, after + count if after < end else after):
            # An occurrence that reaches into the text's end goes on periodically.
            guesses.append(self._text[place] if place < end else guesses[place - end])
        return guesses, [None] * len(guesses)

    def _after_longest_match(self) -> int:
        """The place after the longest, then latest, earlier occurrence; the text's end if there is none."""
        end = len(self._text)
        best, after = 0, end
        for place in reversed(self._places[self._text[-1]][:-1]):
            length = 1
            while (
                length < min(LONGEST_MATCH, place + 1)
                and self._text[place - length] == self._text[end - 1 - length]
            ):
                length += 1
            if length > best:
                best, after = length, place + 1
            if best == LONGEST_MATCH:
                break
        return after
