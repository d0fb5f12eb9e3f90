"""The contract of a feature store, the data plane: it stores tensors and returns a `SampleRef`'s keys.

A sealed sample is immutable: `put` of a sample and generation that is already sealed returns the sealed
keys and writes nothing. Only `free` frees bytes, and only the control plane decides when (after a durable
checkpoint covers the sample). A crash between `put` and the ledger's commit leaves an orphan, which the
next producer frees.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from paceline.types import FeatureSpec, SampleRef


@dataclass(frozen=True)
class Usage:
    """Resident bytes and samples, and the most bytes that this store will hold.

    `is_current`: False where what other hosts change may show late; then the ledger's count alone decides.
    """

    resident_bytes: int
    resident_samples: int
    budget_bytes: int
    is_current: bool = True


@dataclass(frozen=True)
class Sealed:
    """What `put` returns: everything that a ref needs to find and verify the bytes again.

    `num_bytes`: what the sample takes of the store's budget, slack included. `digest_kind`: the digest's
    algorithm and input. Only the store that computed a digest can verify bytes with it.
    """

    uri: str
    keys: Mapping[str, str]
    specs: Mapping[str, FeatureSpec]
    num_bytes: int
    digest: str
    digest_kind: str = "xxh3_128 of features/codec.py"


# Identifies a sample's bytes: its id, and the byte intent (generation) they were written under.
Written = tuple[str, int]


class FeatureStore(Protocol):
    """Tensors by sample id. Adapters: stores/shm.py, stores/directory.py, stores/mooncake,
    testing/memory_features.py.

    A store that has several samples on their way at a time may also have `get_many(refs)`: of each ref its
    tensors, or the error that `get` would raise. The trainer then reads a step ahead by one call.
    """

    def put(self, sample_id: str, tensors: Mapping[str, Any], *, generation: int = 0) -> Sealed:
        """Copy the tensors in and seal them. Raises StoreFullError, and then holds nothing new.

        `generation`: the byte intent to write under (0: none, the store counts by itself). Bytes of the
        sample of another generation that this process wrote are freed first.
        """

    def get(self, ref: SampleRef) -> dict[str, Any]:
        """Tensors whose bytes match the ref's digest and specs.

        Raises FeatureMissingError (never sealed, or freed) or FeatureCorruptError.
        """

    def free(self, written: Iterable[Written]) -> None:
        """Free these bytes. Idempotent: unknown or already freed ones are no error.

        Bytes of the sample of another generation stay: they were captured since. Generation 0 means any.
        """

    def written(self) -> list[Written] | None:
        """All bytes in the store, half-written or sealed; None if this store cannot list them.

        Only a producer that owns (part of) the store may call it. Bytes that another producer is writing may
        have the id "". Without a list, a producer frees the intents that the ledger revoked, and only the
        reader notices a loss.
        """

    def usage(self) -> Usage:
        """Current usage; bytes include slack."""

    def close(self) -> None:
        """Detach. Sealed bytes outlive this process if the medium does."""

    def destroy(self) -> None:
        """Free all memory, and the folder if there is one. Only at the end of a run."""
