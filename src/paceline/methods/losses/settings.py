"""The loss that a method compares the draft's distribution with the target's by. No torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from paceline.section import Section

LossName = Literal["soft_cross_entropy", "kl", "tv", "lk_alpha", "lk_lambda"]


BLOCK_ROWS = 512  # predictions whose losses a GPU computes at a time


class LossSection(Section):
    """`method.loss: NAME`, or a mapping with `name`. p is the target's distribution and q the draft's, both
    over the draft's vocabulary; alpha = sum of min(p, q) is the rate at which sampling accepts a guess.

    - `soft_cross_entropy`: of q, expected under p.
    - `kl`: the forward divergence of q from p. Its gradient is that of `soft_cross_entropy`; its value is 0
      where both are equal.
    - `tv`: total variation, 1 - alpha. Its gradient vanishes where p and q hardly overlap.
    - `lk_alpha`: -log(alpha) (arXiv 2602.23881, section 4.3).
    - `lk_lambda`: w kl + (1 - w) tv, w = exp(-`eta` alpha) (section 4.2 there). The paper takes the mean
      alpha of a batch; here each prediction has its own, so that micro-batches add up to their batch.
    """

    name: LossName = "soft_cross_entropy"
    eta: Annotated[float, Field(ge=0.0)] = 3.0

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _eta_is_read(self) -> LossSection:
        changed = self.eta != type(self).model_fields["eta"].default  # a recorded run file names all knobs
        if changed and self.name != "lk_lambda":
            raise ValueError(f"eta belongs to the loss lk_lambda; {self.name} does not read it")
        return self


def loss_bytes(vocab: int, predictions: float, compared: float, width: int) -> float:
    """Logits and their gradient of so many `predictions` over `vocab` tokens, the wanted ones in float32 of
    the `compared` rows, and what `BLOCK_ROWS` predictions take for a moment."""
    return vocab * (2 * width * predictions + 4 * compared + 24 * min(predictions, BLOCK_ROWS))
