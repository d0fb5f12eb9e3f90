"""The rows of a capture group while the target answers it: tokens, masks and the states so far.

Every row keeps its place until all have finished, so that no row's bits depend on when another one
finished.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

import torch

from paceline.engines.engine import Captured, CaptureRequest
from paceline.engines.settings import PREFILL_ROWS
from paceline.engines.token_choice import TokenChoice
from paceline.errors import EngineError
from paceline.target.facts import TargetFacts
from paceline.types import Feature, Rows, States, Tokens


class CaptureRows:
    """What each row of the group holds, and the states captured so far.

    Rows are in the order of their lengths.

    A row's *known* tokens are the tokens of its request that the target processes. After them come the
    tokens that the target writes or, in a prefill, the last token, which is not processed.
    """

    def __init__(
        self,
        group: Sequence[CaptureRequest],
        features: Sequence[Feature],
        facts: TargetFacts,
        device: torch.device,
        *,
        share_prefix: bool = True,
    ) -> None:
        """`share_prefix`: read the tokens that all rows begin with once; padding then follows them."""
        self._order = sorted(range(len(group)), key=lambda place: len(group[place].processed))
        group = [group[place] for place in self._order]
        known = [request.processed for request in group]
        lengths = [len(tokens) for tokens in known]
        self._group, self._features, self._facts, self._lengths = group, features, facts, lengths
        longest, answer = max(lengths), max(request.max_new_tokens for request in group)
        self.count = len(group)
        self.capacity = longest + answer
        self.length = longest  # positions processed (or about to be, by the prefill), padding included
        self.shared = _common_prefix(known) if share_prefix else 0
        # Rows of similar length, and where the prefix begins in each of them.
        self.parts = [
            (slice(first, first + PREFILL_ROWS), longest - lengths[min(first + PREFILL_ROWS, self.count) - 1])
            for first in range(0, self.count, PREFILL_ROWS)
        ]
        # A row: padding, the shared prefix, padding, the rest of its known tokens, its answer.
        starts = [self.parts[row // PREFILL_ROWS][1] for row in range(self.count)]
        start = torch.tensor(starts, device=device)[:, None]
        self.padding = torch.tensor([longest - length for length in lengths], device=device)
        slots = torch.arange(self.capacity, device=device)
        is_shared = (slots >= start) & (slots < start + self.shared)
        self.mask = (is_shared | (slots >= self.shared + self.padding[:, None])).long()
        pad, cut = (facts.eos_token_ids or (0,))[0], self.shared
        padded = [
            [*[pad] * before, *ids[:cut], *[pad] * (longest - len(ids) - before), *ids[cut:]]
            for ids, before in zip(known, starts, strict=True)
        ]
        self.known_ids = torch.tensor(padded, device=device)
        self._choice = TokenChoice(group, facts.vocab_size, device)
        self._answers: list[list[int]] = [[] for _ in group]
        # Rows whose answer has not ended.
        self._open = [row for row, request in enumerate(group) if request.max_new_tokens]
        self._steps = 0
        self._kept = {
            feature.name: _Kept(group, feature, facts.hidden_size, device)
            for feature in features
            if isinstance(feature.source, States)
        }

    @property
    def are_open(self) -> bool:
        """Whether the target is to write at least one more token."""
        return bool(self._open)

    def keep_shared(self, states: Mapping[int, torch.Tensor]) -> None:
        """Keep the states of the shared prefix, computed for one row."""
        for kept in self._kept.values():
            parts = [states[k][0] for k in kept.layers]
            for row in range(self.count):
                kept.keep_tokens(row, 0, parts)

    def keep_known(self, members: slice, states: Mapping[int, torch.Tensor]) -> None:
        """Keep the states of the known tokens after the prefix, of some rows; padding comes first."""
        for place, row in enumerate(range(self.count)[members]):
            own = self._lengths[row] - self.shared
            for kept in self._kept.values():
                kept.keep_tokens(row, self.shared, [states[k][place, -own:] for k in kept.layers])

    def keep(self, states: Mapping[int, torch.Tensor]) -> None:
        """Append the states of the latest forward's last token, one per row."""
        for kept in self._kept.values():
            kept.keep_step([states[k] for k in kept.layers])
        self.length += 1

    def choose(self, logits: torch.Tensor) -> torch.Tensor | None:
        """Append every unfinished row's next token. Returns the tokens to process next, [B, 1], or None.

        A finished row keeps its place; its further tokens are dropped.
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

    def samples(self) -> list[Captured]:
        """The finished rows, in the order of the group.

        Their states are views into the group's buffers; the store copies them once.
        """
        captured, bad = list[Captured](), []
        for row in sorted(range(self.count), key=self._order.__getitem__):
            request = self._group[row]
            tokens = [*request.token_ids, *self._answers[row]]
            states = {name: kept.of_row(row, self._lengths[row]) for name, kept in self._kept.items()}
            if not all(is_sound(state) for state in states.values()):
                bad.append(request.sample_id)
            captured.append(
                Captured(request.sample_id, sample_tensors(request, self._features, tokens, states))
            )
        if bad:
            raise EngineError(
                f"The target gave states that are not finite, or all zero, for {len(bad)} samples "
                f"(first: {bad[0]}).",
                why="Training on them would destroy the draft's weights; nothing of the group was stored.",
                next="try target.dtype: float32, or remove the prompt.",
            )
        return captured


def sample_tensors(
    request: CaptureRequest,
    features: Sequence[Feature],
    tokens: Sequence[int],
    states: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """All tensors of a sample, from its given and written tokens and its kept `states` by feature name."""
    tensors = {}
    for feature in features:
        if isinstance(feature.source, States):
            tensors[feature.name] = states[feature.name]
        else:
            values = tokens if isinstance(feature.source, Tokens) else request.targets(len(tokens))
            tensors[feature.name] = torch.tensor(values, dtype=getattr(torch, feature.dtype))
    return tensors


def kept_rows(feature: Feature, targets: Sequence[bool]) -> list[int]:
    """The rows of a state that `feature` keeps; `targets` has one entry more than there are rows."""
    rows = range(len(targets) - 1)
    return list(rows) if feature.rows == Rows.ALL else [row for row in rows if targets[row + 1]]


class _Kept:
    """The kept states of one feature for all rows of the group, without padding.

    They share one buffer because an answer's length is unknown until it ends; the states of one sample
    are contiguous in it.
    """

    def __init__(
        self, group: Sequence[CaptureRequest], feature: Feature, hidden_size: int, device: torch.device
    ) -> None:
        assert isinstance(feature.source, States)
        self.layers = feature.source.layers
        self._known = [len(request.processed) for request in group]
        # The known tokens of each row whose state is kept; the state of every written token is kept.
        self._wanted = [kept_rows(feature, request.targets(len(request.processed) + 1)) for request in group]
        self._counts = [len(rows) for rows in self._wanted]
        written = max(0, max(request.max_new_tokens for request in group) - 1)
        self._states = torch.empty(
            (len(group), max(self._counts) + written, len(self.layers) * hidden_size),
            dtype=getattr(torch, feature.dtype),
            device=device,
        )
        self._rows = torch.arange(len(group), device=device)
        self._next = torch.tensor(self._counts, device=device)

    def keep_tokens(self, row: int, token: int, parts: Sequence[torch.Tensor]) -> None:
        """Keep a row's states from `token` on, as one tensor of `parts` [n, ...] side by side."""
        wanted = self._wanted[row]
        first, last = (bisect_left(wanted, end) for end in (token, token + len(parts[0])))
        if first == last:
            return
        places = [place - token for place in wanted[first:last]]
        whole = places[-1] - places[0] < len(places)  # contiguous, so a slice suffices
        taken = [part[places[0] : places[-1] + 1] if whole else part[places] for part in parts]
        self._states[row, first:last] = torch.cat(taken, dim=-1)

    def keep_step(self, parts: Sequence[torch.Tensor]) -> None:
        """Keep the state of every row's next answer token, the last of `parts` [B, n, ...], as one tensor."""
        last = torch.cat([part[:, -1] for part in parts], dim=-1)
        self._states[self._rows, self._next] = last.to(self._states.dtype)
        self._next += 1

    def of_row(self, row: int, length: int) -> torch.Tensor:
        """The kept states [R, width] of a row that has processed `length` tokens."""
        return self._states[row, : self._counts[row] + length - self._known[row]]


def is_sound(states: torch.Tensor) -> bool:
    """Whether every row of states [..., H] is finite and none is all zeros, which no sound layer gives."""
    least, greatest = torch.aminmax(states, dim=-1) if states.numel() else (states, states)
    # An infinite value is the maximum or the minimum; a NaN is both.
    finite = torch.isfinite(least).all() & torch.isfinite(greatest).all()
    return bool(finite & ((least != 0) | (greatest != 0)).all())


def _common_prefix(known: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with, leaving each at least one of its own."""
    shortest = min(len(tokens) for tokens in known) - 1
    first = known[0]
    return next((i for i in range(shortest) if any(p[i] != first[i] for p in known)), shortest)
