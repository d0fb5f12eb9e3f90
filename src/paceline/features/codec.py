"""Tensors to bytes and back: the layout of one sample's payload.

Tensors are ordered by name, each 64-byte aligned; the gaps between them are not digested. The digest is
xxh3_128 over the description (sample id and specs, as JSON) and then every tensor's bytes: a sound payload
of another sample, or one that is read with other shapes, does not match. xxh3 finds damage, not malice.
Nothing here is pickled or executed.

Bytes are copied and digested in blocks that stay in a core's second-level cache, so the digest costs next to
nothing. It is taken over the copy, so it verifies what the caller gets.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import xxhash

from paceline.errors import FeatureCorruptError, StoreError
from paceline.types import FeatureSpec

ALIGNMENT_BYTES = 64  # as torch aligns its own tensors: kernels may round differently otherwise
BLOCK_BYTES = 256 << 10  # a quarter of a usual L2, and enough for xxhash to release the GIL
LAYOUTS_MAX = 1024  # cached layouts; a run has one per length of a sample

_FLOATS = ("bfloat16", "float16", "float32", "float64", "float8_e4m3fn")
_STORED = (*_FLOATS, "bool", "int16", "int32", "int64", "int8", "uint8")
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _STORED}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Place:
    """Where one tensor lies in the payload: `count` numbers in bytes `offset` to `stop`.

    `key`: the offset as text, the last part of the tensor's key.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    stop: int
    count: int
    key: str

    @property
    def num_bytes(self) -> int:
        return self.stop - self.offset


@dataclass(frozen=True)
class Layout:
    """Every tensor's place: a function of `specs` alone, so writer and reader agree.

    `text`: the specs in a canonical form.
    """

    specs: Mapping[str, FeatureSpec]
    places: tuple[Place, ...]
    num_bytes: int
    text: str


def layout_of_tensors(sample_id: str, tensors: Mapping[str, Any]) -> Layout:
    """Raises StoreError if there is no tensor, or one that cannot be stored."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            raise _unstorable(sample_id, name, f"a {type(tensor).__name__}, not a dense tensor with data")
        if tensor.dtype not in NAMES:
            raise _unstorable(sample_id, name, f"a tensor of {tensor.dtype}")
    if not tensors:
        raise StoreError(
            f"Sample {sample_id!r} has no tensors.",
            why="A ref finds its bytes by the keys of its tensors.",
            next="give `put` at least one tensor.",
        )
    return _layout(tuple([(name, tensor.shape, NAMES[tensor.dtype]) for name, tensor in tensors.items()]))


def layout_of_specs(sample_id: str, specs: Mapping[str, FeatureSpec]) -> Layout:
    """Raises FeatureCorruptError if no store can have written these specs."""
    try:
        return _layout(tuple([(name, spec.shape, spec.dtype) for name, spec in specs.items()]))
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        said = {name: f"{spec.dtype} {list(spec.shape)}" for name, spec in specs.items()}
        raise FeatureCorruptError(
            f"The ref of {sample_id!r} describes its tensors as {said}.",
            why="No feature store writes such a tensor, so the ref is damaged.",
            next="let the producer capture the sample again.",
        ) from error


def describe(sample_id: str, layout: Layout) -> bytes:
    """Sample id and specs in a canonical form; the digest covers it first."""
    return f"[{json.dumps(sample_id)},{layout.text}]".encode()


def undescribe(description: bytes) -> tuple[str, Layout]:
    """The inverse of `describe`. Raises ValueError if the bytes are not a description."""
    try:
        sample_id, specs = json.loads(description)
        layout = _layout(tuple([(name, tuple(shape), dtype) for name, dtype, shape in specs]))
        if not isinstance(sample_id, str) or describe(sample_id, layout) != description:
            raise ValueError("not in the canonical form")
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        raise ValueError(f"no description of a sample: {error}") from error
    return sample_id, layout


def write(layout: Layout, description: bytes, tensors: Mapping[str, Any], payload: memoryview) -> str:
    """Copy the tensors into `payload` (at least layout.num_bytes) and return the digest of the copy.

    Device tensors and strided views are copied without a contiguous copy in between.
    """
    digest = xxhash.xxh3_128(description)
    for place in layout.places:
        tensor = tensors[place.name].detach()
        room = payload[place.offset : place.stop]
        if len(room) > BLOCK_BYTES and tensor.device.type == "cpu" and tensor.stride(-1) == 1:
            source = tensor.view(torch.uint8).numpy()
            if tensor.is_contiguous():
                _copy(source.reshape(-1).data, room, digest)
            else:
                _copy_rows(source, room, digest)
        else:
            typed(place, payload).copy_(tensor)
            digest.update(room)
    return digest.hexdigest()


def read(layout: Layout, description: bytes, payload: memoryview) -> tuple[dict[str, torch.Tensor], str]:
    """A copy of the tensors in the payload, and the digest of the copy's bytes."""
    copy = torch.empty(layout.num_bytes, dtype=torch.uint8).numpy().data
    digest = xxhash.xxh3_128(description)
    tensors = {}
    for place in layout.places:
        _copy(payload[place.offset : place.stop], copy[place.offset : place.stop], digest)
        tensors[place.name] = typed(place, copy)
    return tensors, digest.hexdigest()


