"""The feature store in a dictionary: the readable specification, for one process and for tests.

It copies on put and on get, so it shares no memory with its callers, and it verifies digests like every
other store. Its content ends with its process. One thread at a time.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from paceline.errors import StoreFullError
from paceline.features import codec
from paceline.features.store import Sealed, Usage, Written
from paceline.features.stores.refusals import corrupt, elsewhere, missing, stale
from paceline.types import SampleRef


@dataclass(frozen=True)
class _Held:
    sealed: Sealed
    generation: int
    payload: torch.Tensor  # uint8 [num_bytes]


class InMemoryFeatureStore:
    def __init__(self, budget_bytes: int) -> None:
        self._uri = f"memory://{uuid.uuid4().hex}"
        self._budget_bytes = budget_bytes
        self._held: dict[str, _Held] = {}
        self._generation = 0

    def put(self, sample_id: str, tensors: Mapping[str, Any], *, generation: int = 0) -> Sealed:
        held = self._held.get(sample_id)
        if held is not None and generation in (0, held.generation):
            return held.sealed
        if held is not None and generation < held.generation:
            raise stale(sample_id, generation, held.generation)
        layout = codec.layout_of_tensors(sample_id, tensors)
        self._held.pop(sample_id, None)
        resident = self.usage().resident_bytes
        if resident + layout.num_bytes > self._budget_bytes:
            raise StoreFullError(
                f"Sample {sample_id!r} of {layout.num_bytes} bytes does not fit: "
                f"{resident} of {self._budget_bytes} bytes are resident.",
                why="A sample's bytes stay until a durable checkpoint covers it.",
                next="raise the budget, or save a checkpoint sooner.",
            )
        payload = torch.empty(layout.num_bytes, dtype=torch.uint8)
        digest = codec.write(layout, codec.describe(sample_id, layout), tensors, payload.numpy().data)
        # A ref to freed bytes must not find the bytes of a later put.
        self._generation = generation or self._generation + 1
        keys = {name: f"{self._generation}/{name}" for name in layout.specs}
        sealed = Sealed(self._uri, keys, dict(layout.specs), layout.num_bytes, digest)
        self._held[sample_id] = _Held(sealed, self._generation, payload)
        return sealed

    def get(self, ref: SampleRef) -> dict[str, Any]:
        held = self._held.get(ref.sample_id)
        if ref.feature_store_uri != self._uri:
            raise elsewhere(ref, self._uri)
        if held is None or ref.feature_keys != held.sealed.keys:
            raise missing(ref, "they were freed, or never sealed here")
        layout = codec.layout_of_specs(ref.sample_id, ref.feature_specs)
        if layout.specs != held.sealed.specs:
            raise corrupt(ref, "the sealed tensors have other shapes or dtypes")
        description = codec.describe(ref.sample_id, layout)
        tensors, digest = codec.read(layout, description, held.payload.numpy().data)
        if digest != ref.metadata.get("digest"):
            raise corrupt(ref, f"the bytes have digest {digest}")
        return tensors

    def free(self, written: Iterable[Written]) -> None:
        for sample_id, generation in written:
            held = self._held.get(sample_id)
            if held is not None and generation in (0, held.generation):
                del self._held[sample_id]

    def written(self) -> list[Written]:
        return [(sample_id, held.generation) for sample_id, held in self._held.items()]

    def usage(self) -> Usage:
        resident = sum(held.sealed.num_bytes for held in self._held.values())
        return Usage(resident, len(self._held), self._budget_bytes)

    def close(self) -> None:
        """Nothing to detach from."""

    def destroy(self) -> None:
        self._held.clear()
