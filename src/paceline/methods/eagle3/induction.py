"""First weights of a draft's attention in closed form: heads that read their own row, and heads that copy.

An induction head (arXiv 2209.11895) looks for an earlier place where the last tokens stood already, and takes
the token that followed them. Text is full of such places, and yet training hardly finds the head: drafts that
began without it guessed 40 % of the tokens that the four tokens before give away in this way, and as many of
all others. So it is written down here. Row i knows the state of token i and the embedding of token i+1:

- A key is made from the row's state. The row before knows that token's embedding and a state of its own, and
  its query is made from these. The two are the sides of a canonical correlation analysis (Hotelling, 1936),
  so a query fits the rows at which the target was in the same situation.
- The value of such a row is the embedding of the token that followed.

In a group of query heads that share a key-value head the first reads its own row, the second looks for such
rows, and the third does so less strictly. The pairs of a key's numbers that turn slowly with the position
serve the search, which must not mind the distance; those that turn fast tell a row from its neighbours.
Then a ridge regression gives the heads' output what the residual stream lacks of the wanted direction.

Legend: R rows of a sample, A rows that learn, a some of them, H hidden, N heads, n some of them, N_kv
key-value heads, d head_dim, P pairs of a key that search.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from paceline.methods.eagle3.model import Attention, Eagle3Draft
from paceline.methods.eagle3.regression import Regression
from paceline.methods.targets import wanted_directions

OWN, ALIKE, LIKELY = range(3)  # what a query head looks for
_SCORES = {OWN: 16.0, ALIKE: 14.0, LIKELY: 7.0}  # that a head shall give to what it looks for
_SLOW = 1 / 70  # radians a row: a pair that turns less serves the search
# Added to each side of the correlation, relative to its mean variance, for every number that a row has: with
# few rows strangers seem to correlate.
_NOISE = 0.75
_WEAK = 0.1  # a correlation below it is taken for chance
_RIDGE = 300.0
_ROWS_MAX = 2048  # of a sample, its last ones: time goes with the square of it
_ROWS_AT_A_TIME = 128  # whose weights are in memory


@dataclass(frozen=True)
class _Rows:
    """The last rows of a sample. `inputs`: [R, 2H], what its attention reads; `learning`: int64 [A];
    `missing`: [A, H], what the residual stream lacks of the wanted directions."""

    inputs: torch.Tensor
    learning: torch.Tensor
    missing: torch.Tensor


@dataclass(frozen=True)
class _Plan:
    """How the numbers of heads are used. `kinds`: by query head, what it looks for, or None; `searching`
    and `telling`: int64 [2P] and [d - 2P], a key's numbers."""

    kinds: tuple[int | None, ...]
    searching: torch.Tensor
    telling: torch.Tensor

    def heads(self, kind: int) -> list[int]:
        return [number for number, found in enumerate(self.kinds) if found == kind]


@torch.no_grad()
def write_attention(
    draft: Eagle3Draft, samples: Sequence[Mapping[str, torch.Tensor]], generator: torch.Generator
) -> None:
    """Overwrite the projections of `draft`, whose `fc` is there. Heads that look for nothing stay random."""
    attention = draft.midlayer.self_attn
    plan = _plan(attention)
    _write_own(attention, plan, generator)
    _write_search(draft, plan, samples)
    _write_values(draft, plan, samples)
    _write_outputs(draft, samples)


def _plan(attention: Attention) -> _Plan:
    pairs = attention.head_dim // 2
    # One pair at least for either purpose.
    slow = int((attention.rope.frequencies() <= _SLOW).sum())
    first = pairs - min(max(1, slow), max(1, pairs - 1))
    telling = torch.arange(first)
    searching = torch.arange(first, pairs).flip(0)  # the strongest directions turn least
    group = attention.heads // attention.kv_heads
    # Heads that share no keys take turns.
    places = (number % (len(_SCORES) if group == 1 else group) for number in range(attention.heads))
    return _Plan(
        kinds=tuple(place if place in _SCORES else None for place in places),
        searching=torch.stack((searching, searching + pairs), dim=1).flatten(),
        telling=torch.cat((telling, telling + pairs)),
    )


