"""The rows of a capture group while it is answered: tokens, masks, noise and the states so far.

Every row keeps its place to the end, finished or not, so that no row's bits depend on when another
one ended; each draws from its own seeded noise, so that none depends on another's sampling.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from paceline.engines.engine import CapturedSample, CaptureRequest, TargetFacts
from paceline.errors import EngineError


class CaptureRows:
    """The group while it is answered: what each row holds, and the states captured so far."""

    def __init__(
        self, group: Sequence[CaptureRequest], facts: TargetFacts, dtype: torch.dtype, device: torch.device
    ) -> None:
        lengths = [len(request.prompt_ids) for request in group]
        self._group, self._facts, self._lengths = group, facts, lengths
        longest, answer = max(lengths), max(request.max_new_tokens for request in group)
        self.count = len(group)
        self.capacity = longest + answer
        self.length = longest  # positions processed (or about to be, by the prefill), padding included
        self.shared = _common_prefix([request.prompt_ids for request in group])
        # A row: what all prompts share, padding, the rest of its prompt, its answer.
        self.padding = torch.tensor([longest - length for length in lengths], device=device)
        slots = torch.arange(self.capacity, device=device)
        self.mask = ((slots < self.shared) | (slots >= self.shared + self.padding[:, None])).long()
        pad, cut = (facts.eos_token_ids or (0,))[0], self.shared
        padded = [
            [*r.prompt_ids[:cut], *[pad] * (longest - len(r.prompt_ids)), *r.prompt_ids[cut:]] for r in group
        ]
        self.prompt_ids = torch.tensor(padded, device=device)
        self._answers: list[list[int]] = [[] for _ in group]
        self._done = [False] * len(group)
        # States without padding, the last kind apart: what a sample needs lies in one piece.
        widths = (len(facts.aux_layer_ids) * facts.hidden_size, facts.hidden_size)
        self._aux, self._last = (
            torch.empty((len(group), self.capacity, width), dtype=dtype, device=device) for width in widths
        )
        self._points = torch.stack([_noise(request, answer) for request in group], dim=1).to(device)
        # Temperature 1 stands in for greedy rows, whose sample is not used.
        temperatures = [request.temperature or 1.0 for request in group]
        self._temperature = torch.tensor(temperatures, device=device)[:, None]
        self._sampled = [request.temperature > 0 for request in group]

    @property
    def last_ids(self) -> torch.Tensor:
        return torch.tensor([[answer[-1]] for answer in self._answers], device=self.mask.device)

    def by_length(self, size: int) -> list[tuple[torch.Tensor, int]]:
        """Rows in parts of `size`, shortest first, with the most tokens one has beyond the shared ones."""
        order = sorted(range(self.count), key=lambda row: self._lengths[row])
        parts = [order[i : i + size] for i in range(0, self.count, size)]
        device = self.mask.device
        return [(torch.tensor(part, device=device), self._lengths[part[-1]] - self.shared) for part in parts]

    def keep_shared(self, states: Sequence[torch.Tensor]) -> None:
        """Keep the states of what all prompts begin with, computed for one row."""
        for kept, state in zip(self._kept(slice(None)), states, strict=True):
            kept[:, : self.shared] = state

    def keep_prompts(self, members: torch.Tensor, states: Sequence[torch.Tensor]) -> None:
        """Keep the states of the rest of some rows' prompts; each row's padding comes first."""
        for place, row in enumerate(members.tolist()):
            length = self._lengths[row]
            for kept, state in zip(self._kept(row), states, strict=True):
                kept[self.shared : length] = state[place, self.shared - length :]

    def keep(self, states: Sequence[torch.Tensor]) -> None:
        """Keep the states of the latest forward, one token a row, behind those before it."""
        rows, tokens = torch.arange(self.count, device=self.mask.device), self.length - self.padding
        for kept, state in zip(self._kept(slice(None)), states, strict=True):
            kept[rows, tokens] = state[:, 0]
        self.length += 1

    def _kept(self, rows: int | slice) -> list[torch.Tensor]:
        """The places of each kind of state, in the order in which the engine gives them."""
        return [*self._aux[rows].split(self._facts.hidden_size, dim=-1), self._last[rows]]

    def choose(self, logits: torch.Tensor) -> bool:
        """Append every unfinished row's next token; whether any row needs another forward."""
        chosen = logits.argmax(-1).tolist()
        sampled = self._sample(logits) if any(self._sampled) else chosen
        for row, request in enumerate(self._group):
            if self._done[row]:
                # A finished row keeps its place, so that its neighbours' bits do not depend on it.
                self._answers[row].append(self._answers[row][-1])
                continue
            token = sampled[row] if self._sampled[row] else chosen[row]
            self._answers[row].append(token)
            ended = token in self._facts.eos_token_ids or len(self._answers[row]) == request.max_new_tokens
            if ended:
                self._done[row] = True
                self._lengths[row] += len(self._answers[row]) - 1  # the last token has no state
        return not all(self._done)

    def _sample(self, logits: torch.Tensor) -> list[int]:
        """Inverse of each row's cumulative distribution at the row's own next random number."""
        cumulative = (logits.float() / self._temperature).softmax(-1).cumsum(-1)
        points = self._points[len(self._answers[0])][:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, points, right=True)[:, 0]
        return [int(token) for token in tokens.clamp(max=logits.shape[-1] - 1)]

    def samples(self) -> list[CapturedSample]:
        """The finished rows. Their states are views of the group's, to be copied once, into a slot."""
        captured, bad = [], []
        for row, request in enumerate(self._group):
            length = self._lengths[row]
            aux, last = self._aux[row, :length], self._last[row, :length]
            if not (torch.isfinite(aux).all() and torch.isfinite(last).all()):
                bad.append(request.sample_id)
            prompt = len(request.prompt_ids)
            tokens = list(request.prompt_ids) + self._answers[row][: length - prompt]
            captured.append(
                CapturedSample(
                    sample_id=request.sample_id,
                    input_ids=torch.tensor(tokens, dtype=torch.int32),
                    loss_mask=(torch.arange(length) >= prompt).to(torch.uint8),
                    aux_hidden_states=aux,
                    last_hidden_states=last,
                )
            )
        if bad:
            raise EngineError(
                f"The target gave states that are not finite for {len(bad)} samples (first: {bad[0]}).",
                why="Training on them would destroy the draft's weights; nothing of the group was stored.",
                next="try target.dtype: float32, or remove the prompt.",
            )
        return captured


def _noise(request: CaptureRequest, size: int) -> torch.Tensor:
    """One random number for each token that the request may get, zeros up to `size`."""
    generator = torch.Generator().manual_seed(request.seed)
    numbers = torch.zeros(size)
    if request.temperature > 0:
        numbers[: request.max_new_tokens] = torch.rand(request.max_new_tokens, generator=generator)
    return numbers


def _common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with, leaving each at least one of its own."""
    shortest = min(len(prompt) for prompt in prompts) - 1
    first = prompts[0]
    return next((i for i in range(shortest) if any(p[i] != first[i] for p in prompts)), shortest)
