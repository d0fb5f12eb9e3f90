"""EAGLE-3's section of the run file. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from paceline.methods.losses.settings import LossSection
from paceline.methods.settings import MethodSection
from paceline.section import Count


class Eagle3Section(MethodSection):
    """`first_samples`: how many samples choose the draft vocabulary and, by regression, the first weights.

    `loss`: see `LossSection`.

    `init`: "regression" (closed form, from the run's first samples), "target" (weights of the target's
    last layer) or "random".

    `start_from`: a public EAGLE-3 folder of the same target, from which weights, sizes, vocabulary maps and
    fused layers come; `draft_vocab_size` and `init` are not used then. The folder must stay in its place, and
    its content may not change.

    `recompute`: backward computes every unrolled step's layer and logits again, to the same bits. Without
    it, each further step keeps, between forward and backward, what autograd keeps of a decoder layer, and
    one number per token of the draft vocabulary (at most 256 MiB of these). With it, each keeps 3H + 2 N_kv d
    numbers per anchor (hidden size H, N_kv key-value heads of size d). Neither grows with a sample's length.
    With SmolLM2-135M's sizes, 8,192 draft tokens and two anchors per three tokens that is 32 KiB per token
    without, and 2 KiB with it (benchmarks/training_step.py).
    """

    component: ClassVar[str] = "paceline.methods.eagle3.method:Eagle3Method"
    changeable: ClassVar[tuple[str, ...]] = ("recompute",)
    name: Literal["eagle3"] = "eagle3"
    draft_vocab_size: Count = 8192
    ttt_steps: Annotated[int, Field(ge=1, le=16)] = 4
    step_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 0.8
    loss: LossSection = LossSection()
    init: Literal["regression", "target", "random"] = "regression"
    start_from: Path | None = None
    recompute: bool = False

    @property
    def folders(self) -> tuple[Path, ...]:
        return () if self.start_from is None else (self.start_from,)
