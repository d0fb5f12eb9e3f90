"""The rows of a capture group while it is answered: tokens, masks and the states so far.

Every row keeps its place to the end, finished or not, so that no row's bits depend on when another
one ended.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from paceline.engines.engine import CapturedSample, CaptureRequest
from paceline.engines.token_choice import TokenChoice
from paceline.errors import EngineError
from paceline.target.facts import TargetFacts


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
        self._choice = TokenChoice(group, facts.vocab_size, device)
        self._answers: list[list[int]] = [[] for _ in group]
        self._open = list(range(len(group)))  # rows whose answer has not ended
        self._steps = 0
        num_aux = len(facts.aux_layer_ids)
        self._aux = _Kept(group, "aux_hidden_states", num_aux * facts.hidden_size, dtype, device)
        self._last = _Kept(group, "last_hidden_states", facts.hidden_size, dtype, device)

    def by_length(self, size: int) -> list[tuple[torch.Tensor, int]]:
        """Rows in parts of `size`, shortest first, with the most tokens one has beyond the shared ones."""
        order = sorted(range(self.count), key=lambda row: self._lengths[row])
        parts = [order[i : i + size] for i in range(0, self.count, size)]
        device = self.mask.device
        return [(torch.tensor(part, device=device), self._lengths[part[-1]] - self.shared) for part in parts]

    def keep_shared(self, states: Sequence[torch.Tensor]) -> None:
        """Keep the states of what all prompts begin with, computed for one row."""
        for row in range(self.count):
            self._keep_prompt(row, 0, [state[0] for state in states])

    def keep_prompts(self, members: torch.Tensor, states: Sequence[torch.Tensor]) -> None:
        """Keep the states of the rest of some rows' prompts; each row's padding comes first."""
        for place, row in enumerate(members.tolist()):
            own = self._lengths[row] - self.shared
            self._keep_prompt(row, self.shared, [state[place, -own:] for state in states])

    def _keep_prompt(self, row: int, token: int, states: Sequence[torch.Tensor]) -> None:
        """Keep one row's states of the tokens from `token` on, each [n, hidden_size]."""
        *aux, last = states
        self._aux.keep_tokens(row, token, aux)
        self._last.keep_tokens(row, token, [last])

    def keep(self, states: Sequence[torch.Tensor]) -> None:
        """Keep the states of the latest forward, one token a row, behind those before it."""
        *aux, last = states
        self._aux.keep_step(aux)
        self._last.keep_step([last])
        self.length += 1

    def choose(self, logits: torch.Tensor) -> torch.Tensor | None:
        """Append every unfinished row's next token; the tokens to process next, [B, 1], or None at the end.

        A finished row keeps its place and gets tokens that are nowhere kept.
        """
        chosen = self._choice.choose(logits, self._steps)
        self._steps += 1
        tokens, still_open = chosen.tolist(), []
        for row in self._open:
            answer, token = self._answers[row], tokens[row]
            answer.append(token)
            if token in self._facts.eos_token_ids or len(answer) == self._group[row].max_new_tokens:
                self._lengths[row] += len(answer) - 1  # the last token has no state
            else:
                still_open.append(row)
        self._open = still_open
        return chosen[:, None] if still_open else None

    def samples(self) -> list[CapturedSample]:
        """The finished rows. Their states are views of the group's, to be copied once, into a slot."""
        captured, bad = [], []
        for row, request in enumerate(self._group):
            length, prompt = self._lengths[row], len(request.prompt_ids)
            aux, last = self._aux.of_row(row, length), self._last.of_row(row, length)
            if not (_is_finite(aux) and _is_finite(last)):
                bad.append(request.sample_id)
            tokens = [*request.prompt_ids, *self._answers[row][: length - prompt]]
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


class _Kept:
    """The states of one name for all rows of the group: no padding, and no row that nobody asked for.

    One buffer because nobody knows an answer's length before its end; what a sample needs of it lies
    in one piece.
    """

    def __init__(
        self,
        group: Sequence[CaptureRequest],
        name: str,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._first = [request.first_row(name) for request in group]
        prompts = [len(request.prompt_ids) - request.first_row(name) for request in group]
        size = max(prompts) + max(request.max_new_tokens for request in group) - 1
        self._states = torch.empty((len(group), size, width), dtype=dtype, device=device)
        self._rows, self._next = torch.arange(len(group), device=device), torch.tensor(prompts, device=device)

    def keep_tokens(self, row: int, token: int, parts: Sequence[torch.Tensor]) -> None:
        """Keep a row's states of the tokens from `token` on; `parts` [n, ...] lie side by side."""
        first = self._first[row]
        states = torch.cat([part[max(0, first - token) :] for part in parts], dim=-1)
        at = max(token, first) - first
        self._states[row, at : at + len(states)] = states

    def keep_step(self, parts: Sequence[torch.Tensor]) -> None:
        """Keep the state of every row's next answer token; `parts` [B, 1, ...] lie side by side."""
        self._states[self._rows, self._next] = torch.cat(list(parts), dim=-1)[:, 0]
        self._next += 1

    def of_row(self, row: int, length: int) -> torch.Tensor:
        """[R, width]: what is kept of a row that has processed `length` tokens."""
        return self._states[row, : length - self._first[row]]


def _is_finite(states: torch.Tensor) -> bool:
    """Least and greatest in one pass: an infinite number is one of them, a NaN is both."""
    return bool(torch.isfinite(torch.stack(torch.aminmax(states))).all())


def _common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with, leaving each at least one of its own."""
    shortest = min(len(prompt) for prompt in prompts) - 1
    first = prompts[0]
    return next((i for i in range(shortest) if any(p[i] != first[i] for p in prompts)), shortest)
