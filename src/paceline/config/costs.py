"""The run file's `costs` section: how fast its roles are, for `paceline plan` alone. No torch."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from paceline.section import Section

Rate = Annotated[float, Field(gt=0.0)] | None


class CostsSection(Section):
    """What was measured of this run file; `paceline bench` measures it on a machine.

    `capture_tokens_per_s`: tokens that one producer's target writes (or, of given answers, reads) a second.
    `train_tokens_per_s`: tokens to predict that are trained a second, each visit counted. `store_mib_per_s`:
    into the feature store. `measured`: where and when, in words.
    """

    changeable: ClassVar[tuple[str, ...]] = ("*",)
    capture_tokens_per_s: Rate = None
    train_tokens_per_s: Rate = None
    store_mib_per_s: Rate = None
    measured: str = ""
