"""A target without a model: features that follow from the sample id alone, and a head to train on.

For tests of the data flow. What a step trains, how often and in which order shows in the weights,
because every sample's features are its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from paceline.engines.engine import CapturedSample, CaptureRequest
from paceline.target.facts import TargetFacts
from paceline.target.head import TargetHead

HIDDEN, VOCAB, LAYERS = 16, 64, 8


class SyntheticEngine:
    """A TargetEngine. Records the group of every capture call in `captured`."""

    def __init__(self) -> None:
        self.captured: list[list[str]] = []

    @property
    def facts(self) -> TargetFacts:
        return TargetFacts(HIDDEN, LAYERS, VOCAB, "float32", (2, 4, 5), (2,), "synthetic", "bytes")

    def encode(self, prompt: str) -> tuple[int, ...]:
        return tuple(3 + byte % (VOCAB - 3) for byte in prompt.encode())

    def probe(self) -> None:
        """Nothing to check."""

    def capture(self, group: Sequence[CaptureRequest]) -> list[CapturedSample]:
        self.captured.append([request.sample_id for request in group])
        return [synthetic_sample(request) for request in group]


def synthetic_sample(request: CaptureRequest) -> CapturedSample:
    seed = (
        int.from_bytes(hashlib.sha256(f"{request.sample_id}:{request.seed}".encode()).digest()[:8], "big")
        >> 1
    )
    generator = torch.Generator().manual_seed(seed)
    prompt, length = len(request.prompt_ids), len(request.prompt_ids) + request.max_new_tokens - 1
    answer = torch.randint(3, VOCAB, (length - prompt,), generator=generator)
    states = {
        name: torch.randn(length, width, generator=generator)[request.first_row(name) :]
        for name, width in (("aux_hidden_states", 3 * HIDDEN), ("last_hidden_states", HIDDEN))
    }
    return CapturedSample(
        sample_id=request.sample_id,
        input_ids=torch.cat([torch.tensor(request.prompt_ids), answer]).to(torch.int32),
        loss_mask=(torch.arange(length) >= prompt).to(torch.uint8),
        **states,
    )


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
