"""The run file's `evaluation` section: how the draft is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from paceline.section import Count, Device, Dtype, Section


class EvaluationSection(Section):
    """`draft_tokens` guesses a cycle as a tree; `branching: 1` = a chain. The chain is measured as well."""

    changeable: ClassVar[tuple[str, ...]] = ("*",)
    prompts: Path
    max_prompts: Count = 48
    max_new_tokens: Count = 96
    draft_tokens: Annotated[int, Field(ge=1, le=16)] = 7
    branching: Annotated[int, Field(ge=1, le=16)] = 4
    depth: Annotated[int, Field(ge=1, le=16)] = 3
    dtype: Dtype = "auto"
    device: Device = "auto"
