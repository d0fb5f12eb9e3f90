"""The Learner protocol: weights that the trainer can build, train, try, save and load.

The trainer records plans, acks and checkpoints and does not know tensors; a learner owns the weights and
does not know the ledger. Adapters: torch_learner.py, and one without torch in testing/light_adapters.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from paceline.durable_files import FileContent

DRAFT = "draft.safetensors"  # the draft's file in a checkpoint
Sample = Mapping[str, Any]  # tensors by name


class Learner(Protocol):
    @property
    def ready(self) -> bool:
        """Whether there are weights, built or loaded."""

    @property
    def is_sharded(self) -> bool:
        """Whether each of several ranks holds a part of the weights and of the optimizer, and no more."""

    def gathered(self) -> AbstractContextManager[None]:
        """Within, `attempt` and `probe` may be called. All ranks enter together, if it is sharded; there
        the ranks collect the weights, which they drop at the end. Raises RanksError."""

    def opened(self, stored: Sample) -> Sample:
        """A sample as the other calls take it, from what the store returned. It may be called by a thread
        that reads ahead. Raises FeatureCorruptError."""

    def num_tokens(self, samples: Sequence[Sample]) -> int:
        """How many tokens of the samples a step counts; the sum over all ranks divides the gradients."""

    def check_greedy(self, samples: Sequence[Sample]) -> None:
        """Raise CaptureMismatchError unless these greedy answers are the target's own."""

    def build(self, samples: Sequence[Sample]) -> None:
        """Build the first weights from the run's first samples: a pure function of them and the settings.

        Raises TrainingError, and leaves no weights, if they are not finite; ConfigError if the settings do
        not fit the target.
        """

    def step(
        self,
        step: int,
        samples: Sequence[Sample],
        num_tokens: int | None = None,
        progress: float | None = None,
    ) -> dict[str, Any]:
        """One optimizer step; returns figures for the event log. If it raises, the weights are unchanged.

        `num_tokens` divides the gradients: the tokens of all ranks' samples (None: of these). `progress`: the
        share of the run that is done after the step, if its number of steps is not known. Several
        ranks exchange gradients in here before any of them changes a weight, so it raises on all or on
        none. Raises TrainingError if loss or gradient is not finite.
        """

    def attempt(self, samples: Sequence[Sample], step: int = 0) -> None:
        """Do step `step` without the update: raises what `step` would, and leaves the state unchanged."""

    def probe(self, like: Sample) -> None:
        """Raise if weights, target or machine cannot train any sample, and say which.

        If there are weights, it attempts a harmless sample of the shapes of `like`. A TrainingError,
        MemoryError or RuntimeError from here is not a sample's fault.
        """

    def fingerprint(self) -> str:
        """A digest of the weights, which all ranks have in common; not called if it is sharded."""

    def files(self) -> Mapping[str, FileContent]:
        """The whole state as files of a checkpoint, by name; on a rank other than 0, what only that rank has.

        If it is sharded, each rank's are parts (parts.py), and those of the first weights, which rank 0
        builds, whole. The learner owns their memory; the bytes are valid until the next call."""

    def load(self, files: Mapping[str, FileContent]) -> None:
        """Restore the state that the `files` of all ranks returned; there may have been more or fewer, and
        sharded or not. If it is sharded, keep this rank's part."""

    def describe(self) -> dict[str, Any]:
        """Small JSON values for the checkpoint's manifest."""
