"""What is reserved for a sample before its size is known."""

from __future__ import annotations

from pathlib import Path

import pytest

from paceline.capture.producer import CaptureSettings
from paceline.engines.engine import CaptureRequest
from paceline.features.stores.shm import SharedMemoryFeatureStore
from paceline.roles.wire import largest_sample_bytes
from paceline.testing.synthetic import SyntheticEngine
from paceline.types import Rows

NAMES = ("input_ids", "loss_mask", "aux_hidden_states", "last_hidden_states")


@pytest.mark.parametrize("rows", [{}, {"last_hidden_states": Rows.PREDICTED}])
@pytest.mark.parametrize(("prompt", "answer"), [(1, 40), (700, 40), (300, 600)])
def test_no_sample_takes_more_than_is_reserved_for_it(
    tmp_path: Path, rows: dict[str, Rows], prompt: int, answer: int
) -> None:
    """Whichever rows the method asks for; and a reservation is not so large that budgets stand empty."""
    engine = SyntheticEngine()
    capture = CaptureSettings(group_size=1, num_prompts=1, max_answer_tokens=answer, rows=rows)
    [sample] = engine.capture([CaptureRequest("s", (3,) * prompt, answer, rows=rows)])
    store = SharedMemoryFeatureStore(tmp_path / "store", budget_bytes=8 << 20, owner=True)
    sealed = store.put("s", {name: getattr(sample, name) for name in NAMES})
    reserved = largest_sample_bytes(engine, prompt, capture)
    assert store.usage().resident_bytes <= reserved
    assert reserved <= 1.4 * sealed.num_bytes + 16_384
    store.destroy()
