"""Tensors to bytes and back: the layout of one sample's payload.

Tensors lie in the order of their names, each 64-byte aligned; the gaps belong to no tensor and
are not digested. The digest is xxh3_128 over the description (sample id and specs, as JSON) and
then every tensor's bytes: a payload that is sound but belongs to another sample, or is read under
other shapes, does not match. xxh3 finds damage, not malice. No pickle: nothing here is executed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import xxhash

from paceline.errors import FeatureCorruptError, StoreError
from paceline.types import FeatureSpec

ALIGNMENT_BYTES = 64

DTYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "bool": torch.bool,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "int8": torch.int8,
    "uint8": torch.uint8,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Place:
    """Where one tensor lies in the payload."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    num_bytes: int

    @property
    def spec(self) -> FeatureSpec:
        return FeatureSpec(self.name, self.shape, NAMES[self.dtype])


@dataclass(frozen=True)
class Layout:
    """Every tensor's place; a function of the specs alone, so writer and reader agree on it."""

    places: tuple[Place, ...]
    num_bytes: int

    @property
    def specs(self) -> dict[str, FeatureSpec]:
        return {place.name: place.spec for place in self.places}


def layout_of_tensors(sample_id: str, tensors: Mapping[str, Any]) -> Layout:
    """Raises StoreError if there is none, or one that cannot be stored."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            raise _unstorable(sample_id, name, f"a {type(tensor).__name__} that is no dense tensor with data")
        if tensor.dtype not in NAMES:
            raise _unstorable(sample_id, name, f"a tensor of {tensor.dtype}")
    if not tensors:
        raise StoreError(
            f"Sample {sample_id!r} has no tensors.",
            why="A ref finds its bytes by the keys of its tensors.",
            next="give `put` at least one tensor.",
        )
    return _layout({name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()})


def layout_of_specs(sample_id: str, specs: Mapping[str, FeatureSpec]) -> Layout:
    """Raises FeatureCorruptError if the specs name a dtype that no store ever wrote."""
    for name, spec in specs.items():
        if spec.dtype not in DTYPES or any(size < 0 for size in spec.shape):
            raise FeatureCorruptError(
                f"The ref of {sample_id!r} says that {name!r} is {spec.dtype} {list(spec.shape)}.",
                why="No feature store writes such a tensor, so the ref is damaged.",
                next="let the producer capture the sample again.",
            )
    return _layout({name: (tuple(spec.shape), DTYPES[spec.dtype]) for name, spec in specs.items()})


def describe(sample_id: str, layout: Layout) -> bytes:
    """Sample id and specs in one canonical form; the digest begins with it."""
    specs = [[place.name, NAMES[place.dtype], list(place.shape)] for place in layout.places]
    return json.dumps([sample_id, specs], separators=(",", ":")).encode()


def undescribe(description: bytes) -> tuple[str, Layout]:
    """The inverse of `describe`. Raises ValueError if the bytes are no description."""
    try:
        sample_id, specs = json.loads(description)
        layout = _layout({name: (tuple(shape), DTYPES[dtype]) for name, dtype, shape in specs})
        if not isinstance(sample_id, str) or describe(sample_id, layout) != description:
            raise ValueError("not in the canonical form")
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        raise ValueError(f"no description of a sample: {error}") from error
    return sample_id, layout


def write(layout: Layout, description: bytes, tensors: Mapping[str, Any], payload: torch.Tensor) -> str:
    """Copy the tensors into `payload` (uint8 [>= layout.num_bytes]); the digest of what now lies there.

    Device tensors and strided views are copied directly, without a contiguous copy in between.
    """
    digest = xxhash.xxh3_128(description)
    for place in layout.places:
        raw = payload[place.offset : place.offset + place.num_bytes]
        raw.view(place.dtype).view(place.shape).copy_(tensors[place.name].detach())
        digest.update(raw.numpy().data)
    return digest.hexdigest()


def read(layout: Layout, description: bytes, payload: torch.Tensor) -> tuple[dict[str, torch.Tensor], str]:
    """Tensors that own their memory, and the digest of their bytes (of the copy, not of `payload`)."""
    digest, tensors = xxhash.xxh3_128(description), {}
    for place in layout.places:
        raw = payload[place.offset : place.offset + place.num_bytes].clone()
        digest.update(raw.numpy().data)
        tensors[place.name] = raw.view(place.dtype).view(place.shape)
    return tensors, digest.hexdigest()


def _layout(tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> Layout:
    places, end = [], 0
    for name in sorted(tensors):
        shape, dtype = tensors[name]
        offset = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        num_bytes = math.prod(shape) * dtype.itemsize
        places.append(Place(name, shape, dtype, offset, num_bytes))
        end = offset + num_bytes
    return Layout(tuple(places), end)


def _unstorable(sample_id: str, name: str, what: str) -> StoreError:
    return StoreError(
        f"Tensor {name!r} of sample {sample_id!r} is {what}.",
        why="It cannot be stored byte for byte.",
        next=f"give dense tensors of one of {', '.join(DTYPES)}.",
    )
