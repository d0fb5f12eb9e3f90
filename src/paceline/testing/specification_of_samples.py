"""The specification's samples: the bytes in the feature store, their owners, and the log."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from paceline.ledger.records import (
    Budget,
    Entry,
    Fence,
    Intent,
    Order,
    Ownership,
    Page,
    PromptCounts,
    SampleRecord,
    Snapshot,
    State,
    Usage,
    compacted,
)
from paceline.ledger.refusals import (
    fenced,
    intent_revoked,
    not_covered,
    other_place,
)
from paceline.testing.specification import Role, Sample, SpecificationOfPrompts, worker_of
from paceline.types import SampleRef, ref_to_json


class SpecificationOfSamples(SpecificationOfPrompts):
    # -- bytes and samples -----------------------------------------------------------------

    def reserve(
        self, fence: Fence | None, op: int | None, wanted: Sequence[Intent], budget: Budget | None
    ) -> list[int] | None:
        with self._mutation(fence, op) as operation:
            if operation.repeated:
                return list(operation.result)
            num_bytes = sum(intent.num_bytes for intent in wanted)
            if not self._has_room(budget, len(wanted), num_bytes):
                operation.changes = False
                return None
            first = self.rows.next_generation
            for generation, intent in enumerate(wanted, start=first):
                self.rows.intents[generation] = replace(
                    intent, generation=generation, worker=worker_of(fence)
                )
            self.rows.next_generation += len(wanted)
            return list(operation.keep(list(range(first, self.rows.next_generation))))

    def _has_room(self, budget: Budget | None, num_samples: int, num_bytes: int) -> bool:
        return budget is None or self._usage().has_room(budget, num_samples, num_bytes)

    def swept(
        self, fence: Fence | None, op: int | None, generations: Sequence[int], skip_through: int = 0
    ) -> None:
        with self._mutation(fence, op) as operation:
            if not operation.repeated:
                for generation in generations:
                    intent = self.rows.intents.get(generation)
                    mine = intent is not None and fence is not None and intent.worker == fence.worker
                    if intent is not None and (intent.revoked or mine):
                        del self.rows.intents[generation]
                self.rows.next_generation = max(self.rows.next_generation, skip_through + 1)

    def revoked(self) -> list[Intent]:
        with self._changed:
            return [intent for intent in self.rows.intents.values() if intent.revoked]

    def ownership(self) -> Ownership:
        with self._changed:
            present = {s.ref.sample_id: s.ref.generation for s in self._in_order() if s.resident}
            promised = {g: i.sample_id for g, i in self.rows.intents.items() if not i.revoked}
            return Ownership(present, promised, self.rows.next_generation)

    def commit(self, fence: Fence | None, op: int | None, refs: Sequence[SampleRef]) -> list[bool]:
        for ref in refs:
            ref_to_json(ref)  # refuses tensors and whatever a durable store could not carry
        if not refs:
            return []
        with self._mutation(fence, op) as operation:
            if operation.repeated:
                return list(operation.result)
            self._settle_order(Order.ARRIVAL)  # unless a producer did before
            gone = [ref.sample_id for ref in refs if not self._may_commit(ref, worker_of(fence))]
            if gone:
                raise intent_revoked(gone)
            for ref in refs:
                self._check_place(ref, refs)
            return list(operation.keep([self._commit(ref) for ref in refs]))

    def _may_commit(self, ref: SampleRef, worker: str) -> bool:
        if ref.generation == 0 and self.rows.order == Order.ARRIVAL:
            return True
        intent, known = self.rows.intents.get(ref.generation), self.rows.samples.get(ref.sample_id)
        mine = intent is not None and (intent.sample_id, intent.worker) == (ref.sample_id, worker)
        if mine and intent is not None and not intent.revoked:
            return True
        if known is not None and (known.ref.generation == ref.generation or known.state == State.RELEASED):
            return True  # committed before
        return self._is_archived(ref)

    def _is_archived(self, ref: SampleRef) -> bool:
        if self.rows.order == Order.ORDINAL:
            return ref.ordinal is not None and ref.ordinal < self.rows.archived_place
        return ref.sample_id in self.rows.archived_ids

    def _is_hole(self, ref: SampleRef) -> bool:
        prompt = self.rows.prompts.get(-1 if ref.ordinal is None else ref.ordinal)
        return self.rows.order == Order.ORDINAL and prompt is not None and prompt.state == "failed"

    def _check_place(self, ref: SampleRef, refs: Sequence[SampleRef]) -> None:
        """Before anything is changed: a dictionary does not roll back."""
        rows, known = self.rows, self.rows.samples.get(ref.sample_id)
        in_order = rows.order == Order.ORDINAL
        if known is not None:
            if in_order and ref.ordinal != known.ordinal:
                raise other_place(ref.sample_id, ref.ordinal, f"it is there for prompt {known.ordinal}")
            return
        if self._is_archived(ref) or self._is_hole(ref):
            return
        if ref.ordinal is not None and ref.ordinal >= rows.num_prompts:
            raise other_place(ref.sample_id, ref.ordinal, f"the run has {rows.num_prompts} prompts")
        if in_order and ref.ordinal is None:
            raise other_place(ref.sample_id, None, "it does not name its prompt, whose ordinal is its place")
        others = {s.place for s in rows.samples.values()}
        others |= {r.ordinal for r in refs if r.sample_id != ref.sample_id and r.ordinal is not None}
        if in_order and ref.ordinal in others:
            raise other_place(ref.sample_id, ref.ordinal, "another sample is there")
        if in_order and any(r.sample_id == ref.sample_id and r.ordinal != ref.ordinal for r in refs):
            raise other_place(ref.sample_id, ref.ordinal, "it is there for another prompt")

    def _commit(self, ref: SampleRef) -> bool:
        intent = self.rows.intents.get(ref.generation)
        if intent is not None and not intent.revoked:
            del self.rows.intents[ref.generation]
        known = self.rows.samples.get(ref.sample_id)
        if known is None:
            if self._is_archived(ref) or self._is_hole(ref):
                return False
            place = self.rows.committed if self.rows.order == Order.ARRIVAL else ref.ordinal
            assert place is not None, "checked before"
            self._finish_prompt(ref.ordinal)
            self.rows.samples[ref.sample_id] = Sample(place, ref, ref.ordinal)
            self.rows.committed += 1
            return True
        if known.state == State.LOST and known.ref.generation == ref.generation != 0:
            return False  # those very bytes are the lost ones
        self._finish_prompt(known.ordinal)
        if known.state != State.LOST:
            return False
        if known.acked == 2:
            known.state = State.RELEASED  # by now durable weights contain it
            return False
        known.ref, known.state, known.resident = ref, State.PRESENT, True
        return True

    def report_lost(self, fence: Fence | None, op: int | None, sample_ids: Sequence[str]) -> None:
        with self._mutation(fence, op) as operation:
            if not operation.repeated:
                known = [self.rows.samples[i] for i in sample_ids if i in self.rows.samples]
                self._lose([sample for sample in known if sample.acked < 2])

    def _lose(self, samples: Sequence[Sample]) -> None:
        for sample in samples:
            sample.resident = False
            if sample.state != State.QUARANTINED:
                sample.state = State.LOST
                self._reopen_prompt(sample.ordinal)

    def releasable(self, fence: Fence | None, limit: int) -> dict[str, int]:
        with self._changed:
            if fence is not None and self.rows.roles.get(fence.role, Role()).epoch != fence.epoch:
                raise fenced(fence, self.rows.roles.get(fence.role, Role()).epoch)
            covered = [s for s in self._in_order() if s.resident and self._is_covered(s)]
            return {s.ref.sample_id: s.ref.generation for s in covered[:limit]}

    def _is_covered(self, sample: Sample) -> bool:
        if sample.state == State.QUARANTINED:
            return sample.step is None or sample.step <= max(self.rows.checkpoints, default=-1)
        return sample.acked == 2

    def released(self, fence: Fence | None, op: int | None, sample_ids: Sequence[str]) -> None:
        with self._mutation(fence, op) as operation:
            if operation.repeated:
                return
            known = [self.rows.samples[i] for i in sample_ids if i in self.rows.samples]
            early = [i for i in sample_ids if i not in self.rows.samples and i not in self.rows.archived_ids]
            early += [s.ref.sample_id for s in known if not self._is_covered(s)]
            if early:
                raise not_covered(early)
            for sample in known:
                sample.resident = False
                if sample.state == State.PRESENT:
                    sample.state = State.RELEASED
                if sample.state == State.QUARANTINED:
                    sample.ref = compacted(sample.ref)

    # -- reading ---------------------------------------------------------------------------

    def _in_order(self) -> list[Sample]:
        return sorted(self.rows.samples.values(), key=lambda sample: sample.place)

    def read(self, start: int, stop: int) -> Page:
        with self._changed:
            settled = self._settled()
            found = [s for s in self._in_order() if start <= s.place < min(stop, settled)]
            return Page(tuple(Entry(s.place, s.ref, s.state) for s in found), settled, self.rows.closed)

    def find(self, sample_ids: Sequence[str]) -> dict[str, SampleRecord]:
        with self._changed:
            return {s.ref.sample_id: _record(s) for s in self._in_order() if s.ref.sample_id in sample_ids}

    def samples(self, state: State, limit: int | None = None) -> list[SampleRecord]:
        with self._changed:
            return [_record(sample) for sample in self._in_order() if sample.state == state][:limit]

    def _usage(self) -> Usage:
        samples, intents = self.rows.samples.values(), self.rows.intents.values()
        resident = [s.ref.estimated_bytes for s in samples if s.resident]
        provisional = [s.ref.estimated_bytes for s in samples if s.resident and s.acked == 1]
        waiting = [s for s in samples if s.acked == 0 and s.state in (State.PRESENT, State.LOST)]
        sizes = (len(resident), sum(resident), len(provisional), sum(provisional))
        return Usage(*sizes, len(waiting), len(intents), sum(i.num_bytes for i in intents))

    def _prompt_counts(self) -> PromptCounts:
        rows = self.rows
        states = [prompt.state for prompt in rows.prompts.values()]
        return PromptCounts(
            pending=states.count("pending") + max(0, rows.num_prompts - rows.next_ordinal),
            leased=states.count("leased"),
            done=rows.next_ordinal - len(states),
            failed=states.count("failed"),
            again=sum(p.again and p.state != "failed" for p in rows.prompts.values()),
        )

    def snapshot(self) -> Snapshot:
        with self._changed:
            rows = self.rows
            states = [sample.state for sample in rows.samples.values()]
            return Snapshot(
                lsn=rows.lsn,
                order=rows.order,
                prompts=self._prompt_counts(),
                committed=rows.committed,
                settled=self._settled(),
                closed=rows.closed,
                usage=self._usage(),
                lost=states.count(State.LOST),
                quarantined=states.count(State.QUARANTINED),
                trained_step=rows.trained_step,
                checkpoints=tuple(rows.checkpoints[step] for step in sorted(rows.checkpoints)),
                epochs={name: role.epoch for name, role in rows.roles.items()},
                facts=self.facts(),
                next_generation=rows.next_generation,
                archived_place=rows.archived_place,
            )

    # -- facts -----------------------------------------------------------------------------

    def set_facts(
        self, fence: Fence | None, op: int | None, facts: Mapping[str, Any], *, settle: bool = False
    ) -> dict[str, Any]:
        encoded = {key: json.dumps(value) for key, value in facts.items()}
        with self._mutation(fence, op) as operation:
            if operation.repeated:
                return dict(operation.result)
            standing = {k: self.facts()[k] for k in facts if k in self.rows.facts} if settle else {}
            if standing:
                operation.changes = False
                return standing
            self.rows.facts.update(encoded)
            return dict(operation.keep({key: json.loads(text) for key, text in encoded.items()}))

    def facts(self) -> dict[str, Any]:
        with self._changed:
            return {key: json.loads(value) for key, value in self.rows.facts.items()}

    def lsn(self) -> int:
        with self._changed:
            return self.rows.lsn

    def wait(self, seen_lsn: int, timeout_s: float) -> int:
        with self._changed:
            self._changed.wait_for(lambda: self.rows.lsn != seen_lsn, timeout_s)
            return self.rows.lsn

    def close(self) -> None:
        """Nothing to give back; the contents stay readable until the object dies."""


def _record(sample: Sample) -> SampleRecord:
    return SampleRecord(
        sample.ref.sample_id,
        sample.place,
        sample.state,
        sample.ref,
        sample.step,
        sample.acked == 2,
        sample.reason,
        sample.resident,
    )
