"""How a draft is measured: the run file's `evaluation` section, and what `paceline evaluate` is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from paceline.section import Count, Device, Dtype, Section

Temperature = Annotated[float, Field(ge=0.0, le=2.0)]


class EvaluationSection(Section):
    """`draft_tokens` guesses a cycle as a tree; `branching: 1` = a chain. The chain is measured as well.

    `unsupported`: what happens with a target that the evaluation cannot decode. "skip" trains without
    measuring, and says so before and after; "refuse" stops before training.

    `every_steps`: measure also while training goes on, at the first checkpoint of every so many steps, in a
    process of the lowest priority; 0: only at the end.
    """

    changeable: ClassVar[tuple[str, ...]] = ("*",)
    prompts: Path
    max_prompts: Count = 48
    max_new_tokens: Count = 96
    draft_tokens: Annotated[int, Field(ge=1, le=16)] = 7
    branching: Annotated[int, Field(ge=1, le=16)] = 4
    depth: Annotated[int, Field(ge=1, le=16)] = 3
    unsupported: Literal["skip", "refuse"] = "skip"
    every_steps: Annotated[int, Field(ge=0)] = 0
    dtype: Dtype = "auto"
    device: Device = "auto"


class MarkRequest(Section):
    """Of which training samples to mark the draft's tokens. `ordinals`: of their prompts. `step`: of a kept
    checkpoint; None: the newest."""

    ordinals: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    step: Count | None = None


class EvaluationRequest(Section):
    """What `paceline evaluate` is asked for beside the run file.

    `suites`: names or files (suites.py). `step`: of a kept checkpoint; None: the newest. `report`: the JSON
    file to write; its picture lies beside it.
    """

    suites: Annotated[tuple[str, ...], Field(min_length=1)] = ("heldout",)
    temperatures: Annotated[tuple[Temperature, ...], Field(min_length=1)] = (0.0,)
    max_prompts: Count | None = None
    step: Count | None = None
    report: Path
