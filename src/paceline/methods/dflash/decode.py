"""Drafting with a block draft: one pass of the backbone a cycle, then the head's guesses from depth to depth.

The cache holds, for every layer, keys and values of the rows that the target has processed. A block leaves
nothing in it. Nothing here needs to be exact: a wrong proposal costs time, never correctness.
"""

from __future__ import annotations

import copy

import torch

from paceline.methods.dflash.attention import Layout, Tile, tiled
from paceline.methods.dflash.heads.head import Places
from paceline.methods.dflash.model import DFlashDraft
from paceline.methods.drafter import Choose
from paceline.methods.guesses import ROOT, Guesses


class DFlashDecoder:
    """Proposes tokens for one sequence at a time, with a copy of the draft's weights in `dtype`.

    A cycle proposes at most the draft's `depths` tokens, however many are asked for.
    """

    def __init__(self, draft: DFlashDraft, dtype: torch.dtype = torch.bfloat16) -> None:
        # The target's tensors are not copied, unless they have another dtype.
        frozen = {id(tensor): tensor for tensor in draft.buffers()}
        self.draft = copy.deepcopy(draft, frozen).to(dtype).requires_grad_(False)
        self.config, self.layers, self.dtype = draft.config, draft.config.aux_layer_ids, dtype
        self.device = draft.fc.weight.device
        self.target_ids = torch.arange(draft.config.vocab_size, device=self.device)
        self.length = 0

    def start(self, capacity: int) -> None:
        """Begin a sequence of at most `capacity` rows."""
        config = self.config
        shape = (config.num_hidden_layers, 2, 1, config.num_key_value_heads, capacity, config.head_dim)
        self.cache = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self.length = 0

    @torch.inference_mode()
    def propose(
        self, aux: torch.Tensor, next_ids: torch.Tensor, count: int, choose: Choose
    ) -> tuple[list[int], list[torch.Tensor | None]]:
        """Read the rows that the target has newly processed, then draft up to `count` tokens.

        `aux` [n, len(layers) * H] are the new rows' states and `next_ids` int64 [n] the token after each; the
        last one is the newest token of the sequence. Returns token ids and each one's distribution.
        """
        hidden, base = self._block(aux, next_ids, count)
        tokens: list[int] = []
        distributions: list[torch.Tensor | None] = []
        previous, state = next_ids[-1:], None
        for depth in range(base.shape[0]):
            logits, state = self._logits(hidden[depth : depth + 1], base[depth], previous, state)
            token, distribution = choose(logits[0])
            tokens.append(token)
            distributions.append(distribution)
            previous = self.target_ids[token : token + 1]
        return tokens, distributions

    @torch.inference_mode()
    def propose_tree(
        self, aux: torch.Tensor, next_ids: torch.Tensor, num_tokens: int, branching: int, depth: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """As `propose`, but the `num_tokens` likeliest guesses of a tree: (tokens, parent rows)."""
        hidden, base = self._block(aux, next_ids, depth)
        guesses, frontier = Guesses(), [ROOT]
        previous, state = next_ids[-1:], None
        for level in range(base.shape[0]):
            logits, state = self._logits(hidden[level : level + 1], base[level], previous, state)
            likeliest = guesses.grow(logits.float(), frontier, branching, level)
            places = [frontier.index(parent) for parent in guesses.parents(likeliest)]
            previous = self.target_ids[guesses.draft_ids(likeliest)]
            state = None if state is None else state[places]
            frontier = likeliest
        tokens, parents = guesses.best(num_tokens)
        return tuple(tokens), parents

    def _block(
        self, aux: torch.Tensor, next_ids: torch.Tensor, count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(states [D, H], logits [D, V]) of the first guesses, at most `count`, after the newest token."""
        first, self.length = self.length, self.length + aux.shape[0]
        positions = torch.arange(first, self.length, device=self.device)
        for layer, made in enumerate(self.draft.context(aux.to(self.dtype), positions)):
            for kind in (0, 1):
                self.cache[layer, kind, :, :, first : self.length] = made[kind]
        context = [(kept[0, :, :, : self.length], kept[1, :, :, : self.length]) for kept in self.cache]
        place = torch.full((1,), self.length, device=self.device)
        attend = tiled(self._layout(place))
        hidden = self.draft.places(next_ids[-1:], place, context, attend)[0, :count]
        return hidden, self.draft.base_logits(hidden)

    def _layout(self, place: torch.Tensor) -> Layout:
        rows = torch.arange(self.length, device=self.device)
        tiles = (Tile(slice(0, 1), slice(0, self.length)),)
        same = torch.zeros_like(rows), place, torch.zeros_like(place)
        return Layout(self.config.block_size, self.config.causal, rows, *same, tiles)

    def _logits(
        self, hidden: torch.Tensor, base: torch.Tensor, previous: torch.Tensor, state: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits [n, V] of one depth after each of `previous` int64 [n], from `hidden` [1, H] and `base`
        [V]."""
        count, draft = previous.shape[0], self.draft
        places = Places(hidden.expand(count, 1, -1), previous[:, None], draft.embed, state)
        latents, state = draft.head.latents(places)
        latents = None if latents is None else latents[:, 0]
        return draft.head.logits(base.expand(count, -1), latents), state
