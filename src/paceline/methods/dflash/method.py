"""The block methods as a `DraftMethod`: one backbone, and the head that the section names.

A draft starts from a regression on the run's first samples (warm_start.py), from noise with the target's
final norm, or from a folder (start.py). The same head, settings, seed and samples give the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from paceline.errors import ConfigError
from paceline.methods.dflash.batch import Blocks, DFlashBatch, anchors_of, collate
from paceline.methods.dflash.config import DFlashConfig
from paceline.methods.dflash.decode import DFlashDecoder
from paceline.methods.dflash.heads.head import Head
from paceline.methods.dflash.model import DFlashDraft
from paceline.methods.dflash.settings import GROUP_GUESSES, BlockSection
from paceline.methods.dflash.start import start_tensors
from paceline.methods.dflash.start_config import read_block_start
from paceline.methods.dflash.warm_start import warm_start
from paceline.methods.layers import initialise_random
from paceline.methods.packed import mean_metrics
from paceline.methods.sizes import sizes_of_target
from paceline.methods.start.tensors import refuse_other_target, refuse_unfit, sizes_for
from paceline.methods.visits import noisy
from paceline.table import resolve
from paceline.target.facts import TargetFacts
from paceline.target.head import TargetHead
from paceline.types import Feature

_ALL = 1 << 30
# Adam's equal steps would undo what a regression found before the rest of the draft knows anything.
_REGRESSION_RATES = {
    "fc.weight": 0.1,
    **{f"layers.0.self_attn.{name}_proj.weight": 0.1 for name in "qkvo"},
}


class DFlashMethod:
    """DFlash and the methods that add a head to it. `DraftMethod` documents each member."""

    def __init__(self, settings: BlockSection) -> None:
        folder, self.name = settings.start_from, settings.name
        self._start = None if folder is None else read_block_start(folder, settings.name)
        self.settings = settings if self._start is None else self._start.applied(settings)

    def features(self, target: TargetFacts) -> tuple[Feature, ...]:
        return self.settings.features(target)

    def check_target(self, head: TargetHead) -> None:
        with torch.device("meta"):
            self._empty(head)
        if self._start is not None:
            refuse_other_target(self._start.start, head)

    def build(
        self, head: TargetHead, samples: Sequence[Mapping[str, torch.Tensor]], seed: int
    ) -> DFlashDraft:
        draft = self._empty(head)
        if self._start is not None:
            tensors = start_tensors(self._start, head)
            refuse_unfit(self._start.start, tensors, draft.state_dict())
            return self.restore(head, tensors)
        initialise_random(draft, seed)
        with torch.no_grad():
            draft.norm.weight.copy_(head.norm_weight)
            draft.head.initialise()
        draft.attach_target(head)
        if self.settings.init == "regression":
            warm_start(draft, head, samples)
        return draft

    def restore(self, head: TargetHead, tensors: Mapping[str, torch.Tensor]) -> DFlashDraft:
        draft = self._empty(head)
        draft.load_state_dict(dict(tensors))
        draft.attach_target(head)
        return draft

    def _empty(self, head: TargetHead) -> DFlashDraft:
        config, made = self._config(head), resolve(self.settings.head)
        added: Head = made(self.settings, config)
        return DFlashDraft(config, added, self.settings)

    def _config(self, head: TargetHead) -> DFlashConfig:
        chosen = self.settings
        mask = head.vocab_size - 1 if chosen.mask_token_id is None else chosen.mask_token_id
        if mask >= head.vocab_size:
            raise ConfigError(
                f"method.mask_token_id={mask} is no token of a target of {head.vocab_size} tokens.",
                why="The embedding of that token stands for the tokens that a block has to guess.",
                next="leave method.mask_token_id out, or name a token that texts hardly contain.",
            )
        start = self._start
        sizes = sizes_of_target(head) if start is None else sizes_for(start.start, start.sizes, head)
        return DFlashConfig(
            **sizes,
            num_hidden_layers=chosen.layers,
            aux_layer_ids=self.settings.layers_of(head.num_hidden_layers),
            block_size=chosen.block_size,
            mask_token_id=mask,
            causal=chosen.causal,
            sample_from_anchor=chosen.from_anchor,
        )

    def learning_rate_scales(self) -> Mapping[str, float]:
        is_regressed = self.settings.init == "regression" and self._start is None
        return _REGRESSION_RATES if is_regressed else {}

    def adamw_for(self) -> Sequence[str]:
        return ()

    def describe(self, draft: nn.Module) -> dict[str, Any]:
        assert isinstance(draft, DFlashDraft)  # narrows the protocol's type
        config = draft.config
        return {**asdict(config), "draft_vocab_size": config.vocab_size, **draft.head.describe()}

    def num_tokens(self, samples: Sequence[Mapping[str, torch.Tensor]]) -> int:
        return sum(anchors_of(sample, self.settings.anchors_max).numel() for sample in samples)

    def collate(
        self,
        samples: Sequence[Mapping[str, torch.Tensor]],
        device: torch.device,
        visit: int | None = None,
    ) -> DFlashBatch:
        chosen = self.settings
        most = chosen.anchors_max if torch.is_grad_enabled() else _ALL
        shape = chosen.block_size, chosen.depths, chosen.causal
        blocks = Blocks(*shape, most, GROUP_GUESSES, chosen.compiles)
        return collate(noisy(samples, chosen.feature_noise, visit), blocks, visit).to(device)

    def drafter(self, draft: nn.Module, dtype: torch.dtype) -> DFlashDecoder:
        assert isinstance(draft, DFlashDraft)
        return DFlashDecoder(draft, dtype)

    def chain_length(self, wanted: int) -> int:  # noqa: ARG002 (a block is guessed whole)
        return min(self.settings.depths, 16)

    def mean_metrics(self, metrics: Mapping[str, float]) -> dict[str, float]:
        return mean_metrics(metrics, self.settings.depths)
