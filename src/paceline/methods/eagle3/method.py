"""EAGLE-3 as a `DraftMethod`: settings, initialisation and the estimated acceptance length.

A draft starts from its target instead of noise: lm_head and the final norm are the target's own, and
`warm_start` sets fc and attention by regression on the run's first samples. All of them are trained.
The same head, settings, seed and samples give the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from paceline.errors import ConfigError
from paceline.methods.eagle3.batch import JUDGED_SHARE, Eagle3Batch, Unrolling, collate
from paceline.methods.eagle3.decode import Eagle3Decoder
from paceline.methods.eagle3.model import Eagle3Config, Eagle3Draft, Midlayer
from paceline.methods.eagle3.settings import GROUP_LOGITS, Eagle3Section, aux_layer_ids
from paceline.methods.eagle3.start import start_tensors
from paceline.methods.eagle3.start_config import read_start_config
from paceline.methods.eagle3.vocab import answer_token_weights, choose_draft_vocab, vocab_maps
from paceline.methods.eagle3.warm_start import warm_start
from paceline.methods.layers import initialise_random
from paceline.methods.packed import mean_metrics
from paceline.methods.sizes import sizes_of_target
from paceline.methods.start.tensors import refuse_other_target, refuse_unfit, sizes_for
from paceline.methods.targets import counted_rows
from paceline.methods.visits import noisy
from paceline.target.facts import TargetFacts
from paceline.target.head import TargetHead
from paceline.types import Feature

_CHAIN = 3  # guesses beyond these are hardly ever kept, and each costs a pass of the draft
# Regressed fc weights read states of root mean square 20 and more, and are small for that reason: Adam's
# equal steps would be too large for them. lm_head starts as the target's own.
_REGRESSION_RATES = {"fc.weight": 0.02, "lm_head.weight": 0.1}


class Eagle3Method:
    """The EAGLE-3 method. `DraftMethod` documents each member."""

    name = "eagle3"

    def __init__(self, settings: Eagle3Section | Mapping[str, Any] | None = None) -> None:
        given = settings or {}
        self.settings = given if isinstance(given, Eagle3Section) else Eagle3Section.parse(given)
        start = self.settings.start_from
        self._start = None if start is None else read_start_config(start, self.settings.name)
        if self._start is not None:
            self._start.refuse_other_settings(self.settings)

    def features(self, target: TargetFacts) -> tuple[Feature, ...]:
        return self.settings.features(target)

    def check_target(self, head: TargetHead) -> None:
        config = self._config(head)
        with torch.device("meta"):
            middle = Midlayer(config)
        if self._start is not None:
            refuse_other_target(self._start.start, head)
            return
        choose_draft_vocab(torch.zeros(head.vocab_size), config.draft_vocab_size, head.eos_token_ids)
        if self.settings.init == "target":
            _refuse_other_shapes(middle, head.layer_tensors(head.num_hidden_layers - 1), head.hidden_size)

    def build(
        self, head: TargetHead, samples: Sequence[Mapping[str, torch.Tensor]], seed: int
    ) -> Eagle3Draft:
        draft = self._empty(head)
        if self._start is not None:
            tensors = start_tensors(self._start, head)
            refuse_unfit(self._start.start, tensors, draft.state_dict())
            return self.restore(head, tensors)
        weights = answer_token_weights(head, samples)
        target_ids = choose_draft_vocab(weights, draft.config.draft_vocab_size, head.eos_token_ids)
        draft.d2t, draft.t2d = vocab_maps(target_ids, head.vocab_size)
        draft.attach_target(head)
        if self.settings.init == "regression":
            warm_start(draft, head, samples, seed)
            return draft
        initialise_random(draft, seed)
        if not self.settings.train_lm_head:
            draft.lm_head.weight.copy_(draft.target_output.rows)
        if self.settings.init == "target":
            _initialise_head(draft, head)
            _initialise_layer(draft, head)
        return draft

    def restore(self, head: TargetHead, tensors: Mapping[str, torch.Tensor]) -> Eagle3Draft:
        draft = self._empty(head)
        draft.load_state_dict(dict(tensors))
        draft.attach_target(head)
        return draft

    def _empty(self, head: TargetHead) -> Eagle3Draft:
        chosen = self.settings
        return Eagle3Draft(self._config(head), chosen.recompute, chosen.loss, chosen.train_lm_head)

    def _config(self, head: TargetHead) -> Eagle3Config:
        layers = self.settings.layers_of(head.num_hidden_layers)
        if self._start is not None:
            sizes = sizes_for(self._start.start, self._start.sizes, head)
            return Eagle3Config(**sizes, aux_layer_ids=layers)
        chosen = self.settings
        size = min(chosen.draft_vocab_size, head.vocab_size)  # at most the whole vocabulary
        return replace(
            draft_config(head, size, layers),
            norm_before_fc=chosen.norm_before_fc,
            fc_norm=chosen.fc_norm,
            norm_output=chosen.norm_output,
            sliding_window=chosen.sliding_window,
        )

    def learning_rate_scales(self) -> Mapping[str, float]:
        chosen = self.settings
        if chosen.init != "regression" or self._start is not None:
            return {}
        is_normed = chosen.norm_before_fc or chosen.fc_norm
        rates = {**_REGRESSION_RATES, **({"fc.weight": 1.0} if is_normed else {})}
        return {
            name: rate for name, rate in rates.items() if chosen.train_lm_head or name != "lm_head.weight"
        }

    def adamw_for(self) -> Sequence[str]:
        return ("lm_head", "mask_hidden")

    def describe(self, draft: nn.Module) -> dict[str, Any]:
        assert isinstance(draft, Eagle3Draft)  # narrows the protocol's type
        return asdict(draft.config)

    def num_tokens(self, samples: Sequence[Mapping[str, torch.Tensor]]) -> int:
        return sum(int(counted_rows(sample["loss_mask"])[1:].sum()) for sample in samples)

    def collate(
        self,
        samples: Sequence[Mapping[str, torch.Tensor]],
        device: torch.device,
        visit: int | None = None,
    ) -> Eagle3Batch:
        chosen = self.settings
        size, window = chosen.draft_vocab_size, chosen.sliding_window
        if self._start is not None:
            size, window = self._start.sizes["draft_vocab_size"], self._start.sizes["sliding_window"]
        group = max(1, GROUP_LOGITS // (chosen.ttt_steps * size))
        share = JUDGED_SHARE if torch.is_grad_enabled() else 1
        unrolling = Unrolling(chosen.ttt_steps, chosen.step_decay, group, share, window)
        return collate(noisy(samples, chosen.feature_noise, visit), unrolling).to(device)

    def drafter(self, draft: nn.Module, dtype: torch.dtype) -> Eagle3Decoder:
        assert isinstance(draft, Eagle3Draft)
        return Eagle3Decoder(draft, dtype)

    def chain_length(self, wanted: int) -> int:
        return min(_CHAIN, wanted)

    def mean_metrics(self, metrics: Mapping[str, float]) -> dict[str, float]:
        return mean_metrics(metrics, self.settings.ttt_steps)


def draft_config(
    head: TargetHead, draft_vocab_size: int, layers: tuple[int, ...] | None = None
) -> Eagle3Config:
    """Sizes of the draft of `head`'s target: the target's own, one layer deep. `layers`: the states that it
    reads, or None for the default ones."""
    return Eagle3Config(
        **sizes_of_target(head),
        draft_vocab_size=draft_vocab_size,
        aux_layer_ids=layers or aux_layer_ids(head.num_hidden_layers),
    )


def _initialise_head(draft: Eagle3Draft, head: TargetHead) -> None:
    """Start with the last auxiliary state as the feature, and the target's own norm and lm_head."""
    hidden = head.hidden_size
    with torch.no_grad():
        draft.fc.weight.zero_()
        draft.fc.weight[:, -hidden:] = torch.eye(hidden)
        draft.norm.weight.copy_(head.norm_weight)
        draft.lm_head.weight.copy_(draft.target_output.rows)


