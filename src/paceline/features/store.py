"""The data plane's contract: tensors in, a `SampleRef`'s keys out.

A stored sample is immutable once sealed: `put` of a sample and generation that is already sealed
returns the sealed key and writes nothing. Only `abort` frees bytes, and only the control plane decides when
(after a durable checkpoint covers the sample). A crash between `put` and the ledger's commit
leaves an orphan, which `sweep` reclaims.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from paceline.types import FeatureSpec, SampleRef


@dataclass(frozen=True)
class Usage:
    """Bytes and samples now resident, and the most this store will hold (bytes)."""

    resident_bytes: int
    resident_samples: int
    budget_bytes: int


@dataclass(frozen=True)
class Sealed:
    """What `put` returns: everything the ref needs to find and verify the bytes again."""

    uri: str
    keys: Mapping[str, str]
    specs: Mapping[str, FeatureSpec]
    num_bytes: int
    digest: str


class FeatureStore(Protocol):
    """Tensors by sample id. Adapters: stores/memory.py, stores/shm.py."""

    def put(self, sample_id: str, tensors: Mapping[str, Any], *, generation: int = 0) -> Sealed:
        """Copy the tensors in and seal them. Raises StoreFullError, and then holds nothing new.

        `generation`: the byte intent they are written under (0: none, the store counts itself). Bytes
        of the sample under another generation are freed first.
        """

    def get(self, ref: SampleRef) -> dict[str, Any]:
        """Tensors whose bytes match the ref's digest and specs.

        Raises FeatureMissingError (never sealed, or freed) or FeatureCorruptError.
        """

    def abort(self, sample_id: str, reason: str = "", *, generation: int | None = None) -> None:
        """Free the sample's bytes. Idempotent: unknown or already freed is not an error.

        With a generation, only if they were written under it: what was captured since stays.
        """

    def sweep(self, keep: Collection[str], *, before: int | None = None) -> list[str]:
        """Free every sample whose id is not in `keep`; return their ids.

        A mapping keeps a sample only if its bytes are of the generation named (0: of any). With
        `before`, bytes of that generation and later ones stay: they may be a successor's.
        Only the producer that owns the store may call this, before it writes.
        """

    def sample_ids(self) -> list[str]:
        """Every sample whose sealed bytes are here. Only the producer that owns the store may ask."""

    def newest_generation(self) -> int:
        """The largest generation that any bytes here were written under; 0 if there are none.

        Only the producer that owns the store may ask.
        """

    def usage(self) -> Usage:
        """Bytes are what the store occupies, slack included."""

    def close(self) -> None:
        """Detach. Sealed bytes outlive this process where the medium does."""

    def destroy(self) -> None:
        """Give all memory back. Only at the end of a run."""


class ViewableFeatureStore(FeatureStore, Protocol):
    """One whose bytes lie in memory that this process reads. Both adapters are."""

    def view(self, ref: SampleRef) -> AbstractContextManager[dict[str, Any]]:
        """The tensors where they lie, verified there and not copied. Nobody may write to them.

        Raises on entry what `get` raises, and FeatureMissingError on leaving if the bytes were freed
        meanwhile: others may lie there by now, so whatever was made of them, an exception included,
        must be dropped. What is done outside the block, or damaged inside it, is not noticed.
        """


def is_kept(keep: Collection[str], before: int | None, sample_id: str, generation: int) -> bool:
    """Whether a sweep leaves these bytes alone."""
    if before is not None and generation >= before:
        return True
    if isinstance(keep, Mapping):
        return keep.get(sample_id) in (0, generation)
    return sample_id in keep
