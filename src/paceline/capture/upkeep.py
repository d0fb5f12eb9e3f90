"""What a producer frees: bytes that belong to no sample, and samples that must make room for others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from paceline.capture.backpressure import Backpressure
from paceline.features.store import FeatureStore, Written
from paceline.ledger.producer_session import ProducerSession
from paceline.ledger.records import Ownership, State
from paceline.types import SampleRef


class Upkeep:
    """Keeps ledger and feature store in step."""

    def __init__(
        self,
        session: ProducerSession,
        features: FeatureStore,
        backpressure: Backpressure,
        report: Callable[..., None],
    ) -> None:
        self._session = session
        self._features = features
        self._backpressure = backpressure
        self._report = report

    def compare(self) -> tuple[int, list[str]]:
        """Free orphans (bytes of no sample and no worker) and report lost samples; their number, and the ids.

        The store is listed first and the ledger read second, so listed bytes whose generation the ledger
        gave out are orphans if they belong to no sample and are reserved for no worker. A generation that
        the ledger never gave out means that the ledger was restored from an older copy: the ledger skips
        past that generation, and its bytes are orphans too. In a store that keeps no list, only revoked bytes
        can be freed.
        """
        written = self._features.written()
        owned = self._session.ownership()
        if written is None:
            return self.free_revoked(), []
        newest = max((generation for _, generation in written), default=0)
        if newest >= owned.next_generation:
            self._session.swept([], skip_through=newest)
        keep = owned.generations
        orphans = [
            (sample_id, generation)
            for sample_id, generation in written
            if generation not in keep and owned.present.get(sample_id) != 0
        ]
        self._features.free(orphans)
        self.free_revoked()
        # After a reboot the ledger lists samples whose memory is gone; they are reported together.
        gone = self._without_bytes(owned, written)
        gone = self._without_bytes(owned, self._features.written() or []) if gone else []
        if gone:  # listing takes long in a folder of another host, and others capture meanwhile
            now = self._session.ownership().present
            gone = [sample_id for sample_id in gone if now.get(sample_id) == owned.present[sample_id]]
        if gone:
            self._session.report_lost(gone)
        return len(orphans), gone

    @staticmethod
    def _without_bytes(owned: Ownership, written: Sequence[Written]) -> list[str]:
        """Samples that the ledger lists as present and the store does not hold."""
        there = set(written)
        names = {sample_id for sample_id, _ in written}
        return [
            sample_id
            for sample_id, generation in owned.present.items()
            if (sample_id, generation) not in there and (generation or sample_id not in names)
        ]

    def free_revoked(self) -> int:
        """Free bytes that were reserved for dead workers; the number of revoked reservations."""
        revoked = self._session.revoked()
        if revoked:
            self._features.free(revoked)
            self._session.swept([generation for _, generation in revoked])
        return len(revoked)

    def before_wait(self) -> None:
        self.free_revoked()
        self._make_room()

    def _make_room(self) -> None:
        """Free later samples if they take the room of one that the consumer waits for.

        That is a lost sample, or the next of the log while other workers have captured samples behind it. The
        last sample is freed first, until a group fits; the producer captures the freed samples again later.
        While other workers hold prompts, it may be one of those, and what they capture needs no more room.
        While more samples lie before it than the consumer collects, the consumer itself makes room.
        """
        now = self._session.snapshot()
        if now.prompts.leased:
            return
        lost, settled = self._session.lost(1), now.settled
        needed = min([settled, *(record.place for record in lost)])
        present = self._session.present()
        behind = [record for record in present if record.place > needed and not record.durable]
        if self._backpressure.consumer_can_go_on([record for record in present if record.place < needed]):
            return
        if not behind or (not lost and behind[-1].place < settled) or self._backpressure.has_credit():
            return
        given_up = 0
        for record in reversed(behind):
            self._session.report_lost([record.sample_id])
            found = self._session.find([record.sample_id]).get(record.sample_id)
            if found is None or found.state != State.LOST:
                continue  # durable weights contain it by now: the next release frees its bytes
            self._features.free([(record.sample_id, record.ref.generation)])
            given_up += 1
            if self._backpressure.has_credit():
                break
        self._report("made_room", given_up=given_up, needed=needed)

    def free_unwanted(self, refs: Sequence[SampleRef], fresh: Sequence[SampleRef]) -> None:
        """Free bytes that the ledger refused because the sample was settled while they were written."""
        known = self._session.find([ref.sample_id for ref in refs])
        for ref in refs:
            record = known.get(ref.sample_id)
            if ref not in fresh and (record is None or record.ref.generation != ref.generation):
                self._features.free([(ref.sample_id, ref.generation)])
