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

    def build(self, samples: Sequence[Sample]) -> None:
        """Fresh weights from the run's first samples; a pure function of them and the settings.

        Raises TrainingError if they are no finite numbers; there are no weights then.
        """

    def step(self, step: int, samples: Sequence[Sample]) -> dict[str, Any]:
        """One optimizer step; figures for the event log. If it raises, the weights are unchanged.

        Raises TrainingError for a loss or gradient that is no finite number.
        """

    def attempt(self, samples: Sequence[Sample]) -> None:
        """Everything of a step but the update: raises what `step` would, and leaves no trace."""

    def files(self) -> Mapping[str, FileContent]:
        """All state as files of a checkpoint, by name. Their memory belongs to the learner: the bytes
        stay as they are until the next call."""

    def load(self, files: Mapping[str, FileContent]) -> None:
        """The state that `files` returned."""

    def describe(self) -> dict[str, Any]:
        """Small JSON values for the checkpoint's manifest."""
