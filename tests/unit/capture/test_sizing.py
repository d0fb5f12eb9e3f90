"""What is reserved for a sample before its size is known."""

from __future__ import annotations

from pathlib import Path

import pytest

from paceline.capture.sizing import largest_sample_bytes
from paceline.engines.engine import CaptureRequest
from paceline.features.stores.shm import SharedMemoryFeatureStore
from paceline.testing.synthetic import HIDDEN, SyntheticEngine
from paceline.types import Feature, Rows, States, Targets, Tokens

TOKENS = (Feature("tokens", Tokens(), dtype="int32"), Feature("targets", Targets(), dtype="uint8"))


@pytest.mark.parametrize("rows", Rows)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("prompt", "answer"), [(1, 40), (700, 40), (300, 600)])
def test_no_sample_takes_more_than_is_reserved_for_it(
    tmp_path: Path, rows: Rows, dtype: str, prompt: int, answer: int
) -> None:
    """Whatever the method asks for; and a reservation is not so large that budgets stand empty."""
    features = (
        *TOKENS,
        Feature("early", States((1, 2, 3)), dtype=dtype),
        Feature("late", States((8,)), rows, dtype=dtype),
    )
    request = CaptureRequest("s", (3,) * prompt, max_new_tokens=answer)
    [sample] = SyntheticEngine().capture([request], features)
    store = SharedMemoryFeatureStore(tmp_path / "store", budget_bytes=8 << 20, owner=True)
    sealed = store.put("s", sample.tensors)
    reserved = largest_sample_bytes(features, HIDDEN, num_tokens=prompt + answer, num_targets=answer)
    assert store.usage().resident_bytes <= reserved
    assert reserved <= 1.4 * sealed.num_bytes + 16_384
    store.destroy()
