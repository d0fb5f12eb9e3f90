"""The text decoder of a loaded target, and the past of a text that it goes on from.

Producer and evaluation compute targets of all families by it, which is the library's own forward.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import Cache

from paceline.errors import is_want_of_memory
from paceline.target.folder import read_config, refuse_quantised
from paceline.target.layout import bent, decoder_parts, head_layout
from paceline.target.model import load_whole, text_config

PASTS = ("past_key_values", "cache_params", "state")  # the names of a decoder's cache, by family
TRIAL_TOKENS, TRIAL_READ = 12, 6
TRIAL_ERROR = {torch.float32: 1e-3}  # of a state's norm; in types of less precision 0.1


class Past:
    """The tokens [B, n] that a decoder has read, and its cache of them in the form of its family.

    A past without a cache makes the decoder read all its tokens again.
    """

    def __init__(self, *, has_cache: bool) -> None:
        self.has_cache = has_cache
        self.token_ids: torch.Tensor | None = None
        self.cache: dict[str, Any] = {}

    @property
    def can_branch(self) -> bool:
        """Whether `branch` can make more than one row."""
        return all(isinstance(part, Cache) for part in self.cache.values())

    @property
    def can_cut(self) -> bool:
        """Whether `keep` can drop tokens. A recurrent state cannot; some families lose theirs, too, where
        several tokens follow at once."""
        return all(isinstance(part, Cache) and part.is_croppable for part in self.cache.values())

    def branch(self, count: int) -> Past:
        """A copy in which this past's only row is repeated `count` times."""
        assert self.token_ids is not None
        branches = copy.deepcopy(self)
        if self.can_branch:
            branches.token_ids = self.token_ids.expand(count, -1)
            first = torch.zeros(count, dtype=torch.int64, device=self.token_ids.device)
            for part in branches.cache.values():
                part.reorder_cache(first)
                part.activate_past_recording()  # so that `keep` can cut it
        return branches

    def keep(self, row: int, cut: int) -> None:
        """Keep one row alone, without its last `cut` tokens."""
        assert self.token_ids is not None
        for part in self.cache.values():
            part.reorder_cache(torch.tensor([row], device=self.token_ids.device))
            part.crop(-cut)
        self.token_ids = self.token_ids[row : row + 1, : self.token_ids.shape[1] - cut]


class TextDecoder:
    """`model`: the library's whole model; `config`: the text decoder's part of its; `parts`: the modules."""

    def __init__(
        self, folder: Path, dtype: torch.dtype, device: torch.device, attention: str | None = None
    ) -> None:
        """Raises ConfigError or EngineError if it cannot be loaded. `attention`: see `load_whole`."""
        config = read_config(folder)
        refuse_quantised(folder, config)
        self._layout = head_layout(folder, config)  # a cheap check before the weights load
        self.model = load_whole(folder, dtype, device, attention)
        self.config, self.parts = text_config(self.model.config), decoder_parts(self.model)
        self.device = device
        self._cache_is_right: bool | None = None

    def past(self) -> Past:
        """An empty past. It has no cache if the family's own cache would give other states."""
        if self._cache_is_right is None:
            self._cache_is_right = self._try_cache()
        return Past(has_cache=self._cache_is_right)

    @torch.inference_mode()
    def read(self, token_ids: torch.Tensor, past: Past) -> torch.Tensor:
        """The final hidden states [B, n, H] of `token_ids` int64 [B, n], which follow `past`; extends it."""
        known = token_ids if past.token_ids is None else torch.cat([past.token_ids, token_ids], dim=1)
        if past.has_cache:
            output = self.parts.decoder(input_ids=token_ids, use_cache=True, **past.cache)
            past.cache = {name: output[name] for name in PASTS if output.get(name) is not None}
        else:
            output = self.parts.decoder(input_ids=known, use_cache=False)
        past.token_ids = known
        hidden: torch.Tensor = output.last_hidden_state[:, -token_ids.shape[1] :]
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The model's own logits [..., V] of final hidden states [..., H]."""
        logits: torch.Tensor = self.parts.lm_head(hidden)
        layout = self._layout
        return logits if layout.logit_scale == 1.0 and not layout.soft_cap else bent(logits.float(), layout)

    def _try_cache(self) -> bool:
        """Whether reading on from the family's cache, if it has one, gives the states of one reading."""
        tokens = torch.arange(TRIAL_TOKENS, device=self.device)[None] * 7 % int(self.config.vocab_size)
        whole = self.read(tokens, Past(has_cache=False)).float()
        past = Past(has_cache=True)
        try:
            parts = [self.read(tokens[:, :TRIAL_READ], past)]
            if not past.cache:
                return False
            size = TRIAL_TOKENS if past.can_cut else 1
            parts += [self.read(part, past) for part in tokens[:, TRIAL_READ:].split(size, dim=1)]
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            if is_want_of_memory(error):
                raise
            return False
        errors = (torch.cat(parts, dim=1).float() - whole).norm(dim=-1) / whole.norm(dim=-1)
        return bool(errors[:, TRIAL_READ:].median() < TRIAL_ERROR.get(self.model.dtype, 0.1))
