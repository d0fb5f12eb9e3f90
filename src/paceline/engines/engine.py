"""The contract of a target engine: prompts in, the frozen target's hidden states out.

Layer ids follow vLLM: id k is the state after k decoder blocks, so id N is the last block's
output *before* the final norm. `capture` is a pure function of its group: the same requests in
the same order give the same bits, which is what makes a lost feature a cache miss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from paceline.target.facts import TargetFacts
from paceline.types import Rows

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class CaptureRequest:
    """One prompt to answer and capture. `seed` alone decides the sampling (temperature > 0).

    `rows`: which rows of a hidden state are wanted, by its name in `CapturedSample`; all if not named.
    """

    sample_id: str
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    rows: Mapping[str, Rows] = field(default_factory=dict)

    def first_row(self, name: str) -> int:
        """The first of the rows that are wanted of hidden state `name`; all after it are wanted, too."""
        return len(self.prompt_ids) - 1 if self.rows.get(name) == Rows.PREDICTED else 0


@dataclass(frozen=True)
class CapturedSample:
    """Features of one sample; T = prompt plus answer, less the last token (which has no state).

    Exactly: `input_ids` holds all tokens the target processed (T), `loss_mask` is 1 where the
    *processed* token belongs to the answer. Of a hidden state only the R rows from the request's
    `first_row` on are there: R = T if all are wanted, else 1 + the processed answer tokens.
    """

    sample_id: str
    input_ids: torch.Tensor  # int32 [T]
    loss_mask: torch.Tensor  # uint8 [T]
    aux_hidden_states: torch.Tensor  # target dtype [R, len(aux_layer_ids) * hidden_size]
    last_hidden_states: torch.Tensor  # target dtype [R, hidden_size], pre-norm


class TargetEngine(Protocol):
    """Adapters: transformers.py (in process)."""

    @property
    def facts(self) -> TargetFacts: ...

    def encode(self, prompt: str) -> tuple[int, ...]:
        """Prompt text through the chat template to token ids, generation prompt included."""

    def probe(self) -> None:
        """Check once that norm + lm_head of the captured last state gives the model's own argmax.

        Raises CaptureMismatchError.
        """

    def capture(self, group: Sequence[CaptureRequest]) -> list[CapturedSample]:
        """Answer every prompt of the group and return its features, in order."""
