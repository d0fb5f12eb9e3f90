"""The contract of an export: a checkpoint's draft as the folder that a server loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


class Export(Protocol):
    """Adapters: none yet; `paceline.exports.table` names them."""

    def write(
        self, folder: Path, tensors: Mapping[str, torch.Tensor], description: Mapping[str, Any]
    ) -> None:
        """Write the draft into `folder`, which is empty; nothing is written if it cannot be loaded there.

        `tensors` are the draft's state dict, `description` the checkpoint's manifest: the method's name,
        the draft's sizes, the target's versions. Raises ConfigError, with the names, for a missing or
        surplus tensor.
        """
