"""Parts: the files of a checkpoint that all ranks wrote, each rank its own rows of every tensor.

`draft-00002-of-00004.safetensors` is the second of four parts of what one process writes as
`draft.safetensors`. A part's header says at which row of the whole each of its tensors begins, under the key
of torch.distributed.checkpoint, whose reader of safetensors therefore reads the parts, too. A tensor that is
not divided lies in the first part. No torch here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from paceline.durable_files import FileContent

METADATA, SHARDING, OFFSETS = "__metadata__", "DCP_SHARDING_INFO", "saved_offsets"
LENGTH = 8  # bytes before a safetensors file's header, which say how long it is
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.safetensors)")


def part_name(name: str, rank: int, ranks: int) -> str:
    """The name of a rank's part of the file `name`."""
    stem, dot, suffix = name.rpartition(".")
    return f"{stem}-{rank + 1:05d}-of-{ranks:05d}{dot}{suffix}"


def whole_name(name: str) -> str:
    """The name of the file of which `name` is a part; else `name`."""
    found = _PART.fullmatch(name)
    return found[1] + found[4] if found else name


def parts_of(name: str, names: Iterable[str]) -> list[str]:
    """The files among `names` that hold the file `name`: itself, or its parts in order.

    Raises KeyError if it is not there, or not all of its parts.
    """
    there = set(names)
    if name in there:
        return [name]
    parts = sorted(one for one in there if whole_name(one) == name)
    found = _PART.fullmatch(parts[0]) if parts else None
    if found is None or parts != [part_name(name, rank, int(found[3])) for rank in range(int(found[3]))]:
        raise KeyError(f"{name}, of which there is {', '.join(parts) or 'nothing'}")
    return parts


def sharding_info(shapes: Mapping[str, Sequence[int]], begins: Mapping[str, int]) -> dict[str, str]:
    """A part's metadata. `shapes`: of its tensors; `begins`: the row of the whole at which each begins."""
    told = {
        name: {OFFSETS: [begins[name], *[0] * (len(shape) - 1)] if shape else []}
        for name, shape in shapes.items()
    }
    return {SHARDING: json.dumps(told, separators=(",", ":"))}


def first_rows(data: FileContent) -> dict[str, int]:
    """The row of the whole at which each tensor of a part begins; of a whole file: {}.

    Raises ValueError, LookupError or TypeError if that is no safetensors header.
    """
    size = int.from_bytes(data[:LENGTH], "little")
    told = json.loads(bytes(data[LENGTH : LENGTH + size])).get(METADATA, {}).get(SHARDING)
    if told is None:
        return {}
    return {name: int((info[OFFSETS] or [0])[0]) for name, info in json.loads(told).items()}


def joined(parts: Sequence[tuple[dict[str, Any], Mapping[str, int]]]) -> dict[str, Any]:
    """The whole tensors of all parts, in order: each part's tensors, and where their rows begin.

    Takes them out of the parts one by one, so hardly more than the whole is in memory. Raises ValueError if
    the rows do not follow each other.
    """
    names = dict.fromkeys(name for tensors, _ in parts for name in tensors)
    return {name: _joined(name, parts) for name in names}


def _joined(name: str, parts: Sequence[tuple[dict[str, Any], Mapping[str, int]]]) -> Any:
    pieces, rows = [], 0
    for tensors, begins in parts:
        if name in tensors:
            pieces.append(piece := tensors.pop(name))
            if begins.get(name, 0) != rows:
                raise ValueError(f"{name} goes on at row {begins.get(name, 0)} of a part, not at {rows}")
            rows += len(piece) if piece.ndim else 1
    if len(pieces) == 1:
        return pieces[0]
    whole, at = pieces[0].new_empty((rows, *pieces[0].shape[1:])), 0
    for piece in pieces:
        whole[at : at + len(piece)] = piece
        at += len(piece)
    return whole
