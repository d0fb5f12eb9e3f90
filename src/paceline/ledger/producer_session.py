"""ProducerSession: every ledger call of a producer, under its own epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from paceline.ledger.facts import producer_fact
from paceline.ledger.ledger import Ledger
from paceline.ledger.records import (
    Budget,
    Lease,
    Order,
    Ownership,
    SampleRecord,
    SourceBlock,
    State,
    Wanted,
    producer_role,
)
from paceline.ledger.session import Session, repeated
from paceline.types import SampleRef

ATTEMPT_MAX = 5
WORKER = "0"  # the name of a run's only producer


class ProducerSession(Session):
    def __init__(
        self,
        ledger: Ledger,
        run_id: str,
        worker: str = WORKER,
        *,
        order: Order = Order.ORDINAL,
        attempt_max: int = ATTEMPT_MAX,
    ) -> None:
        """`worker`: a name that no other live producer of the run has."""
        super().__init__(ledger, run_id, producer_role(worker), order)
        self.worker = worker
        self.attempt_max = attempt_max
        self.leased: set[int] = set()  # ordinals of the leases that this session holds

    def acquire(self) -> int:
        self.leased = set()
        return super().acquire()

    # -- the source and its leases ---------------------------------------------------------

    def extend(self, blocks: Sequence[SourceBlock]) -> int:
        """Register the prompts; returns how many were new. Raises ConfigError if a known block differs."""
        return self._change(self.ledger.extend, list(blocks))

    def source_blocks(self, first: int = 0, limit: int | None = None) -> list[SourceBlock]:
        return self.ledger.source_blocks(first, limit)

    def lease(self, limit: int, group_size: int | None = None, below: int | None = None) -> list[Lease]:
        """Lease up to `limit` pending prompts of one capture group, by ordinal; [] if there is none.

        `below`: only prompts of lower ordinals.
        """
        leases = self._change(self.ledger.lease, limit, group_size, below)
        self.leased.update(lease.ordinal for lease in leases)
        return leases

    def fail(self, ordinals: Sequence[int], reason: str, *, retryable: bool = True) -> list[int]:
        """End leases after a failure, with the bytes promised for them; returns what failed for good.

        Retryable prompts are pending again until `attempt_max` attempts; others fail at once.
        """
        limit = self.attempt_max if retryable else None
        failed = self._change(self.ledger.give_back, list(ordinals), failure=reason, attempt_max=limit)
        self.leased.difference_update(ordinals)
        return failed

    def give_back(self, ordinals: Sequence[int]) -> None:
        """End leases without a failure, with the bytes promised for them."""
        self._change(self.ledger.give_back, list(ordinals))
        self.leased.difference_update(ordinals)

    def failed(self, start: int, stop: int) -> Mapping[int, str]:
        return self.ledger.failed(start, stop)

    def end_stream(self) -> bool:
        """End the stream, unless a prompt is pending or leased; returns whether it is ended."""
        return self._change(self.ledger.end_stream, True)

    # -- the other producers -----------------------------------------------------------------

    def tell(self, told: Mapping[str, Any] | None) -> None:
        """Say where this producer is and what it holds; None: it leaves. Any thread may call this.

        It takes no operation number: to say it twice does no harm.
        """
        repeated(self.ledger.set_facts, self.fence, {producer_fact(self.worker): told})

    def take_from(self, worker: str) -> None:
        """Take another producer for dead: its leases return, and whatever it still does is refused."""
        self.ledger.acquire(producer_role(worker), f"taken over by producer {self.worker}")
        self.set_facts({producer_fact(worker): None})

    # -- bytes and samples -----------------------------------------------------------------

    def reserve(self, wanted: Sequence[Wanted], budget: Budget | None = None) -> list[int] | None:
        """Reserve the bytes of samples about to be written; returns their generations, None without room."""
        return self._change(self.ledger.reserve, list(wanted), budget)

    def commit(self, refs: Sequence[SampleRef]) -> list[SampleRef]:
        """Commit captured samples in one transaction; returns the refs that were new."""
        if not refs:
            return []
        fresh = self._change(self.ledger.commit, list(refs))
        self.leased.difference_update(ref.ordinal for ref in refs if ref.ordinal is not None)
        return [ref for ref, is_new in zip(refs, fresh, strict=True) if is_new]

    def present(self) -> list[SampleRecord]:
        """Samples whose bytes lie in the feature store and that no checkpoint covers yet, by place."""
        return list(self.ledger.find(state=State.PRESENT).values())

    def lost(self, limit: int | None = None) -> list[SampleRecord]:
        """Samples that wait to be captured again, by place."""
        return list(self.ledger.find(state=State.LOST, limit=limit).values())

    # -- what other workers left ------------------------------------------------------------

    def ownership(self) -> Ownership:
        """Which bytes have an owner. To find the others, list the feature store first and then call this."""
        return self.ledger.ownership()

    def revoked(self) -> list[tuple[str, int]]:
        """Sample id and generation of revoked intents, whose bytes may still exist."""
        revoked = self.ledger.ownership().revoked
        return [(sample_id, generation) for generation, sample_id in revoked.items()]

    def swept(self, generations: Sequence[int], *, skip_through: int = 0) -> None:
        """Record that these bytes are gone or were never written. `skip_through`: see `Ledger.swept`."""
        self._change(self.ledger.swept, list(generations), skip_through)
