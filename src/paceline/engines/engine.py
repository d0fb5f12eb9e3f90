"""The contract of a target engine: it answers prompts and returns the features that a method asked for.

Unless its facts say otherwise (`repeats_bits`), `capture` is a pure function of its group: the same
requests in the same order give the same bits. So a lost feature is only a cache miss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from paceline.target.facts import TargetFacts
from paceline.types import Feature

if TYPE_CHECKING:
    import torch

    from paceline.target.chat_encoder import ChatEncoder


@dataclass(frozen=True)
class CaptureRequest:
    """The given tokens of a sample, and how the target continues them.

    `spans`: the given tokens that are answers, as (start, stop); the draft learns to predict those and
    every token that the target writes. `max_new_tokens=0`: the target writes nothing and prefills the
    given tokens. `seed` alone decides the sampling (temperature > 0).
    """

    sample_id: str
    token_ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...] = ()
    max_new_tokens: int = 0
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for a request that no engine could answer."""
        least = 1 if self.max_new_tokens else 2  # a prefill leaves out the last given token
        if len(self.token_ids) < least:
            raise ValueError(f"{self.sample_id}: {len(self.token_ids)} tokens, at least {least} are needed")
        ends = [0, *(place for span in self.spans for place in span), len(self.token_ids)]
        if ends != sorted(ends):
            raise ValueError(f"{self.sample_id}: spans {self.spans} of {len(self.token_ids)} tokens")

    @property
    def processed(self) -> tuple[int, ...]:
        """The given tokens that the target processes: all, or all but the last if it writes none."""
        return self.token_ids if self.max_new_tokens else self.token_ids[:-1]

    def targets(self, num_tokens: int) -> list[bool]:
        """For each of `num_tokens` tokens, the given ones first: whether the draft learns to predict it."""
        given = len(self.token_ids)
        mask = [False] * given + [True] * (num_tokens - given)
        for start, stop in self.spans:
            mask[start:stop] = [True] * (stop - start)
        return mask


@dataclass(frozen=True)
class Captured:
    """A sample's tensors by the names of the requested features (shapes: paceline/types.py)."""

    sample_id: str
    tensors: dict[str, torch.Tensor]


class TargetEngine(Protocol):
    """Adapters: transformers.py (in process), vllm/ and sglang/ (a server)."""

    @property
    def facts(self) -> TargetFacts: ...

    @property
    def chats(self) -> ChatEncoder:
        """Encodes chats of several messages as `encode` does a prompt; asked for only if there are any."""

    def encode(self, prompt: str) -> tuple[int, ...]:
        """Token ids of the prompt's text in the chat template, generation prompt included."""

    def probe(self) -> None:
        """Check once that captured states, and the distribution made of them, are the model's own.

        Raises CaptureMismatchError.
        """

    def capture(self, group: Sequence[CaptureRequest], features: Sequence[Feature]) -> list[Captured]:
        """Answer every request of the group and return its features, in order.

        An engine of several groups in flight is called by several threads.
        """

    def close(self) -> None:
        """End what the engine has started beside this process."""
