"""The data plane's contract: tensors in, a `SampleRef`'s keys out.

A stored sample is immutable once sealed: `put` of a sample and generation that is already sealed
returns the sealed key and writes nothing. Only `free` frees bytes, and only the control plane decides when
(after a durable checkpoint covers the sample). A crash between `put` and the ledger's commit
leaves an orphan, which the next producer frees.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
    """What `put` returns: everything the ref needs to find and verify the bytes again.

    `digest_kind`: what the digest was taken over, and how. A store that verifies its bytes in another way
    says so here; only the store that gave a digest can judge bytes by it.
    """

    uri: str
    keys: Mapping[str, str]
    specs: Mapping[str, FeatureSpec]
    num_bytes: int
    digest: str
    digest_kind: str = "xxh3_128 of features/codec.py"


# A sample's bytes: its id and the byte intent they were written under. A store finds them by these two alone.
Written = tuple[str, int]


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

    def free(self, written: Iterable[Written]) -> None:
        """Free these bytes. Idempotent: unknown or already freed ones are no error.

        Bytes of the sample under another generation stay: they were captured since. Generation 0 names
        whatever lies there of the sample.
        """

    def written(self) -> list[Written] | None:
        """Everything that lies here, half-written or sealed; None if this store cannot list it.

        Only the producer that owns the store may ask. Where there is no list, the producer frees orphans by
        the intents that the ledger revoked, and a loss is noticed by the reader.
        """

    def usage(self) -> Usage:
        """Bytes are what the store occupies, slack included."""

    def close(self) -> None:
        """Detach. Sealed bytes outlive this process where the medium does."""

    def destroy(self) -> None:
        """Give all memory back, and the folder, if it was given one. Only at the end of a run."""
