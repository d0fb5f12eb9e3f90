"""What a draft method is to the rest of the system: features in, a loss that sums exactly out.

A method declares its features, which capture keeps, and the trainer asks it for a batch and a loss;
neither knows which method it talks to. A new method (P-EAGLE, DFlash, Domino, DSpark) is one
folder beside `eagle3` that satisfies `DraftMethod`.

Invariant: losses and metrics are sums over tokens, never means. Micro-batches of any shape then
add up to exactly the full batch: run `backward` on every `loss_sum`, divide the gradients by the
summed `num_tokens` once, and step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from paceline.target.facts import TargetFacts
from paceline.target.head import TargetHead
from paceline.types import Feature


@dataclass(frozen=True)
class LossSums:
    """`loss_sum` carries the graph; `metrics` are detached sums, added up key by key, on its device.

    `num_tokens` is the divisor of both and may be 0, where `loss_sum` is 0 as well.
    """

    loss_sum: torch.Tensor  # float32 []
    num_tokens: int
    metrics: Mapping[str, torch.Tensor] = field(default_factory=dict)  # scalars


class DraftMethod(Protocol):
    """Built from its settings, a mapping out of the run file. Adapters: eagle3/method.py."""

    @property
    def name(self) -> str:
        """The method's name in run files and checkpoints, e.g. "eagle3"."""

    def features(self, target: TargetFacts) -> tuple[Feature, ...]:
        """The tensors of one sample: what capture keeps and `collate` reads, nothing else.

        Every method has its samples' tokens and targets among them. Raises ConfigError for a target
        that the method cannot be trained on.
        """

    def check_target(self, head: TargetHead) -> None:
        """Raise ConfigError if no draft of this target can be built with these settings."""

    def build_draft(
        self, head: TargetHead, seed: int, token_weights: torch.Tensor | None = None
    ) -> nn.Module:
        """A fresh draft on the CPU; the same settings and arguments give the same bits.

        `state_dict()` of the draft is what a checkpoint holds; `parameters()` are trainable, all of
        them. Frozen target tensors are buffers outside the state dict. `token_weights` [V] is the
        evidence for the draft vocabulary. Raises ConfigError if the settings do not fit the target.
        """

    def warm_start(
        self, draft: nn.Module, head: TargetHead, samples: Sequence[Mapping[str, torch.Tensor]], seed: int
    ) -> None:
        """Better first weights for a fresh draft from a run's first samples; may do nothing.

        Called once, after `build_draft` and before the first step; a pure function of its arguments.
        """

    def attach_target(self, draft: nn.Module, head: TargetHead) -> None:
        """Give a draft whose state dict was just loaded its frozen target tensors back."""

    def learning_rate_scales(self) -> Mapping[str, float]:
        """Factors on the learning rate by parameter name; 1 for every name not in it."""

    def token_weights(self, head: TargetHead, samples: Sequence[Mapping[str, torch.Tensor]]) -> torch.Tensor:
        """Evidence [V] for `build_draft` from a run's first samples; a pure function of them."""

    def describe(self, draft: nn.Module) -> dict[str, Any]:
        """The draft's sizes as JSON values, for the checkpoint's manifest."""

    def num_tokens(self, samples: Sequence[Mapping[str, torch.Tensor]]) -> int:
        """How many tokens `loss` counts in these samples, without computing it."""

    def collate(self, samples: Sequence[Mapping[str, torch.Tensor]], device: torch.device) -> Any:
        """A batch on `device` from samples that carry the tensors of `features`."""

    def loss(self, draft: nn.Module, batch: Any) -> LossSums:
        """Training loss of a batch this method collated. Masked tokens, and padding if any, never count."""

    def drafter(self, draft: nn.Module, dtype: torch.dtype) -> Any:
        """The draft as lossless decoding uses it; what it must offer is evaluation's `Drafter`."""

    def mean_metrics(self, metrics: Mapping[str, float], num_tokens: int) -> dict[str, float]:
        """Readable figures (losses, accuracies, estimated acceptance length) from summed metrics."""