def _score(attention: Attention, kind: int) -> float:
    """What the product of query and key shall be, before either is turned and scaled."""
    return _SCORES[kind] * math.sqrt(attention.head_dim) / attention.rope.factor**2


def _write_own(attention: Attention, plan: _Plan, generator: torch.Generator) -> None:
    """Equal query and key projections of the embedding: a row scores highest with itself."""
    hidden, group = attention.q_proj.in_features // 2, attention.heads // attention.kv_heads
    queries, keys = _by_head(attention.q_proj, attention), _by_head(attention.k_proj, attention)
    size = (_score(attention, OWN) / max(1, plan.telling.numel())) ** 0.5
    keys.zero_()
    for number in range(attention.kv_heads):
        noise = torch.randn(hidden, plan.telling.numel(), generator=generator)
        shared = torch.linalg.qr(noise)[0].T * size
        keys[number, plan.telling[: shared.shape[0]], :hidden] = shared
    for head in plan.heads(OWN):
        queries[head] = keys[head // group]


def _write_search(draft: Eagle3Draft, plan: _Plan, samples: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Queries and keys of the heads that copy; every key-value head has correlated directions of its own."""
    attention, hidden = draft.midlayer.self_attn, draft.config.hidden_size
    group = attention.heads // attention.kv_heads
    queries, keys = _by_head(attention.q_proj, attention), _by_head(attention.k_proj, attention)
    of_states, of_knowledge, strength = _correlated(draft, samples)
    places = torch.arange(plan.searching.numel()) * attention.kv_heads
    directions = [(number + places) % hidden for number in range(attention.kv_heads)]
    for number, chosen in enumerate(directions):
        keys[number, plan.searching, hidden:] = of_states[chosen]
    for kind in (ALIKE, LIKELY):
        for head in plan.heads(kind):
            chosen = directions[head // group]
            unit = _score(attention, kind) / max(1.0, float(strength[chosen].sum()))
            queries[head] = 0.0
            queries[head, plan.searching] = of_knowledge[chosen] * unit


def _correlated(
    draft: Eagle3Draft, samples: Sequence[Mapping[str, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Directions of a row's state [H, H], of what the row before it knows [H, 2H], and how strongly the two
    correlate [H], the strongest first. Both sides have unit variance along them; those that correlate by
    chance are zero. What all rows of a sample share is left out of the estimate, as it tells none apart.
    """
    hidden = draft.config.hidden_size
    of_states = torch.zeros(hidden, hidden, dtype=torch.float64)
    of_knowledge = torch.zeros(2 * hidden, 2 * hidden, dtype=torch.float64)
    between, num_rows = torch.zeros(2 * hidden, hidden, dtype=torch.float64), 0
    for sample in samples:
        inputs = _read(draft, sample).inputs
        if inputs.shape[0] < 2:
            continue
        states, knowledge = inputs[1:, hidden:], inputs[:-1]
        states, knowledge = states - states.mean(0), knowledge - knowledge.mean(0)
        of_states += states.T @ states
        of_knowledge += knowledge.T @ knowledge
        between += knowledge.T @ states
        num_rows += states.shape[0]
    for moments in (of_states, of_knowledge, between):
        moments /= max(1, num_rows)
    noise = min(1.0, _NOISE * hidden / max(1, num_rows))
    for moments in (of_states, of_knowledge):
        moments.diagonal().add_(noise * float(moments.diagonal().mean()) + 1e-6)
    regressed = torch.cholesky_solve(between, torch.linalg.cholesky(of_knowledge))  # [2H, H]
    whitening = torch.linalg.cholesky(of_states)
    half = torch.linalg.solve_triangular(whitening, between.T @ regressed, upper=False)
    squares, axes = torch.linalg.eigh(torch.linalg.solve_triangular(whitening, half.T, upper=False))
    strength = squares.clamp(min=0.0).sqrt().flip(0)
    strength = strength * (strength > _WEAK)
    directions = torch.linalg.solve_triangular(whitening.T, axes.flip(1), upper=True) * (strength > 0)
    of_those = (regressed @ directions) / strength.clamp(min=_WEAK)
    return directions.T.float(), of_those.T.float(), strength.float()


def _write_values(draft: Eagle3Draft, plan: _Plan, samples: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Values: of an embedding what matters most of the row's own token, and of tokens to copy."""
    attention, hidden = draft.midlayer.self_attn, draft.config.hidden_size
    copying = plan.heads(ALIKE)
    regression = Regression(2 * hidden, hidden)
    for sample in samples:
        rows = _read(draft, sample)
        embeddings = rows.inputs[:, :hidden]
        own = embeddings[rows.learning]
        copied = torch.zeros_like(own)
        if copying:
            copied = torch.cat([some.mean(0) @ embeddings for some in _weights(draft, rows, copying)])
        regression.add(torch.cat((own, copied), dim=-1), rows.missing)
    of_own, of_copied = regression.solved(_RIDGE).split(hidden)
    both = of_own @ of_own.T + of_copied @ of_copied.T
    axes = torch.linalg.eigh(both)[1].flip(1)[:, : attention.kv_heads * attention.head_dim]
    values = _by_head(attention.v_proj, attention)
    values.zero_()
    for number in range(attention.kv_heads):
        part = axes[:, number :: attention.kv_heads].T
        values[number, : part.shape[0], :hidden] = part


def _write_outputs(draft: Eagle3Draft, samples: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """The output projection, by what the heads really read."""
    attention = draft.midlayer.self_attn
    regression = Regression(attention.heads * attention.head_dim, draft.config.hidden_size)
    for sample in samples:
        rows = _read(draft, sample)
        values = attention.key_value(rows.inputs[None], _positions(rows.inputs))[1][0]
        values = values.repeat_interleave(attention.heads // attention.kv_heads, 0)
        every = _weights(draft, rows, range(attention.heads))
        mixed = torch.cat([(some @ values).transpose(0, 1).flatten(1) for some in every])
        regression.add(mixed, rows.missing)
    attention.o_proj.weight.copy_(regression.solved(_RIDGE).T)


def _read(draft: Eagle3Draft, sample: Mapping[str, torch.Tensor]) -> _Rows:
    ids, states = sample["input_ids"].long(), sample["aux_hidden_states"]
    first = max(0, states.shape[0] - _ROWS_MAX)
    fused = draft.fuse(states[first:].float())
    inputs = draft.midlayer.inputs(draft.embed(ids[first + 1 :]), fused)
    learning, wanted = wanted_directions(sample)
    near = learning >= first
    learning = learning[near] - first
    return _Rows(inputs, learning, wanted[near] - fused[learning])


def _weights(draft: Eagle3Draft, rows: _Rows, heads: Sequence[int]) -> Iterator[torch.Tensor]:
    """How much the rows that learn, some at a time, take of each row by n `heads`: [n, a, R]."""
    attention, window = draft.midlayer.self_attn, draft.config.sliding_window
    positions, group = _positions(rows.inputs), attention.heads // attention.kv_heads
    keys = attention.key_value(rows.inputs[None], positions)[0][0][[head // group for head in heads]]
    for some in rows.learning.split(_ROWS_AT_A_TIME):
        queries = attention.query(rows.inputs[None, some], some[None])[0][list(heads)]
        back = some[:, None] - positions  # [a, R]: how many rows before the query's
        unseen = back < 0 if window is None else (back < 0) | (back >= window)
        scores = queries @ keys.mT * attention.head_dim**-0.5
        yield scores.masked_fill_(unseen, float("-inf")).softmax(-1)


def _by_head(projection: nn.Linear, attention: Attention) -> torch.Tensor:
    """The weights as [heads, d, 2H], in the same memory."""
    return projection.weight.view(-1, attention.head_dim, projection.in_features)


def _positions(inputs: torch.Tensor) -> torch.Tensor:
    return torch.arange(inputs.shape[0])[None]
