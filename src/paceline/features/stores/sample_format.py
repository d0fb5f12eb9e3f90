"""A sample's file: safetensors, with the sample's id, its generation and the codec's digest as metadata.

Any program that reads safetensors reads it. The digest is that of features/codec.py, whatever the order in
the file (safetensors wants large items first), so every store of this package gives a sample one digest.
Tensors are written from where they lie and read to where they stay: nothing is copied in between.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch
import xxhash

from paceline.features.codec import BLOCK_BYTES, Layout, Place, describe, layout_of_specs, typed
from paceline.types import FeatureSpec

KIND = "paceline sample 1"
HEADER_BYTES_MAX = 1 << 20
_LENGTH_BYTES = 8
_NAMES = {
    "bfloat16": "BF16",
    "bool": "BOOL",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "float8_e4m3fn": "F8_E4M3",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "int8": "I8",
    "uint8": "U8",
}
_DTYPES = {theirs: ours for ours, theirs in _NAMES.items()}


def header(sample_id: str, layout: Layout, generation: int, digest: str) -> bytes:
    """All that stands before the first tensor: a function of these, as long for one digest as for another."""
    tensors = {
        place.name: {
            "dtype": _NAMES[layout.specs[place.name].dtype],
            "shape": place.shape,
            "data_offsets": (start, start + place.num_bytes),
        }
        for place, start in _in_file(layout)
    }
    told = {"kind": KIND, "sample": json.dumps([sample_id, generation]), "digest": digest}
    text = json.dumps({"__metadata__": told, **tensors}, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH_BYTES + len(text)) % 64)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def file_bytes(sample_id: str, layout: Layout, generation: int) -> int:
    """How large the file is."""
    payload = sum(place.num_bytes for place in layout.places)
    return len(header(sample_id, layout, generation, "0" * 32)) + payload


def read_header(file: BinaryIO) -> tuple[str, int, str, Layout]:
    """Sample id, generation, digest and layout of a whole file. Raises ValueError, OSError."""
    length = int.from_bytes(os.pread(file.fileno(), _LENGTH_BYTES, 0), "little")
    if not 0 < length <= HEADER_BYTES_MAX:
        raise ValueError("it does not begin with a header")
    text = os.pread(file.fileno(), length, _LENGTH_BYTES)
    try:
        tensors: dict[str, Any] = json.loads(text)
        told = tensors.pop("__metadata__")
        sample_id, generation = json.loads(told["sample"])
        specs = {
            name: FeatureSpec(name, tuple(entry["shape"]), _DTYPES[entry["dtype"]])
            for name, entry in tensors.items()
        }
        layout = layout_of_specs(sample_id, specs)
        whole = header(sample_id, layout, generation, told["digest"])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its header makes no sense ({error})") from error
    except Exception as error:
        raise ValueError(f"its header names no tensors that a store writes ({error})") from error
    if whole[_LENGTH_BYTES:] != text:
        raise ValueError("its header is not one that a store writes")
    if os.fstat(file.fileno()).st_size != file_bytes(sample_id, layout, generation):
        raise ValueError("it is cut off")
    return sample_id, generation, told["digest"], layout


def write(fd: int, sample_id: str, layout: Layout, generation: int, tensors: Mapping[str, Any]) -> str:
    """Write the file and return the digest. Raises OSError.

    The header comes last, because it holds the digest; so a file that was cut short does not begin with one.
    """
    begin = len(header(sample_id, layout, generation, "0" * 32))
    starts = {place.name: begin + start for place, start in _in_file(layout)}
    digest = xxhash.xxh3_128(describe(sample_id, layout))
    for place in layout.places:
        source = _bytes_of(tensors[place.name], place)
        for at in range(0, place.num_bytes, BLOCK_BYTES):
            block = source[at : at + BLOCK_BYTES]
            digest.update(block)
            _write_at(fd, block, starts[place.name] + at)
    found = digest.hexdigest()
    _write_at(fd, memoryview(header(sample_id, layout, generation, found)), 0)
    return found


def read(file: BinaryIO, sample_id: str, layout: Layout, begin: int) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors after a header of `begin` bytes, and their digest. Raises EOFError, OSError."""
    fd = file.fileno()
    payload = torch.empty(layout.num_bytes, dtype=torch.uint8).numpy().data
    starts = {place.name: begin + start for place, start in _in_file(layout)}
    digest = xxhash.xxh3_128(describe(sample_id, layout))
    tensors = {}
    for place in layout.places:
        for at in range(0, place.num_bytes, BLOCK_BYTES):
            block = payload[place.offset + at : min(place.offset + at + BLOCK_BYTES, place.stop)]
            _read_at(fd, block, starts[place.name] + at)
            digest.update(block)
        tensors[place.name] = typed(place, payload)
    return tensors, digest.hexdigest()


def _in_file(layout: Layout) -> list[tuple[Place, int]]:
    """The places in the order of the file, and where each begins after the header."""
    found, end = [], 0
    for place in sorted(layout.places, key=lambda place: (-place.dtype.itemsize, place.name)):
        found.append((place, end))
        end += place.num_bytes
    return found


def _bytes_of(tensor: Any, place: Place) -> memoryview:
    """The tensor's bytes where they lie, if it is dense and on the CPU, else of a copy."""
    if not place.count:
        return memoryview(b"")
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    content: memoryview = flat.view(torch.uint8).numpy().data
    return content


def _write_at(fd: int, data: memoryview, at: int) -> None:
    while data:
        count = os.pwrite(fd, data, at)
        data, at = data[count:], at + count


def _read_at(fd: int, room: memoryview, at: int) -> None:
    while room:
        count = os.preadv(fd, [room], at)
        if not count:
            raise EOFError("the file is cut off")
        room, at = room[count:], at + count
