"""The most bytes that a sample can take: the producer reserves them before it knows the answer's length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from paceline.capture.settings import CaptureSettings
from paceline.types import Feature, Rows, States

ITEM_BYTES = {"float32": 4, "int32": 4, "int64": 8, "float16": 2, "bfloat16": 2, "uint8": 1, "bool": 1}

SLACK, SLOT_BYTES = 1.3, 16_384  # of the slot that a sample occupies: a share of its bytes, and a part beside


def reserved_sample_bytes(
    capture: CaptureSettings, hidden_size: int, *, longest_prompt: int, has_chats: bool
) -> int:
    """What is reserved for every sample of a run. `longest_prompt`: in tokens; `has_chats`: see PromptSource.

    Of a chat and of a given answer more than the last `max_answer_tokens` may be tokens to predict.
    """
    longest, most = longest_prompt + capture.max_answer_tokens, capture.max_answer_tokens
    are_prompts = capture.answers == "target" and not has_chats
    targets = most if are_prompts else longest
    return largest_sample_bytes(capture.features, hidden_size, num_tokens=longest, num_targets=targets)


def largest_sample_bytes(
    features: Sequence[Feature], hidden_size: int, *, num_tokens: int, num_targets: int
) -> int:
    """The most bytes a sample of `num_tokens` tokens occupies, slack of its slot included.

    `num_targets`: at most how many of those tokens the draft learns to predict.
    """
    payload = payload_bytes(features, hidden_size, num_tokens=num_tokens, num_targets=num_targets)
    return int(payload * SLACK) + SLOT_BYTES


class Collected(NamedTuple):
    """What the consumer must collect before it can go on: how many samples at most, and their bytes, if these
    are fewer than of so many samples of the largest size."""

    samples: int
    num_bytes: int | None = None

    def bytes_at_most(self, sample_bytes: int) -> int:
        return self.samples * sample_bytes if self.num_bytes is None else self.num_bytes


def collected_at_most(
    samples: int,
    sample_bytes: int,
    features: Sequence[Feature],
    hidden_size: int,
    *,
    step_tokens: int | None = None,
) -> Collected:
    """`samples` of up to `sample_bytes` each and, if a step is cut by tokens, the samples of one step.

    No sample has less than one token, and the one that no longer fits into a step must be there before the
    step ends.
    """
    if step_tokens is None:
        return Collected(samples)
    payload = payload_bytes(features, hidden_size, num_tokens=step_tokens, num_targets=step_tokens)
    step_bytes = int(payload * SLACK) + step_tokens * SLOT_BYTES
    return Collected(samples + step_tokens + 1, (samples + 1) * sample_bytes + step_bytes)


def payload_bytes(features: Sequence[Feature], hidden_size: int, *, num_tokens: int, num_targets: int) -> int:
    """The bytes of the tensors of a sample of that many tokens, `num_targets` of them to be predicted."""
    payload = 0
    for feature in features:
        rows = num_targets if feature.rows == Rows.PREDICTED else num_tokens
        layers = len(feature.source.layers) if isinstance(feature.source, States) else 0
        width, item = layers * hidden_size or 1, ITEM_BYTES[feature.dtype]
        payload += rows * (width + layers * item if feature.narrowed else width * item)
    return payload
