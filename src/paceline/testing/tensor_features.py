"""The store of tensors, and so their codec, beneath an engine and a learner that know bytes only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from paceline.features.store import Sealed
from paceline.testing.light_adapters import LightTensor
from paceline.testing.memory_features import InMemoryFeatureStore
from paceline.types import SampleRef


class TensorFeatureStore(InMemoryFeatureStore):
    """What the light store offers a simulation: see InMemoryLightFeatureStore."""

    def put(self, sample_id: str, tensors: Mapping[str, Any], *, generation: int = 0) -> Sealed:
        given = {name: _tensor(light) for name, light in tensors.items()}
        return super().put(sample_id, given, generation=generation)

    def get(self, ref: SampleRef) -> dict[str, Any]:
        return {name: LightTensor(tensor.numpy().tobytes()) for name, tensor in super().get(ref).items()}

    def generations(self) -> dict[str, int]:
        return dict(self.written())

    def lose(self, sample_id: str) -> None:
        del self._held[sample_id]

    def damage(self, sample_id: str) -> None:
        held = self._held[sample_id]
        payload = held.payload.clone()
        payload[-1] ^= 1
        self._held[sample_id] = replace(held, payload=payload)

    def wipe(self, uri: str) -> None:
        self.destroy()
        self._uri, self._generation = uri, 0


def _tensor(light: LightTensor) -> torch.Tensor:
    return torch.frombuffer(bytearray(light.data), dtype=torch.uint8) if light.data else _NOTHING


_NOTHING = torch.empty(0, dtype=torch.uint8)