def views(layout: Layout, payload: memoryview) -> dict[str, torch.Tensor]:
    """The tensors where they lie; they keep `payload` alive and change with it."""
    return {place.name: typed(place, payload) for place in layout.places}


def digest_of(layout: Layout, description: bytes, payload: memoryview) -> str:
    """The digest of tensors that lie in `payload`."""
    digest = xxhash.xxh3_128(description)
    for place in layout.places:
        digest.update(payload[place.offset : place.stop])
    return digest.hexdigest()


def _copy(source: memoryview, target: memoryview, digest: Any) -> None:
    """Copy and digest bytes of equal length. Slices of a memoryview cost half of those of an array."""
    for start in range(0, len(target), BLOCK_BYTES):
        block = target[start : start + BLOCK_BYTES]
        block[:] = source[start : start + BLOCK_BYTES]
        digest.update(block)


def _copy_rows(source: np.ndarray, room: memoryview, digest: Any) -> None:
    """Copy and digest `source`: uint8 of any shape with dense rows, in blocks along its first dimension."""
    target = np.frombuffer(room, np.uint8).reshape(source.shape)
    rows = max(1, BLOCK_BYTES * len(source) // source.size)
    for start in range(0, len(source), rows):
        block = target[start : start + rows]
        block[...] = source[start : start + rows]
        digest.update(block)


def typed(place: Place, payload: memoryview) -> torch.Tensor:
    """The tensor at `place`, as a view that keeps `payload` alive."""
    if not place.count:
        return torch.empty(place.shape, dtype=place.dtype)
    flat = torch.frombuffer(payload, dtype=place.dtype, count=place.count, offset=place.offset)
    return flat if len(place.shape) == 1 else flat.view(place.shape)


@lru_cache(maxsize=LAYOUTS_MAX)
def _layout(tensors: tuple[tuple[str, tuple[int, ...], str], ...]) -> Layout:
    """The layout of (name, shape, dtype) triples. Raises KeyError for an unknown dtype, ValueError for a bad
    shape."""
    specs, places, text, end = {}, [], [], 0
    for name, given, dtype_name in sorted(tensors):
        shape = tuple(map(int, given))
        if any(size < 0 for size in shape):
            raise ValueError(f"{name!r} has shape {list(shape)}")
        offset, dtype = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES, DTYPES[dtype_name]
        count = math.prod(shape)
        end = offset + count * dtype.itemsize
        specs[name] = FeatureSpec(name, shape, dtype_name)
        places.append(Place(name, shape, dtype, offset, end, count, str(offset)))
        text.append([name, dtype_name, shape])
    return Layout(MappingProxyType(specs), tuple(places), end, json.dumps(text, separators=(",", ":")))


def _unstorable(sample_id: str, name: str, what: str) -> StoreError:
    return StoreError(
        f"Tensor {name!r} of sample {sample_id!r} is {what}.",
        why="It cannot be stored byte for byte.",
        next=f"give dense tensors of one of {', '.join(DTYPES)}.",
    )
