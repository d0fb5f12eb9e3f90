"""What a draft method is to the rest of the system: features in, a loss that sums exactly out.

A method declares its features, which capture keeps, and the trainer asks it for a batch and a draft;
neither knows which method it talks to. A new method (P-EAGLE, DFlash, Domino, DSpark) is one folder
beside `eagle3` that satisfies `DraftMethod`. A draft is called with a batch and gives its loss, so
that DDP, FSDP2 and torch.compile can wrap it: nothing else calls its submodules to train.

Invariant: losses and metrics are sums over tokens, never means. Micro-batches of any shape then
add up to exactly the full batch: run `backward` on every `loss_sum`, divide the gradients by the
summed `num_tokens` once, and step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from paceline.target.facts import TargetFacts
from paceline.target.head import TargetHead
from paceline.types import Feature


class LossSums(NamedTuple):
    """`loss_sum` carries the graph; `metrics` are detached sums, added up key by key, on its device.

    `num_tokens` is the divisor of both and may be 0, where `loss_sum` is 0 as well. A tuple, since what
    wraps a module looks for tensors in tuples and mappings of its output.
    """

    loss_sum: torch.Tensor  # float32 []
    num_tokens: int
    metrics: Mapping[str, torch.Tensor] = MappingProxyType({})  # scalars


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

    def build(self, head: TargetHead, samples: Sequence[Mapping[str, torch.Tensor]], seed: int) -> nn.Module:
        """A fresh draft on the CPU from a run's first samples; the same arguments give the same bits.

        Called with a batch of `collate` the draft returns its `LossSums`; padding, if any, and tokens
        that are not to be learned never count. `state_dict()` is what a checkpoint holds; `parameters()`
        are trainable, all of them. Frozen target tensors are buffers outside the state dict. Raises
        ConfigError if the settings do not fit the target.
        """

    def restore(self, head: TargetHead, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
        """The draft whose `state_dict()` is `tensors`, on the CPU."""

    def learning_rate_scales(self) -> Mapping[str, float]:
        """Factors on the learning rate by parameter name; 1 for every name not in it."""

    def describe(self, draft: nn.Module) -> dict[str, Any]:
        """The draft's sizes as JSON values, for the checkpoint's manifest."""

    def num_tokens(self, samples: Sequence[Mapping[str, torch.Tensor]]) -> int:
        """How many tokens the loss counts in these samples, without computing it."""

    def collate(self, samples: Sequence[Mapping[str, torch.Tensor]], device: torch.device) -> Any:
        """A batch on `device` from samples that carry the tensors of `features`.

        Indices that depend on lengths or masks are made here, on the CPU: the loss never waits for them.
        """

    def drafter(self, draft: nn.Module, dtype: torch.dtype) -> Any:
        """The draft as lossless decoding uses it; what it must offer is evaluation's `Drafter`."""

    def mean_metrics(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Readable figures (losses, accuracies, estimated acceptance length) from summed metrics."""
