"""The contract of a draft method: it names the features to capture, and its draft turns them into a loss.

A method declares its features, which the producer captures, and builds batches and a draft for the trainer;
neither knows which method it uses. A new method is one folder beside
`eagle3` that satisfies `DraftMethod`. A call of the draft with a batch gives its loss, and training uses its
submodules in no other way, so DDP, FSDP2 and torch.compile can wrap it.

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
    """`loss_sum` carries the graph; `metrics` are detached sums on its device, to be added key by key.

    `num_tokens` is the divisor of both; if it is 0, `loss_sum` is 0 too. This is a tuple because wrappers of
    modules search a module's output for tensors in tuples and mappings.
    """

    loss_sum: torch.Tensor  # float32 []
    num_tokens: int
    metrics: Mapping[str, torch.Tensor] = MappingProxyType({})  # scalars


class DraftMethod(Protocol):
    """Built from its section of the run file. Adapters: eagle3/method.py, dflash/method.py."""

    @property
    def name(self) -> str:
        """The method's name in run files and checkpoints, e.g. "eagle3"."""

    def features(self, target: TargetFacts) -> tuple[Feature, ...]:
        """The tensors of one sample: those that capture keeps and `collate` reads.

        Tokens and targets must be among them. Raises ConfigError for a target that the method cannot be
        trained on.
        """

    def check_target(self, head: TargetHead) -> None:
        """Raise ConfigError if no draft of this target can be built with these settings."""

    def build(self, head: TargetHead, samples: Sequence[Mapping[str, torch.Tensor]], seed: int) -> nn.Module:
        """A new draft on the CPU from a run's first samples; the same arguments give the same bits.

        Called with a batch from `collate`, the draft returns its `LossSums`, in which padding and tokens that
        are not to be learned do not count. A checkpoint holds `state_dict()`; all `parameters()` are
        trainable; frozen target tensors are buffers outside the state dict. Raises ConfigError if the
        settings do not fit the target.
        """

    def restore(self, head: TargetHead, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
        """The draft whose `state_dict()` is `tensors`, on the CPU."""

    def learning_rate_scales(self) -> Mapping[str, float]:
        """Factors on the learning rate by parameter name; 1 for every other parameter."""

    def adamw_for(self) -> Sequence[str]:
        """Muon leaves the matrices whose names contain one of these to AdamW, as it does vectors: embeddings,
        heads and other tables of rows. The run file may name more (`training.optimizer`)."""

    def describe(self, draft: nn.Module) -> dict[str, Any]:
        """The draft's sizes as JSON values, for the checkpoint's manifest."""

    def num_tokens(self, samples: Sequence[Mapping[str, torch.Tensor]]) -> int:
        """The `num_tokens` that the loss of these samples would count."""

    def collate(
        self,
        samples: Sequence[Mapping[str, torch.Tensor]],
        device: torch.device,
        visit: int | None = None,
    ) -> Any:
        """A batch on `device` from samples that carry the tensors of `features`.

        `visit`: in training a number that no other step has; with a sample's tokens it decides all random
        choices (visits.py). None: outside training, where nothing is changed at random.
        Build indices that depend on lengths or masks here, on the CPU, so that the loss never waits for them.
        Metrics may be of a part of the tokens while gradients are enabled; without gradients, of all of them.
        """

    def drafter(self, draft: nn.Module, dtype: torch.dtype) -> Any:
        """The draft as a `Drafter` (drafter.py) for lossless decoding, with weights in `dtype`."""

    def chain_length(self, wanted: int) -> int:
        """How many guesses, at most 16, a cycle without branches drafts where `wanted` guesses are asked
        for."""

    def mean_metrics(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Readable figures (losses, accuracies, estimated acceptance length) from summed metrics."""
