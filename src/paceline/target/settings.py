"""The run file's `target` section: the model that the draft learns to predict."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from paceline.section import Dtype, Section


class TargetSection(Section):
    """`model`: a local Hugging Face folder. Its path may change between starts, its content may not."""

    changeable: ClassVar[tuple[str, ...]] = ("model",)
    model: Path
    dtype: Dtype = "auto"
