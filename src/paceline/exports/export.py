"""The contract of an export: it writes a checkpoint's draft as a folder that an inference server loads."""

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
        """Write the draft into the empty `folder`; write nothing if the server could not load it.

        `tensors` are the draft's state dict, `description` the checkpoint's manifest: the method's name,
        the draft's sizes, the target's versions. Raises ConfigError, with the names, for missing or surplus
        tensors.
        """
