"""Step plans, checkpoints and quarantine: they decide which weights survive."""

from __future__ import annotations

import json
from collections.abc import Sequence

from paceline.ledger.records import (
    BegunStep,
    CheckpointRecord,
    StepAck,
    StepPlan,
    TrainedSample,
    TrainedStep,
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
from paceline.ledger.stores.sqlite.database import change
from paceline.ledger.stores.sqlite.samples import SampleTable
from paceline.ledger.stores.sqlite.text import AMONG, json_list


class StepTable(SampleTable):
    # -- step plans ------------------------------------------------------------------------

    @change()
    def plan(self, plan: StepPlan | None, ack: StepAck | None = None) -> BegunStep | None:
        run = self._run()
        if ack is not None:
            self._take_ack(ack)
        run.started_step = None if plan is None else plan.step
        if plan is None:
            return None
        if plan.step <= run.archived_step:
            raise history_is_archived(plan.step, run.archived_step)
        self._change(
            "INSERT INTO plan (step, rev, sample_ids) VALUES (?, ?, ?) "
            "ON CONFLICT (step) DO UPDATE SET rev = excluded.rev, sample_ids = excluded.sample_ids, "
            "deaths = 0 WHERE excluded.rev > rev AND step > ?",
            *(plan.step, plan.rev, json.dumps(plan.sample_ids), run.trained_step),
        )
        stored = self._plan_of(plan.step)
        assert stored is not None, "the plan was inserted in this transaction"
        return BegunStep(stored, self._value("SELECT deaths FROM plan WHERE step = ?", plan.step))

    def _take_ack(self, ack: StepAck) -> None:
        plan, run = self._plan_of(ack.step), self._run()
        if ack.step != run.trained_step + 1 or plan is None or plan.rev != ack.rev:
            raise out_of_turn(ack, run.trained_step, plan)
        self._change(
            f"UPDATE sample SET acked = 1, step = ? WHERE acked < 2 AND sample_id {AMONG}",  # noqa: S608 (ours)
            *(ack.step, json_list(ack.finished)),
        )
        run.trained_step = ack.step
        self._change("UPDATE plan SET deaths = 0 WHERE step = ? AND deaths > 0", ack.step)

    def _plan_of(self, step: int) -> StepPlan | None:
        rows = self._rows("SELECT sample_ids, rev FROM plan WHERE step = ?", step)
        return StepPlan(step, tuple(json.loads(rows[0][0])), rows[0][1]) if rows else None

    # -- checkpoints -----------------------------------------------------------------------

    def _checkpoints(self) -> list[CheckpointRecord]:
        rows = self._rows(
            "SELECT step, name, manifest_digest, chain, first_place FROM checkpoint ORDER BY step"
        )
        return [CheckpointRecord(*row) for row in rows]

    def _head(self) -> CheckpointRecord | None:
        records = self._checkpoints()
        return records[-1] if records else None

    @change(final=True)
    def head(self, checkpoint: CheckpointRecord, lineage: Sequence[TrainedStep] | None = None) -> None:
        head, run = self._head(), self._run()
        if head == checkpoint:
            return self._unchanged(None)
        if head is not None and checkpoint.step <= head.step:
            raise behind_head(checkpoint.step, head.step)
        if lineage is not None:
            self._adopt(checkpoint, lineage)
            run.trained_step = checkpoint.step
        else:
            self._check_plans(checkpoint, head)
            run.trained_step = max(run.trained_step, checkpoint.step)
        self._change(
            "INSERT INTO checkpoint VALUES (?, ?, ?, ?, ?)",
            *(checkpoint.step, checkpoint.name, checkpoint.manifest_digest),
            *(checkpoint.chain, checkpoint.first_place),
        )
        self._change("UPDATE sample SET acked = 2 WHERE acked = 1 AND step <= ?", checkpoint.step)
        return None

    def _check_plans(self, checkpoint: CheckpointRecord, head: CheckpointRecord | None) -> None:
        first = head.step + 1 if head else 1
        plans = [self._plan_of(step) for step in range(first, checkpoint.step + 1)]
        known = [plan for plan in plans if plan is not None]
        if len(known) < len(plans) or chain_of(head.chain if head else "", known) != checkpoint.chain:
            raise contradicts(checkpoint, "its lineage is not that of the plans on record")

    @change(final=True)
    def fall_back(self, step: int) -> list[str]:
        run = self._run()
        if step < run.archived_step:
            raise history_is_archived(step, run.archived_step)
        lost = self._rows(
            "SELECT sample_id FROM sample WHERE state = 'released' AND step > ? ORDER BY place", step
        )
        self._change("DELETE FROM checkpoint WHERE step > ?", step)
        self._change("UPDATE sample SET acked = 0, step = NULL WHERE acked > 0 AND step > ?", step)
        self._lose(i for (i,) in lost)
        run.trained_step = min(run.trained_step, step)
        return [i for (i,) in lost]

    # -- rolling forward -------------------------------------------------------------------

    def _adopt(self, checkpoint: CheckpointRecord, lineage: Sequence[TrainedStep]) -> None:
        self._check_lineage(checkpoint, lineage)
        samples = {s.sample_id: s for trained in lineage for s in trained.samples}
        unknown = sorted(
            (s for s in samples.values() if not self._on_record(s.sample_id)), key=lambda s: s.place
        )
        if samples and self._settle_order(order_of(samples.values()).value) == "arrival":
            run = self._run()
            if [s.place for s in unknown] != list(range(run.committed, run.committed + len(unknown))):
                raise contradicts(checkpoint, "samples before those it trained are unknown here")
        for sample in unknown:
            self._enter_forgotten(sample.place, sample.sample_id, sample.ordinal)
            self._reopen_prompt(sample.ordinal)
        self._undo_provisional_acks()  # the lineage says what the weights contain
        for trained in lineage:
            plan = trained.plan
            self._change(
                "INSERT OR REPLACE INTO plan (step, rev, sample_ids) VALUES (?, ?, ?)",
                *(plan.step, plan.rev, json.dumps(plan.sample_ids)),
            )
            for sample in trained.samples:
                if sample.finished:
                    self._adopt_last_visit(sample, trained.step)
        if samples and self._run().place_order == "ordinal":
            self._fail_passed_over(checkpoint, max(s.place for s in samples.values()))

    def _undo_provisional_acks(self) -> None:
        self._change("UPDATE sample SET acked = 0, step = NULL WHERE acked = 1")

    def _on_record(self, sample_id: str) -> bool:
        return self._value("SELECT 1 FROM sample WHERE sample_id = ?", sample_id) is not None

    def _adopt_last_visit(self, sample: TrainedSample, step: int) -> None:
        self._change(
            "UPDATE sample SET acked = 2, step = ? WHERE sample_id = ? AND acked < 2", step, sample.sample_id
        )
        if self._change(
            "UPDATE sample SET state = 'released' WHERE sample_id = ? AND state = 'lost'", sample.sample_id
        ):
            self._finish_prompt(sample.ordinal)

    def _fail_passed_over(self, checkpoint: CheckpointRecord, last: int) -> None:
        """First visits follow the log, so prompts that the lineage left out up to `last` had failed."""
        self._pass_over(last)
        self._change(
            "UPDATE prompt SET state = 'failed', worker = '', reason = ordinal || ': ' || ? "
            "WHERE ordinal <= ? AND state != 'failed' AND NOT again",
            *(passed_over(checkpoint.name), last),
        )

    def _check_lineage(self, checkpoint: CheckpointRecord, lineage: Sequence[TrainedStep]) -> None:
        head = self._head()
        first = max(0, head.step if head else 0) + 1
        if [trained.step for trained in lineage] != list(range(first, checkpoint.step + 1)):
            raise contradicts(checkpoint, f"its steps do not follow the head at step {first - 1}")
        if chain_of(head.chain if head else "", [trained.plan for trained in lineage]) != checkpoint.chain:
            raise contradicts(checkpoint, "its chain does not continue that of the head")
        ids = {sample.sample_id for trained in lineage for sample in trained.samples}
        archived = self._archived_among([i for i in ids if not self._on_record(i)])
        for trained in lineage:
            on_record = self._plan_of(trained.step)
            if on_record is not None and trained.rev > on_record.rev:
                on_record = None  # the ledger has forgotten this revision
            if on_record is not None and on_record.digest != trained.plan.digest:
                raise contradicts(checkpoint, f"step {trained.step} was planned otherwise")
            for sample in trained.samples:
                self._check_place(
                    checkpoint,
                    sample,
                    planned=on_record is not None,
                    was_here=sample.sample_id in archived or self._was_here(sample.place),
                )
        self._check_trained(checkpoint, [sample for trained in lineage for sample in trained.samples])

    def _check_trained(self, checkpoint: CheckpointRecord, samples: Sequence[TrainedSample]) -> None:
        """Refuse a lineage that trains a sample after its last visit, here or in an earlier lineage."""
        durable = "SELECT 1 FROM sample WHERE sample_id = ? AND acked = 2"
        done = {s.sample_id for s in samples if self._value(durable, s.sample_id)}
        places: dict[int, str] = {}
        for sample in samples:
            if sample.sample_id in done:
                raise contradicts(checkpoint, f"{sample.sample_id} was trained for the last time before")
            if places.setdefault(sample.place, sample.sample_id) != sample.sample_id:
                raise contradicts(checkpoint, f"{sample.sample_id} has another place in the log")
            if sample.finished:
                done.add(sample.sample_id)
        if len(set(places.values())) < len(places):
            raise contradicts(checkpoint, "a sample has two places in the log")

    def _check_place(
        self, checkpoint: CheckpointRecord, sample: TrainedSample, *, planned: bool, was_here: bool
    ) -> None:
        rows = self._rows(
            "SELECT place, sample_id, state FROM sample WHERE place = ? OR sample_id = ?",
            *(sample.place, sample.sample_id),
        )
        for place, sample_id, state in rows:
            if (place, sample_id) != (sample.place, sample.sample_id):
                raise contradicts(checkpoint, f"{sample.sample_id} has another place in the log")
            if state == "quarantined" and not planned:
                raise contradicts(checkpoint, f"{sample.sample_id} is quarantined")
        if not rows and was_here:
            raise contradicts(checkpoint, f"{sample.sample_id} was trained for the last time before")
        failed = "SELECT 1 FROM prompt WHERE ordinal = ? AND state = 'failed'"
        if not rows and self._run().place_order == "ordinal" and self._value(failed, sample.place):
            raise contradicts(checkpoint, f"prompt {sample.place} has failed")

    def _was_here(self, place: int) -> bool:
        """Whether a place without a row is archived."""
        run = self._run()
        return place < (run.committed if run.place_order == "arrival" else run.archived_place)

    # -- samples that cannot be trained ----------------------------------------------------

    @change(final=True)
    def quarantine(self, sample_ids: Sequence[str], *, step: int | None, reason: str) -> None:
        for sample_id in sample_ids:
            rows = self._rows(
                "UPDATE sample SET state = 'quarantined', acked = 0, reason = ?, step = ? "
                "WHERE sample_id = ? AND state IN ('present', 'lost') AND acked < 2 RETURNING ordinal",
                *(reason, step, sample_id),
            )
            for (ordinal,) in rows:  # the prompt is not captured again
                self._change("DELETE FROM prompt WHERE ordinal = ? AND again AND state = 'pending'", ordinal)
