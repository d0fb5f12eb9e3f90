"""The specification's samples: the bytes in the feature store, their owners, and the log."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from paceline.ledger.records import (
    Budget,
    Entry,
    Order,
    Ownership,
    Page,
    PromptCounts,
    SampleRecord,
    Snapshot,
    State,
    Usage,
    Wanted,
    compacted,
)
from paceline.ledger.refusals import intent_revoked, not_covered, other_place
from paceline.testing.specification import Intent, Rows, Sample, SpecificationOfPrompts, change
from paceline.types import SampleRef, ref_to_json


class SpecificationOfSamples(SpecificationOfPrompts):
    _counted: tuple[Rows | None, int, Snapshot | None] = (None, 0, None)

    # -- bytes and samples -----------------------------------------------------------------

    @change
    def reserve(self, wanted: Sequence[Wanted], budget: Budget | None) -> list[int] | None:
        num_bytes = sum(sample.num_bytes for sample in wanted)
        if budget is not None and not self._usage().has_room(budget, len(wanted), num_bytes):
            return self._unchanged(None)
        first = self.rows.next_generation
        for generation, sample in enumerate(wanted, start=first):
            self.rows.intents[generation] = Intent(
                sample.sample_id, sample.num_bytes, sample.ordinal, self._worker
            )
        self.rows.next_generation += len(wanted)
        return list(range(first, self.rows.next_generation))

    @change
    def swept(self, generations: Sequence[int], skip_through: int = 0) -> None:
        intents = self.rows.intents
        for generation in generations:
            intent = intents.get(generation)
            if intent is not None and (intent.revoked or intent.worker == (self._worker or None)):
                del intents[generation]
        self.rows.next_generation = max(self.rows.next_generation, skip_through + 1)

    def ownership(self) -> Ownership:
        with self._changed:
            present = {s.ref.sample_id: s.ref.generation for s in self._in_order() if s.resident}
            promised = {g: i.sample_id for g, i in self.rows.intents.items() if not i.revoked}
            revoked = {g: i.sample_id for g, i in self.rows.intents.items() if i.revoked}
            return Ownership(present, promised, revoked, self.rows.next_generation)

    @change
    def commit(self, refs: Sequence[SampleRef]) -> list[bool]:
        for ref in refs:
            ref_to_json(ref)  # refuses tensors and whatever a durable store could not carry
        if not refs:
            return self._unchanged([])
        self._settle_order(Order.ARRIVAL)  # unless a producer did before
        gone = [ref.sample_id for ref in refs if not self._may_commit(ref)]
        if gone:
            raise intent_revoked(gone)
        for ref in refs:
            self._check_place(ref, refs)
        return [self._commit(ref) for ref in refs]

    def _may_commit(self, ref: SampleRef) -> bool:
        if ref.generation == 0 and self.rows.order == Order.ARRIVAL:
            return True
        intent, known = self.rows.intents.get(ref.generation), self.rows.samples.get(ref.sample_id)
        mine = intent is not None and (intent.sample_id, intent.worker) == (ref.sample_id, self._worker)
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

    @change
    def report_lost(self, sample_ids: Sequence[str]) -> None:
        known = [self.rows.samples[i] for i in sample_ids if i in self.rows.samples]
        self._lose([sample for sample in known if sample.acked < 2])

    def _lose(self, samples: Sequence[Sample]) -> None:
        for sample in samples:
            sample.resident = False
            if sample.state != State.QUARANTINED:
                sample.state = State.LOST
                self._reopen_prompt(sample.ordinal)

    @change
    def release(self, freed: Sequence[str], limit: int) -> dict[str, int]:
        if freed:
            self._record_freed(freed)
        covered = [s for s in self._in_order() if s.resident and self._is_covered(s)]
        may_go = {s.ref.sample_id: s.ref.generation for s in covered[:limit]}
        return may_go if freed else self._unchanged(may_go)

    def _is_covered(self, sample: Sample) -> bool:
        if sample.state == State.QUARANTINED:
            return sample.step is None or sample.step <= max(self.rows.checkpoints, default=-1)
        return sample.acked == 2

    def _record_freed(self, sample_ids: Sequence[str]) -> None:
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

    def find(
        self,
        sample_ids: Sequence[str] | None = None,
        *,
        state: State | None = None,
        limit: int | None = None,
    ) -> dict[str, SampleRecord]:
        with self._changed:
            found = [
                _record(sample)
                for sample in self._in_order()
                if (sample_ids is None or sample.ref.sample_id in sample_ids)
                and (state is None or sample.state == state)
            ]
            return {record.sample_id: record for record in found[:limit]}

    def _usage(self) -> Usage:
        samples, intents = self.rows.samples.values(), self.rows.intents.values()
        resident = [s.ref.estimated_bytes for s in samples if s.resident]
        provisional = sum(s.resident and s.acked == 1 for s in samples)
        waiting = sum(s.acked == 0 and s.state in (State.PRESENT, State.LOST) for s in samples)
        promised = sum(i.num_bytes for i in intents)
        return Usage(len(resident), sum(resident), provisional, waiting, len(intents), promised)

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
        """Counted once for each state of the rows, because a simulation asks at every turn."""
        with self._changed:
            rows, lsn, snapshot = self._counted
            if rows is not self.rows or lsn != self.rows.lsn:
                snapshot = self._count()
                self._counted = self.rows, self.rows.lsn, snapshot
            assert snapshot is not None
            return snapshot

    def _count(self) -> Snapshot:
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
            facts={key: msgspec.json.decode(value) for key, value in rows.facts.items()},
            next_generation=rows.next_generation,
            archived_place=rows.archived_place,
        )

    # -- facts -----------------------------------------------------------------------------

    @change
    def set_facts(self, facts: Mapping[str, Any], *, settle: bool = False) -> dict[str, Any]:
        encoded = {key: json.dumps(value) for key, value in facts.items()}
        standing = {k: self.facts()[k] for k in facts if k in self.rows.facts} if settle else {}
        if standing:
            return self._unchanged(standing)
        self.rows.facts.update(encoded)
        return {key: json.loads(text) for key, text in encoded.items()}

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
