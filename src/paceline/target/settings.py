"""The run file's `target` section: which model is imitated."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from paceline.section import Dtype, Section


class TargetSection(Section):
    """`model`: a local Hugging Face folder; where it lies may change, what is in it may not."""

    changeable: ClassVar[tuple[str, ...]] = ("model",)
    model: Path
    dtype: Dtype = "auto"
