"""The run file's `target` section: the model that the draft learns to predict."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import AfterValidator, JsonValue

from paceline.section import Dtype, Section


def _revision(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][\w./-]{0,199}", name) or ".." in name:
        raise ValueError("a revision is a branch, a tag or a commit")
    return name


class TargetSection(Section):
    """`model`: a local Hugging Face folder, or organisation/name of a model of the hub, at `revision` (a
    branch, a tag or a commit; by default the main branch). The content may not change between starts.

    `template`: values for variables of its chat template, such as `{enable_thinking: false}`.
    """

    changeable: ClassVar[tuple[str, ...]] = ("model", "revision")
    model: Path
    revision: Annotated[str, AfterValidator(_revision)] | None = None
    dtype: Dtype = "auto"
    template: dict[str, JsonValue] = {}
