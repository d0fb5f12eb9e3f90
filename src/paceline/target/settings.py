"""The run file's `target` section: the model that the draft learns to predict."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from paceline.section import Dtype, Section


class TargetSection(Section):
    """`model`: a local Hugging Face folder. Its path may change between starts, its content may not.

    `template`: values for variables of its chat template, such as `{enable_thinking: false}`.
    """

    changeable: ClassVar[tuple[str, ...]] = ("model",)
    model: Path
    dtype: Dtype = "auto"
    template: dict[str, Any] = {}
