"""Small sample refs for tests of the control plane."""

from __future__ import annotations

from paceline.types import FeatureSpec, SampleRef


def sample_ref(
    number: int, *, run_id: str = "run0", num_bytes: int = 100, ordinal: int | None = None
) -> SampleRef:
    """The ref `run0:s<number>` of task `task-<number>`."""
    sample_id = f"{run_id}:s{number}"
    return SampleRef(
        sample_id=sample_id,
        run_id=run_id,
        source_task_id=f"task-{number}",
        feature_store_uri=f"mem://{run_id}",
        feature_keys={"hidden_states": f"{sample_id}/hidden_states"},
        feature_specs={"hidden_states": FeatureSpec("hidden_states", (4, 8), "float32")},
        strategy="eagle3",
        num_tokens=4,
        estimated_bytes=num_bytes,
        metadata={"digest": f"{number:032x}"},
        ordinal=ordinal,
    )
