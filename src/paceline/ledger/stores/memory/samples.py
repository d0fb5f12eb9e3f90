"""Samples, their byte intents, acks and features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from paceline.ledger.records import (
    CommittedRef,
    Fence,
    Intent,
    LedgerUsage,
    SampleRecord,
    compacted,
)
from paceline.ledger.refusals import (
    intent_revoked,
    not_covered,
)
from paceline.ledger.stores.memory.rows import AckRow, SampleRow
from paceline.ledger.stores.memory.tasks import Tasks
from paceline.types import SampleRef, ref_to_json


class Samples(Tasks):
    # -- byte intents ----------------------------------------------------------------------

    def reserve(
        self, sizes: Mapping[str, int], *, fence: Fence | None = None, op_id: str | None = None
    ) -> dict[str, int]:
        with self._mutation(fence, op_id) as operation:
            if operation.repeated:
                return dict(operation.result)
            generations = {}
            for sample_id, num_bytes in sizes.items():
                generations[sample_id] = self._next_generation
                self._intents[self._next_generation] = Intent(self._next_generation, sample_id, num_bytes)
                self._next_generation += 1
            return dict(operation.keep(generations))

    def revoke(self, generations: Sequence[int], *, fence: Fence | None = None) -> None:
        with self._mutation(fence):
            for generation in generations:
                self._intents.pop(generation, None)

    def skip_generations(self, through: int, *, fence: Fence) -> Fence:
        with self._mutation(fence):
            self._next_generation = max(self._next_generation, through + 1)
            return replace(fence, generation=self._next_generation)

    def intents(self) -> list[Intent]:
        with self._changed:
            return list(self._intents.values())

    # -- samples ---------------------------------------------------------------------------

    def commit_samples(
        self, refs: Sequence[SampleRef], *, fence: Fence | None = None, op_id: str | None = None
    ) -> list[bool]:
        for ref in refs:
            ref_to_json(ref)  # refuses tensors and whatever a durable store could not carry
        if not refs:
            return []
        with self._mutation(fence, op_id) as operation:
            if operation.repeated:
                return list(operation.result)
            gone = [ref.sample_id for ref in refs if not self._may_commit(ref)]
            if gone:
                raise intent_revoked(gone)
            return list(operation.keep([self._commit(ref) for ref in refs]))

    def _may_commit(self, ref: SampleRef) -> bool:
        intent = self._intents.get(ref.generation)
        if ref.generation == 0 or (intent is not None and intent.sample_id == ref.sample_id):
            return True
        known = self._samples.get(ref.sample_id)
        # Committed before. Of what is released the generation need not be known any more.
        return known is not None and (known.ref.generation == ref.generation or known.state == "released")

    def _commit(self, ref: SampleRef) -> bool:
        self._intents.pop(ref.generation, None)
        known = self._samples.get(ref.sample_id)
        if known is not None and known.state != "lost":
            self._finish_task(ref.source_task_id)
            return False
        if known is not None and known.ref.generation == ref.generation != 0:
            return False
        if known is not None and self._is_durable(ref.sample_id):
            known.state = "released"  # by now durable weights contain it
            self._finish_task(ref.source_task_id, failed_too=True)
            return False
        if known is None:
            self._samples[ref.sample_id] = SampleRow(seq=len(self._samples) + 1, ref=ref)
        else:
            known.ref, known.state, known.resident = ref, "present", True
        self._finish_task(ref.source_task_id, failed_too=True)
        return True

    def is_committed(self, sample_id: str) -> bool:
        with self._changed:
            return sample_id in self._samples

    def get_committed(self, sample_id: str) -> SampleRef | None:
        with self._changed:
            sample = self._samples.get(sample_id)
            return sample.ref if sample else None

    def sample_record(self, sample_id: str) -> SampleRecord | None:
        with self._changed:
            sample, ack = self._samples.get(sample_id), self._acks.get(sample_id)
            if sample is None:
                return None
            return SampleRecord(
                sample_id,
                sample.seq,
                sample.state,
                sample.ref.source_task_id,
                ack.step if ack else sample.quarantine_step,
                ack.durable if ack else False,
                sample.reason,
            )

    def committed_count(self) -> int:
        with self._changed:
            return len(self._samples)

    def all_committed_ids(self) -> list[str]:
        with self._changed:
            return [i for i, _ in self._in_order()]

    def _in_order(self) -> list[tuple[str, SampleRow]]:
        return sorted(self._samples.items(), key=lambda item: item[1].seq)

    def read_committed(self, after_seq: int, limit: int) -> list[CommittedRef]:
        with self._changed:
            samples = [s for _, s in self._in_order()[after_seq : after_seq + limit]]
            return [CommittedRef(s.seq, s.ref, s.state != "lost", s.state == "quarantined") for s in samples]

    # -- acks ------------------------------------------------------------------------------

    def record_train_ack(
        self,
        sample_ids: Sequence[str],
        *,
        global_step: int | None,
        optimizer_durable: bool,
        fence: Fence | None = None,
    ) -> None:
        if not all(isinstance(sample_id, str) for sample_id in sample_ids):
            raise TypeError("sample ids are strings")
        with self._mutation(fence):
            self._ack(sample_ids, global_step, durable=optimizer_durable)

    def _ack(self, sample_ids: Sequence[str], step: int | None, *, durable: bool) -> None:
        for sample_id in sample_ids:
            known = self._acks.get(sample_id)
            if known is None or not known.durable:
                self._acks[sample_id] = AckRow(step, durable)

    def durable_marker(self) -> dict[str, Any]:
        with self._changed:
            durable = any(ack.durable for ack in self._acks.values())
            chosen = {i: ack for i, ack in self._acks.items() if ack.durable == durable}
            steps = [ack.step for ack in chosen.values() if ack.step is not None]
            return {
                "acked": set(chosen),
                "global_step": max(steps, default=None),
                "optimizer_durable": durable,
            }

    # -- features --------------------------------------------------------------------------

    def releasable(self, limit: int) -> list[str]:
        with self._changed:
            return [i for i, s in self._in_order() if s.resident and self._is_covered(i)][:limit]

    def _is_covered(self, sample_id: str) -> bool:
        sample = self._samples[sample_id]
        if sample.state == "quarantined":
            head = max(self._checkpoints, default=-1)
            return sample.quarantine_step is None or sample.quarantine_step <= head
        return self._is_durable(sample_id)

    def _is_durable(self, sample_id: str) -> bool:
        ack = self._acks.get(sample_id)
        return ack is not None and ack.durable

    def begin_release(self, limit: int, *, fence: Fence | None = None) -> dict[str, int]:
        with self._changed:
            self._check_fence(fence)
            return {i: self._samples[i].ref.generation for i in self.releasable(limit)}

    def record_released(self, sample_ids: Sequence[str], *, fence: Fence | None = None) -> None:
        with self._mutation(fence):
            early = [i for i in sample_ids if i not in self._samples or not self._is_covered(i)]
            if early:
                raise not_covered(early)
            for sample_id in sample_ids:
                sample = self._samples[sample_id]
                sample.resident = False
                if sample.state == "present":
                    sample.state = "released"
                if sample.state == "quarantined":
                    sample.ref = compacted(sample.ref)

    def report_lost(self, sample_ids: Sequence[str], *, fence: Fence | None = None) -> None:
        with self._mutation(fence):
            self._lose([i for i in sample_ids if i in self._samples and not self._is_durable(i)])

    def _lose(self, sample_ids: Sequence[str]) -> None:
        for sample_id in sample_ids:
            sample = self._samples[sample_id]
            sample.resident = False
            if sample.state == "quarantined":
                continue
            sample.state = "lost"
            task = self._tasks.get(sample.ref.source_task_id or "")
            if task is not None and task.state == "done":
                task.state, task.holder = "pending", ""

    def present_ids(self) -> list[str]:
        return list(self.present_generations())

    def present_generations(self) -> dict[str, int]:
        with self._changed:
            return {i: s.ref.generation for i, s in self._in_order() if s.resident}

    def lost_ids(self) -> list[str]:
        with self._changed:
            return [i for i, s in self._in_order() if s.state == "lost"]

    def usage(self) -> LedgerUsage:
        with self._changed:
            resident = {i: s.ref.estimated_bytes for i, s in self._samples.items() if s.resident}
            provisional = [
                size for i, size in resident.items() if i in self._acks and not self._is_durable(i)
            ]
            untrained = [i for i, s in self._samples.items() if s.state in ("present", "lost")]
            return LedgerUsage(
                len(resident),
                sum(resident.values()),
                len(provisional),
                sum(provisional),
                len([i for i in untrained if i not in self._acks]),
                len(self._intents),
                sum(intent.num_bytes for intent in self._intents.values()),
            )

    def compact(self, *, fence: Fence | None = None) -> int:
        with self._mutation(fence):
            self._folded_step = max(self._folded_step, min(self._checkpoints, default=0))
            folded = 0
            for sample_id, sample in self._samples.items():
                ack, small = self._acks.get(sample_id), compacted(sample.ref)
                old = ack is not None and ack.step is not None and ack.step <= self._folded_step
                if sample.state == "released" and old and sample.ref != small:
                    sample.ref = replace(small, generation=sample.ref.generation)
                    folded += 1
            return folded
