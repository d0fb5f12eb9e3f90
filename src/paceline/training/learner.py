"""What the trainer trains: weights that can be built, stepped, tried, written down and read back.

The trainer keeps the books (plans, acks, checkpoints) and knows nothing of tensors; a learner keeps the
weights and knows nothing of the ledger. Adapters: torch_learner.py; testing has one without torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from paceline.durable_files import FileContent

Sample = Mapping[str, Any]  # tensors by name, as the feature store returned them


class Learner(Protocol):
    @property
    def ready(self) -> bool:
        """Whether there are weights, built or loaded."""

    def num_tokens(self, samples: Sequence[Sample]) -> int:
        """How many tokens of the samples a step counts; summed over all ranks it divides the gradients."""

    def check_greedy(self, samples: Sequence[Sample]) -> None:
        """Raise CaptureMismatchError unless these samples, answered greedily, are the target's own."""

    def build(self, samples: Sequence[Sample]) -> None:
        """Fresh weights from the run's first samples; a pure function of them and the settings.

        Raises TrainingError if they are not finite numbers; there are no weights then. ConfigError: the
        settings do not fit the target.
        """

    def step(self, step: int, samples: Sequence[Sample], num_tokens: int | None = None) -> dict[str, Any]:
        """One optimizer step; figures for the event log. If it raises, the weights are unchanged.

        `num_tokens` divides the gradients: the count of all ranks' samples (None: of these). Several ranks
        exchange their gradients in here, before any of them changes a weight: it raises on all or on none.
        Raises TrainingError for a loss or gradient that is not a finite number.
        """

    def attempt(self, samples: Sequence[Sample]) -> None:
        """Everything of a step but the update: raises what `step` would, and leaves no trace."""

    def probe(self, like: Sample) -> None:
        """Raise if weights, target or machine cannot train any sample, and name which.

        Does what `attempt` does, if there are weights, on a sample of this one's shapes that no sample can
        spoil. A TrainingError, MemoryError or RuntimeError from here is no sample's fault.
        """

    def files(self) -> Mapping[str, FileContent]:
        """All state as files of a checkpoint, by name. Their memory belongs to the learner: the bytes
        stay as they are until the next call."""

    def load(self, files: Mapping[str, FileContent]) -> None:
        """The state that `files` returned."""

    def describe(self) -> dict[str, Any]:
        """Small JSON values for the checkpoint's manifest."""
