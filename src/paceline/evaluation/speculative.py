"""Lossless speculative decoding of one sequence, and the plain decoding that it must equal.

A cycle drafts a chain of tokens, runs the target once over the newest token and the chain, keeps
the longest accepted prefix and adds one token of the target's own. Greedy: a draft token is kept if
it is the target's argmax, so the output is the target's. Sampled: rejection sampling (Leviathan et
al. 2023, arXiv 2211.17192, algorithm 1) keeps the target's distribution; a reduced draft vocabulary
only means that the draft gives no mass to the other tokens.

Both decoders use the same `Verifier`. Sampling draws from one seeded generator.
Legend: V target vocabulary, D draft vocabulary, n new rows.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from paceline.errors import ConfigError
from paceline.evaluation.tree import Drafting, DraftTree
from paceline.evaluation.verifier import TargetStep, Verifier
from paceline.methods.drafter import Drafter, TreeDrafter

# The longest chain: plain decoding reserves the same cache, so that both see tensors of one shape.
MAX_DRAFT_TOKENS = 16
MAX_TREE_ROWS = 256  # drafted rows a drafter may hold at once while it grows a tree


@dataclass(frozen=True)
class Decoding:
    """Length and sampling of an answer. `temperature` 0 is greedy; `seed` matters only above 0."""

    max_new_tokens: int
    eos_token_ids: tuple[int, ...] = ()
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Decoded:
    """New tokens, and the seconds they took after the target's prefill (which both decoders share).

    `accepted` has one entry per target cycle: how many draft tokens were kept. The first token comes
    from the prefill, the others from the cycles; the end of the text may cut the last cycle short.
    Of `decode_s`, guessing took `draft_s`, and the target's passes up to its choices took `target_s`.
    """

    tokens: list[int]
    decode_s: float
    prefill_s: float
    accepted: tuple[int, ...] = ()
    draft_s: float = 0.0
    target_s: float = 0.0


def plain_generate(target: Verifier, prompt_ids: tuple[int, ...], decoding: Decoding) -> Decoded:
    """Decode one token per target step. Raises ConfigError if there is nothing to decode."""
    choose = _Chooser(decoding, target.device)
    began = time.perf_counter()
    tokens = [choose(_prefill(target, prompt_ids, decoding).logits[-1])[0]]
    prefilled = time.perf_counter()  # a GPU has done it when its first token is known
    while not _finished(tokens, decoding):
        logits = target.forward(_ids(tokens[-1:], target)).logits
        tokens.append(choose(logits[-1])[0])
    return Decoded(tokens, time.perf_counter() - prefilled, prefilled - began)


def speculative_generate(
    target: Verifier,
    drafter: Drafter,
    prompt_ids: tuple[int, ...],
    decoding: Decoding,
    drafting: Drafting,
) -> Decoded:
    """Decode with 1 to 16 draft tokens a cycle. Raises ConfigError if there is nothing to decode.

    A tree needs greedy decoding and a draft that can propose one; otherwise a chain of that length is used.
    """
    if not 1 <= drafting.num_tokens <= MAX_DRAFT_TOKENS:
        raise ConfigError(
            f"{drafting.num_tokens} draft tokens lie outside 1..{MAX_DRAFT_TOKENS}.",
            why="The cache reserves room for one chain past the end of the answer.",
            next="use 3 or 4 for a chain, 7 for a tree",
        )
    choose = _Chooser(decoding, target.device)
    began = time.perf_counter()
    step = _prefill(target, prompt_ids, decoding)
    tokens = [choose(step.logits[-1])[0]]
    prefilled = time.perf_counter()
    drafter.start(target.capacity + MAX_TREE_ROWS)
    aux, next_ids = step.aux, [*prompt_ids[1:], tokens[0]]
    accepted: list[int] = []
    use_tree = not drafting.is_chain and decoding.temperature <= 0
    clock = _Clock()
    while not _finished(tokens, decoding):
        if use_tree and isinstance(drafter, TreeDrafter):
            aux, next_ids = _tree_cycle(target, drafter, aux, next_ids, drafting, choose, clock)
        else:
            aux, next_ids = _chain_cycle(target, drafter, aux, next_ids, drafting, choose, clock)
        accepted.append(len(next_ids) - 1)
        _extend(tokens, next_ids, decoding)
    seconds = time.perf_counter() - prefilled
    return Decoded(tokens, seconds, prefilled - began, tuple(accepted), clock.draft_s, clock.target_s)


def follow_answer(
    target: Verifier,
    drafter: Drafter,
    prompt_ids: tuple[int, ...],
    answer: Sequence[int],
    drafting: Drafting,
) -> tuple[int, ...]:
    """How many draft tokens each cycle would accept if the target wrote just this `answer`, at least a token.

    An answer that the target chose greedily gives what decoding it gives. Of a sampled one, a guess counts
    if it is the token that was drawn. Raises ConfigError as above.
    """
    step = _prefill(target, prompt_ids, Decoding(len(answer)))
    drafter.start(target.capacity + MAX_TREE_ROWS)
    choose = _Chooser(Decoding(len(answer)), target.device)
    aux, next_ids, done = step.aux, [*prompt_ids[1:], answer[0]], 1
    accepted: list[int] = []
    while done < len(answer):
        tree = _guessed(drafter, aux, _ids(next_ids, target), next_ids[-1], drafting, choose)
        path = tree.along(answer[done:])
        step = target.verify(tree)
        target.accept(path)
        aux, next_ids = step.aux[path], list(answer[done : done + len(path)])
        accepted.append(len(path) - 1)
        done += len(path)
    return tuple(accepted)


def _guessed(
    drafter: Drafter,
    aux: torch.Tensor,
    next_ids: torch.Tensor,
    newest: int,
    drafting: Drafting,
    choose: _Chooser,
) -> DraftTree:
    """The guesses after the `newest` token, greedy ones, as a tree or a chain."""
    if not drafting.is_chain and isinstance(drafter, TreeDrafter):
        tokens, parents = drafter.propose_tree(
            aux, next_ids, drafting.num_tokens, drafting.branching, drafting.max_depth
        )
        return DraftTree((newest, *tokens), (-1, *parents))
    chain, _ = drafter.propose(aux, next_ids, drafting.num_tokens, choose)
    return DraftTree.chain([newest, *chain])


class _Clock:
    """Sums the seconds of guessing and of the target. Both end with tokens on the host, on a GPU, too."""

    def __init__(self) -> None:
        self.draft_s = self.target_s = 0.0

    def begin(self) -> None:
        self._began = time.perf_counter()

    def drafted(self) -> None:
        self._drafted = time.perf_counter()
        self.draft_s += self._drafted - self._began

    def verified(self) -> None:
        self.target_s += time.perf_counter() - self._drafted


def _chain_cycle(
    target: Verifier,
    drafter: Drafter,
    aux: torch.Tensor,
    next_ids: list[int],
    drafting: Drafting,
    choose: _Chooser,
    clock: _Clock,
) -> tuple[torch.Tensor, list[int]]:
    """Run one cycle. Returns the states of the rows that were kept, and the token after each of them."""
    clock.begin()
    chain, proposals = drafter.propose(aux, _ids(next_ids, target), drafting.num_tokens, choose)
    clock.drafted()
    step = target.verify(DraftTree.chain([next_ids[-1], *chain]))
    if choose.temperature > 0:
        kept, own = _verify_sampled(step.logits, chain, proposals, drafter.target_ids, choose)
    else:
        kept, own = _verify_greedy(step.logits, chain)
    clock.verified()
    target.accept(list(range(kept + 1)))
    return step.aux[: kept + 1], [*chain[:kept], own]


def _tree_cycle(
    target: Verifier,
    drafter: TreeDrafter,
    aux: torch.Tensor,
    next_ids: list[int],
    drafting: Drafting,
    choose: _Chooser,
    clock: _Clock,
) -> tuple[torch.Tensor, list[int]]:
    clock.begin()
    tree = _guessed(drafter, aux, _ids(next_ids, target), next_ids[-1], drafting, choose)
    clock.drafted()
    step = target.verify(tree)
    wanted = _likeliest(step.logits)
    clock.verified()
    path = tree.follow(wanted)
    target.accept(path)
    return step.aux[path], [wanted[row] for row in path]


def _prefill(target: Verifier, prompt_ids: tuple[int, ...], decoding: Decoding) -> TargetStep:
    if not prompt_ids or decoding.max_new_tokens < 1:
        raise ConfigError(
            f"Nothing to decode: {len(prompt_ids)} prompt tokens, max_new_tokens={decoding.max_new_tokens}.",
            why="A decoder needs at least one token to start from and one to produce.",
            next="give a prompt and max_new_tokens >= 1",
        )
    target.start(len(prompt_ids) + decoding.max_new_tokens + MAX_DRAFT_TOKENS)
    return target.forward(_ids(prompt_ids, target), last_only=True)


def _ids(tokens: Sequence[int], target: Verifier) -> torch.Tensor:
    return torch.tensor(tokens, device=target.device)


class _Chooser:
    """Turns logits into tokens: argmax when greedy, one seeded draw otherwise."""

    def __init__(self, decoding: Decoding, device: torch.device) -> None:
        self.temperature = decoding.temperature
        self.generator = torch.Generator(device).manual_seed(decoding.seed)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        return (logits.float() / self.temperature).softmax(-1)

    def draw(self, probabilities: torch.Tensor) -> int:
        return int(torch.multinomial(probabilities, 1, generator=self.generator))

    def __call__(self, logits: torch.Tensor) -> tuple[int, torch.Tensor | None]:
        if self.temperature <= 0:
            return _likeliest(logits[None])[0], None
        probabilities = self.probabilities(logits)
        return self.draw(probabilities), probabilities

    def accepts(self, probability: float) -> bool:
        draw = torch.rand((), generator=self.generator, dtype=torch.float64, device=self.generator.device)
        return float(draw) < probability


def _likeliest(logits: torch.Tensor) -> list[int]:
    """Each row's choice; the first of equal ones. (`argmax` takes three times as long on a CPU.)"""
    choices: list[int] = logits.max(-1).indices.tolist()
    return choices


