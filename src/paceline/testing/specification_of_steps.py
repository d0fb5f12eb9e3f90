"""The specification's steps and checkpoints: they decide which weights survive."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from paceline.ledger.records import (
    BegunStep,
    CheckpointRecord,
    Order,
    State,
    StepAck,
    StepPlan,
    TrainedSample,
    TrainedStep,
    bare_ref,
    chain_of,
    order_of,
)
from paceline.ledger.refusals import (
    behind_head,
    contradicts,
    history_is_archived,
    out_of_turn,
    passed_over,
)
from paceline.testing.specification import Sample, change
from paceline.testing.specification_of_samples import SpecificationOfSamples


class SpecificationLedger(SpecificationOfSamples):
    archive_from = 4096  # how many samples or steps must be ready before any is archived

    # -- step plans ------------------------------------------------------------------------

    @change
    def plan(self, plan: StepPlan | None, ack: StepAck | None = None) -> BegunStep | None:
        rows = self.rows
        if ack is not None:
            self._check_ack(ack)
        if plan is not None and plan.step <= rows.archived_step:
            raise history_is_archived(plan.step, rows.archived_step)
        if ack is not None:
            self._take_ack(ack)
        rows.started_step = None if plan is None else plan.step
        if plan is None:
            return None
        stored = rows.plans.setdefault(plan.step, plan)
        if plan.rev > stored.rev and plan.step > rows.trained_step:
            stored = rows.plans[plan.step] = plan
            rows.deaths.pop(plan.step, None)
        return BegunStep(stored, rows.deaths.get(plan.step, 0))

    def _check_ack(self, ack: StepAck) -> None:
        plan = self.rows.plans.get(ack.step)
        if ack.step != self.rows.trained_step + 1 or plan is None or plan.rev != ack.rev:
            raise out_of_turn(ack, self.rows.trained_step, plan)

    def _take_ack(self, ack: StepAck) -> None:
        for sample_id in ack.finished:
            sample = self.rows.samples.get(sample_id)
            if sample is not None and sample.acked < 2:
                sample.acked, sample.step = 1, ack.step
        self.rows.trained_step = ack.step
        self.rows.deaths.pop(ack.step, None)

    # -- checkpoints -----------------------------------------------------------------------

    def _head(self) -> CheckpointRecord | None:
        return self.rows.checkpoints[max(self.rows.checkpoints)] if self.rows.checkpoints else None

    @change
    def head(self, checkpoint: CheckpointRecord, lineage: Sequence[TrainedStep] | None = None) -> None:
        head, rows = self._head(), self.rows
        if head == checkpoint:
            return self._unchanged(None)
        if head is not None and checkpoint.step <= head.step:
            raise behind_head(checkpoint.step, head.step)
        if lineage is not None:
            self._adopt(checkpoint, lineage)
            rows.trained_step = checkpoint.step
        else:
            first = head.step + 1 if head else 1
            plans = [rows.plans.get(step) for step in range(first, checkpoint.step + 1)]
            known = [plan for plan in plans if plan is not None]
            before = head.chain if head else ""
            if len(known) < len(plans) or chain_of(before, known) != checkpoint.chain:
                raise contradicts(checkpoint, "its lineage is not that of the plans on record")
        rows.checkpoints[checkpoint.step] = checkpoint
        rows.trained_step = max(rows.trained_step, checkpoint.step)
        for sample in rows.samples.values():
            if sample.acked == 1 and sample.step is not None and sample.step <= checkpoint.step:
                sample.acked = 2
        return None

    @change
    def fall_back(self, step: int) -> list[str]:
        rows = self.rows
        if step < rows.archived_step:
            raise history_is_archived(step, rows.archived_step)
        rows.checkpoints = {s: c for s, c in rows.checkpoints.items() if s <= step}
        undone = [s for s in self._in_order() if s.acked and s.step is not None and s.step > step]
        lost = [sample for sample in undone if sample.state == State.RELEASED]
        for sample in undone:
            sample.acked, sample.step = 0, None
        self._lose(lost)
        rows.trained_step = min(rows.trained_step, step)
        return [sample.ref.sample_id for sample in lost]

    @change
    def quarantine(self, sample_ids: Sequence[str], *, step: int | None, reason: str) -> None:
        for sample_id in sample_ids:
            sample = self.rows.samples.get(sample_id)
            if sample is None or sample.acked == 2 or sample.state not in (State.PRESENT, State.LOST):
                continue
            sample.state, sample.reason, sample.step, sample.acked = State.QUARANTINED, reason, step, 0
            prompt = self.rows.prompts.get(-1 if sample.ordinal is None else sample.ordinal)
            if prompt is not None and prompt.again and prompt.state == "pending":
                del self.rows.prompts[sample.ordinal or 0]

    # -- rolling forward -------------------------------------------------------------------

    def _adopt(self, checkpoint: CheckpointRecord, lineage: Sequence[TrainedStep]) -> None:
        self._check_lineage(checkpoint, lineage)
        rows = self.rows
        visits = {s.sample_id: s for trained in lineage for s in trained.samples}
        unknown = sorted((s for i, s in visits.items() if i not in rows.samples), key=lambda s: s.place)
        following = list(range(rows.committed, rows.committed + len(unknown)))
        if visits:
            rows.order = rows.order or order_of(visits.values())
        if rows.order == Order.ARRIVAL and [s.place for s in unknown] != following:
            raise contradicts(checkpoint, "samples before those it trained are unknown here")
        for sample in unknown:  # lost, until its last visit says otherwise
            ref = bare_ref(sample.sample_id, sample.ordinal)
            rows.samples[sample.sample_id] = Sample(
                sample.place, ref, sample.ordinal, State.LOST, resident=False
            )
            rows.committed += 1
            self._reopen_prompt(sample.ordinal)
        self._undo_provisional_acks()
        for trained in lineage:
            rows.plans[trained.step] = trained.plan
            rows.deaths.pop(trained.step, None)
            for sample in trained.samples:
                if sample.finished:
                    self._adopt_last_visit(sample, trained.step)
        if visits and rows.order == Order.ORDINAL:
            last = max(sample.place for sample in visits.values())
            self._pass_over(last)
            for ordinal, prompt in rows.prompts.items():
                if ordinal <= last and prompt.state != "failed" and not prompt.again:
                    prompt.state, prompt.worker = "failed", ""
                    prompt.reason = f"{ordinal}: {passed_over(checkpoint.name)}"

    def _adopt_last_visit(self, sample: TrainedSample, step: int) -> None:
        known = self.rows.samples[sample.sample_id]
        if known.acked < 2:
            known.acked, known.step = 2, step
        if known.state == State.LOST:
            known.state = State.RELEASED
            self._finish_prompt(sample.ordinal)

    def _check_lineage(self, checkpoint: CheckpointRecord, lineage: Sequence[TrainedStep]) -> None:
        head = self._head()
        first = max(0, head.step if head else 0) + 1
        if [trained.step for trained in lineage] != list(range(first, checkpoint.step + 1)):
            raise contradicts(checkpoint, f"its steps do not follow the head at step {first - 1}")
        if chain_of(head.chain if head else "", [trained.plan for trained in lineage]) != checkpoint.chain:
            raise contradicts(checkpoint, "its chain does not continue that of the head")
        at = {sample.place: i for i, sample in self.rows.samples.items()}
        places = {i: sample.place for i, sample in self.rows.samples.items()}
        done = {i for i, sample in self.rows.samples.items() if sample.acked == 2}
        for trained in lineage:
            on_record = self.rows.plans.get(trained.step)
            if on_record is not None and trained.rev > on_record.rev:
                on_record = None  # a revision that the ledger has forgotten
            if on_record is not None and on_record.digest != trained.plan.digest:
                raise contradicts(checkpoint, f"step {trained.step} was planned otherwise")
            for sample in trained.samples:
                known = self.rows.samples.get(sample.sample_id)
                if known is None:
                    self._check_unknown(checkpoint, sample)
                elif on_record is None and known.state == State.QUARANTINED:
                    raise contradicts(checkpoint, f"{sample.sample_id} is quarantined")
                if sample.sample_id in done:
                    raise contradicts(checkpoint, f"{sample.sample_id} was trained for the last time before")
                i, place = sample.sample_id, sample.place
                if at.setdefault(place, i) != i or places.setdefault(i, place) != place:
                    raise contradicts(checkpoint, f"{sample.sample_id} has another place in the log")
                if sample.finished:
                    done.add(sample.sample_id)

    def _check_unknown(self, checkpoint: CheckpointRecord, sample: TrainedSample) -> None:
        """It is not archived, and its prompt has not failed."""
        rows, in_order = self.rows, self.rows.order != Order.ARRIVAL
        behind = sample.place < (rows.archived_place if in_order else rows.committed)
        if behind or sample.sample_id in rows.archived_ids:
            raise contradicts(checkpoint, f"{sample.sample_id} was trained for the last time before")
        prompt = rows.prompts.get(sample.place)
        if rows.order == Order.ORDINAL and prompt is not None and prompt.state == "failed":
            raise contradicts(checkpoint, f"prompt {sample.place} has failed")

    # -- the archive -----------------------------------------------------------------------

    @change
    def retire(self, keep: int) -> int:
        rows = self.rows
        retired = sorted(rows.checkpoints)[: -max(1, keep)]
        for step in retired:
            del rows.checkpoints[step]
        oldest = rows.checkpoints[min(rows.checkpoints)] if rows.checkpoints else None
        if oldest is None or (
            oldest.step <= rows.archived_step and oldest.first_place <= rows.archived_place
        ):
            return 0 if retired else self._unchanged(0)
        rows.archived_step = max(rows.archived_step, oldest.step)
        done = [
            i
            for i, s in rows.samples.items()
            if s.state == State.RELEASED and s.acked == 2 and s.place < oldest.first_place
            if s.step is not None and s.step <= oldest.step
        ]
        plans = [step for step in rows.plans if step <= oldest.step]
        if max(len(done), len(plans)) < self.archive_from:
            return 0
        rows.archive.update({step: self._trained(rows.plans.pop(step)) for step in plans})
        rows.archived_ids |= set(done)
        for sample_id in done:
            del rows.samples[sample_id]
        rows.archived_place = max(rows.archived_place, oldest.first_place)
        return len(done)

    def _trained(self, plan: StepPlan) -> TrainedStep:
        samples = []
        last_visits = {sample_id: visit for visit, sample_id in enumerate(plan.sample_ids)}  # some come twice
        for visit, sample_id in enumerate(plan.sample_ids):
            known = self.rows.samples.get(sample_id)
            if known is None:
                samples.append(TrainedSample(-1, sample_id, None, False))
            else:
                finished = known.acked > 0 and known.step == plan.step and visit == last_visits[sample_id]
                samples.append(TrainedSample(known.place, sample_id, known.ordinal, finished))
        return TrainedStep(plan.step, plan.rev, tuple(samples))

    def history(self, *, step: int | None = None, sample_id: str | None = None) -> Iterator[TrainedStep]:
        with self._changed:
            steps = {**self.rows.archive, **{s: self._trained(p) for s, p in self.rows.plans.items()}}
            for trained in (steps[number] for number in sorted(steps)):
                if step in (None, trained.step) and (
                    sample_id is None or sample_id in [s.sample_id for s in trained.samples]
                ):
                    yield trained
