"""A target without a model: features that follow from the sample id alone, and a head to train on.

For tests of the data flow: every sample has its own features, so the weights show what a step trained,
how often and in which order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from paceline.engines.capture_rows import kept_rows, sample_tensors
from paceline.engines.engine import Captured, CaptureRequest
from paceline.errors import EngineError
from paceline.target.chat_encoder import ChatEncoder
from paceline.target.facts import TargetFacts
from paceline.target.head import TargetHead
from paceline.types import Feature, States

HIDDEN, VOCAB, LAYERS = 16, 64, 8


class SyntheticEngine:
    """A TargetEngine. Records the group of every capture call in `captured`."""

    def __init__(self) -> None:
        self.captured: list[list[str]] = []

    @property
    def facts(self) -> TargetFacts:
        return TargetFacts(HIDDEN, LAYERS, VOCAB, "float32", (2,), "synthetic", "bytes")

    @property
    def chats(self) -> ChatEncoder:
        raise EngineError("This target has no chats.")

    def encode(self, prompt: str) -> tuple[int, ...]:
        return tuple(3 + byte % (VOCAB - 3) for byte in prompt.encode())

    def probe(self) -> None:
        """Nothing to check."""

    def close(self) -> None:
        """Nothing to end."""

    def capture(self, group: Sequence[CaptureRequest], features: Sequence[Feature]) -> list[Captured]:
        self.captured.append([request.sample_id for request in group])
        return [synthetic_sample(request, features) for request in group]


def synthetic_sample(request: CaptureRequest, features: Sequence[Feature]) -> Captured:
    """Every answer has as many tokens as it may have."""
    seed = (
        int.from_bytes(hashlib.sha256(f"{request.sample_id}:{request.seed}".encode()).digest()[:8], "big")
        >> 1
    )
    generator = torch.Generator().manual_seed(seed)
    given, written = len(request.token_ids), request.max_new_tokens
    length = given + written - 1
    answer = torch.randint(3, VOCAB, (max(0, written - 1),), generator=generator).tolist()
    targets = request.targets(length + 1)
    states = {
        feature.name: _states(length, len(feature.source.layers), generator)[kept_rows(feature, targets)].to(
            getattr(torch, feature.dtype)
        )
        for feature in features
        if isinstance(feature.source, States)
    }
    last = torch.randint(3, VOCAB, (min(1, written),), generator=generator).tolist()
    tokens = [*request.token_ids, *answer, *last]
    return Captured(request.sample_id, sample_tensors(request, features, tokens, states))


def _states(rows: int, layers: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(rows, layers * HIDDEN, generator=generator)


def synthetic_head(seed: int = 0) -> TargetHead:
    generator = torch.Generator().manual_seed(seed)
    config = {
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": HIDDEN,
        "intermediate_size": 32,
    }
    embed = torch.randn(VOCAB, HIDDEN, generator=generator)
    lm_head = torch.randn(VOCAB, HIDDEN, generator=generator)
    return TargetHead(config, embed, torch.ones(HIDDEN), lm_head, eos_token_ids=(2,))