def _verify_greedy(logits: torch.Tensor, chain: list[int]) -> tuple[int, int]:
    """(kept draft tokens, the target's own next token) from logits [n, V] of the newest token and chain."""
    wanted = _likeliest(logits)
    kept = 0
    while kept < len(chain) and chain[kept] == wanted[kept]:
        kept += 1
    return kept, wanted[kept]


def _verify_sampled(
    logits: torch.Tensor,
    chain: list[int],
    proposals: list[torch.Tensor | None],
    target_ids: torch.Tensor,
    chooser: _Chooser,
) -> tuple[int, int]:
    """As `_verify_greedy`, by rejection: keep x with probability min(1, p(x) / q(x)).

    After a rejection the next token comes from max(p - q, 0), normalised, where q is the draft's
    distribution spread over the target vocabulary with zero for what it cannot propose. A guess without a
    distribution was certain: q is 1 for it.
    """
    wanted = chooser.probabilities(logits)
    for kept, (token, proposal) in enumerate(zip(chain, proposals, strict=True)):
        spread = torch.zeros_like(wanted[kept])
        if proposal is None:
            spread[token] = 1.0
        else:
            spread.index_copy_(0, target_ids, proposal)
        if not chooser.accepts(float(wanted[kept, token] / spread[token])):
            return kept, chooser.draw(_remainder(wanted[kept], spread))
    return len(chain), chooser.draw(wanted[len(chain)])


def _remainder(wanted: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    """max(p - q, 0), not normalised; p itself where p and q agree to rounding and nothing is left of it."""
    left = (wanted - spread).clamp_min_(0.0)
    return left if bool(left.sum() > 0) else wanted


def _finished(tokens: list[int], decoding: Decoding) -> bool:
    return len(tokens) >= decoding.max_new_tokens or tokens[-1] in decoding.eos_token_ids


def _extend(tokens: list[int], new: list[int], decoding: Decoding) -> None:
    """Append `new` up to the first token that ends the text or reaches the limit."""
    for token in new:
        tokens.append(token)
        if _finished(tokens, decoding):
            return
