"""What is reserved for a sample before its size is known."""

from __future__ import annotations

from pathlib import Path

import pytest

from paceline.capture.sizing import largest_sample_bytes, payload_bytes
from paceline.engines.engine import CaptureRequest
from paceline.features.float8 import narrowed
from paceline.features.stores.shm import SharedMemoryFeatureStore
from paceline.testing.synthetic import HIDDEN, SyntheticEngine
from paceline.types import Feature, Rows, States, Targets, Tokens

TOKENS = (Feature("tokens", Tokens(), dtype="int32"), Feature("targets", Targets(), dtype="uint8"))


@pytest.mark.parametrize("rows", Rows)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize(("prompt", "answer"), [(1, 40), (700, 40), (300, 600)])
def test_no_sample_takes_more_than_is_reserved_for_it(
    tmp_path: Path, rows: Rows, dtype: str, narrow: bool, prompt: int, answer: int
) -> None:
    """Whatever the method asks for; and a reservation is not so large that budgets stand empty."""
    features = (
        *TOKENS,
        Feature("early", States((1, 2, 3)), dtype=dtype, narrowed=narrow),
        Feature("late", States((8,)), rows, dtype=dtype),
    )
    request = CaptureRequest("s", (3,) * prompt, max_new_tokens=answer)
    [sample] = SyntheticEngine().capture([request], features)
    store = SharedMemoryFeatureStore(tmp_path / "store", budget_bytes=8 << 20, owner=True)
    sealed = store.put("s", narrowed("s", sample.tensors, features))
    reserved = largest_sample_bytes(features, HIDDEN, num_tokens=prompt + answer, num_targets=answer)
    assert store.usage().resident_bytes <= reserved
    assert reserved <= 1.4 * sealed.num_bytes + 16_384
    store.destroy()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bytes_of_a_sample_are_told_exactly(dtype: str) -> None:
    """Of states in float8: one byte a number, and a scale for each token and layer."""
    early = Feature("early", States((1, 2, 3)), dtype=dtype, narrowed=True)
    features = (*TOKENS, early, Feature("late", States((8,)), Rows.PREDICTED, dtype=dtype))
    [sample] = SyntheticEngine().capture([CaptureRequest("s", (3,) * 5, max_new_tokens=4)], features)
    stored = narrowed("s", sample.tensors, features)
    processed, last = 5 + 4 - 1, 4 + 1  # bytes of the last token and its mask, which has no states
    told = payload_bytes(features, HIDDEN, num_tokens=processed, num_targets=4) + last
    assert told == sum(tensor.nbytes for tensor in stored.values())
    assert stored["early"].nbytes == processed * 3 * HIDDEN
