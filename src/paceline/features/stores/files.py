"""The feature store of samples that are kept: a safetensors file each, in a folder on a disk.

`paceline compare` captures samples into it once and trains on them many times. A file appears whole, by a
rename. It is not synced: after a power failure it may be torn, its digest tells, and it is captured again.
The caller ensures that there is one writer; within a process one thread calls.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save

from paceline.durable_files import make_folder, replace_file
from paceline.errors import StoreFullError
from paceline.features import codec
from paceline.features.store import Sealed, Usage, Written
from paceline.features.stores.refusals import corrupt, elsewhere, missing, stale
from paceline.types import SampleRef

IDENTITY, SUFFIX, ASIDE = "store-id", ".safetensors", ".part"


@dataclass(frozen=True)
class _File:
    path: Path
    generation: int
    num_bytes: int


class FileFeatureStore:
    def __init__(self, folder: Path, *, budget_bytes: int) -> None:
        """Raises OSError if the folder cannot be used."""
        self._folder, self._budget_bytes = folder, budget_bytes
        make_folder(folder)
        if not (folder / IDENTITY).exists():
            replace_file(folder / IDENTITY, uuid.uuid4().hex.encode())
        self._uri = f"files://{(folder / IDENTITY).read_text()}"
        for torn in folder.glob(f"*{ASIDE}"):
            torn.unlink()
        # By sample id. A file that is not whole is not among them; a reader of its sample misses it.
        self._held = dict(
            found for path in folder.glob(f"*{SUFFIX}") if (found := _recognised(path)) is not None
        )
        self._generation = max((held.generation for held in self._held.values()), default=0)

    def put(self, sample_id: str, tensors: Mapping[str, Any], *, generation: int = 0) -> Sealed:
        held = self._held.get(sample_id)
        if held is not None and generation in (0, held.generation):
            kept = load(held.path.read_bytes())
            return self._sealed(sample_id, codec.layout_of_tensors(sample_id, kept), held)
        if held is not None and generation < held.generation:
            raise stale(sample_id, generation, held.generation)
        layout = codec.layout_of_tensors(sample_id, tensors)
        self.free([(sample_id, 0)])
        own = {
            name: t.detach().to("cpu").clone(memory_format=torch.contiguous_format)
            for name, t in tensors.items()
        }
        number = generation or self._generation + 1
        data = save(own, {"sample": json.dumps([sample_id, number])})
        resident = self.usage().resident_bytes
        if resident + len(data) > self._budget_bytes:
            raise _full(sample_id, len(data), f"{resident} of {self._budget_bytes} bytes are taken")
        self._held[sample_id] = written = _File(self._path(sample_id, number), number, len(data))
        try:
            written.path.with_suffix(ASIDE).write_bytes(data)
            written.path.with_suffix(ASIDE).rename(written.path)
        except OSError as error:
            del self._held[sample_id]
            written.path.with_suffix(ASIDE).unlink(missing_ok=True)
            raise _full(sample_id, len(data), f"{self._folder} cannot be written ({error})") from error
        self._generation = max(self._generation, number)
        return self._sealed(sample_id, layout, written, data)

    def get(self, ref: SampleRef) -> dict[str, Any]:
        if ref.feature_store_uri != self._uri:
            raise elsewhere(ref, self._uri)
        layout = codec.layout_of_specs(ref.sample_id, ref.feature_specs)
        generation = next(iter(ref.feature_keys.values())).partition("/")[0]
        try:
            data = self._path(ref.sample_id, int(generation)).read_bytes()
        except (FileNotFoundError, ValueError) as error:
            raise missing(ref, "it was freed, or never written") from error
        digest = _digest(ref.sample_id, layout, data)
        if digest != ref.metadata.get("digest"):
            raise corrupt(ref, f"the file has digest {digest}")
        # Copies lie as torch aligns its own tensors: kernels may round differently otherwise.
        return {name: tensor.clone() for name, tensor in load(data).items()}

    def free(self, written: Iterable[Written]) -> None:
        for sample_id, generation in written:
            held = self._held.get(sample_id)
            if held is not None and generation in (0, held.generation):
                del self._held[sample_id]
                held.path.unlink(missing_ok=True)
            elif held is None and generation:
                self._path(sample_id, generation).unlink(missing_ok=True)  # a file that was not recognised

    def written(self) -> list[Written]:
        return [(sample_id, held.generation) for sample_id, held in self._held.items()]

    def usage(self) -> Usage:
        resident = sum(held.num_bytes for held in self._held.values())
        return Usage(resident, len(self._held), self._budget_bytes)

    def close(self) -> None:
        """Nothing to detach from."""

    def destroy(self) -> None:
        self._held.clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, sample_id: str, generation: int) -> Path:
        name = hashlib.sha256(sample_id.encode()).hexdigest()[:24]
        return self._folder / f"{name}-{generation}{SUFFIX}"

    def _sealed(self, sample_id: str, layout: codec.Layout, held: _File, data: bytes | None = None) -> Sealed:
        keys = {name: f"{held.generation}/{name}" for name in layout.specs}
        digest = _digest(sample_id, layout, held.path.read_bytes() if data is None else data)
        kind = "xxh3_128 of description and file"
        return Sealed(self._uri, keys, dict(layout.specs), held.num_bytes, digest, kind)


def _digest(sample_id: str, layout: codec.Layout, data: bytes) -> str:
    digest = xxhash.xxh3_128(codec.describe(sample_id, layout))
    digest.update(data)
    return digest.hexdigest()


def _recognised(path: Path) -> tuple[str, _File] | None:
    """The sample of a file whose header is whole and fits its size."""
    try:
        with safe_open(path, framework="pt") as file:
            sample_id, generation = json.loads((file.metadata() or {})["sample"])
    except (SafetensorError, OSError, ValueError, LookupError):
        return None
    return str(sample_id), _File(path, int(generation), path.stat().st_size)


def _full(sample_id: str, num_bytes: int, why: str) -> StoreFullError:
    return StoreFullError(
        f"Sample {sample_id!r} of {num_bytes} bytes does not fit: {why}.",
        why="Samples that are kept stay until their folder is removed; nothing of this one was written.",
        next="free space on that disk, then run the same command again; what is kept is not captured again.",
    )
