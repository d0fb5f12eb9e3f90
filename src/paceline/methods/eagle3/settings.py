"""EAGLE-3's section of the run file. No torch."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from paceline.methods.settings import MethodSection
from paceline.section import Count


class Eagle3Section(MethodSection):
    """`first_samples` choose the draft vocabulary and, by regression, the first weights.

    `init`: "regression" (closed form, from the run's first samples), "target" (weights of the target's
    last layer) or "random".

    `recompute`: backward computes every unrolled step's layer again, to the same bits. Between forward
    and backward an anchor (a token that can be drafted from) keeps, for each step, in elements of the
    compute dtype, 2I + 8H + 2(N + N_kv)d (hidden size H, intermediate size I, N query and N_kv key-value
    heads of size d) without it, and 3H + 2 N_kv d with it; neither grows with a sample's length. The
    gradient of lm_head is kept once, in float32. With SmolLM2-135M's sizes and two anchors in three
    tokens a step more keeps 12.2 KiB a token, or 2.6, and recomputing makes the whole training step
    about 15 % slower (benchmarks/training_step.py).
    """

    component: ClassVar[str] = "paceline.methods.eagle3.method:Eagle3Method"
    changeable: ClassVar[tuple[str, ...]] = ("recompute",)
    name: Literal["eagle3"] = "eagle3"
    draft_vocab_size: Count = 8192
    ttt_steps: Annotated[int, Field(ge=1, le=16)] = 4
    step_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 0.8
    init: Literal["regression", "target", "random"] = "regression"
    recompute: bool = False