def _initialise_layer(draft: Eagle3Draft, head: TargetHead) -> None:
    """Copy the target's last layer. The embedding half of q/k/v keeps its small random weights."""
    hidden = head.hidden_size
    layer, middle = head.layer_tensors(head.num_hidden_layers - 1), draft.midlayer
    _refuse_other_shapes(middle, layer, hidden)
    with torch.no_grad():
        for name, tensor in layer.items():
            mine = _counterpart(middle, name)
            (mine[:, hidden:] if name.startswith(_READ_BY_BOTH_HALVES) else mine).copy_(tensor)


def _counterpart(middle: nn.Module, name: str) -> nn.Parameter:
    """The draft's parameter that begins as the target's `name`."""
    return middle.get_parameter(name.replace("input_layernorm", "hidden_norm"))


def _refuse_other_shapes(middle: nn.Module, layer: Mapping[str, torch.Tensor], hidden: int) -> None:
    for name, tensor in layer.items():
        mine = _counterpart(middle, name).shape
        shape = (mine[0], mine[1] - hidden) if name.startswith(_READ_BY_BOTH_HALVES) else tuple(mine)
        if tuple(tensor.shape) != shape:
            raise ConfigError(
                f"The target's last layer has {name} of shape {tuple(tensor.shape)}, not {shape}.",
                why='init = "target" copies that layer into the draft.',
                next='set method.init to "regression" or "random"',
            )


_READ_BY_BOTH_HALVES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
