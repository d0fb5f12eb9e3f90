"""Step plans, checkpoints and quarantine: what decides which weights survive."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from paceline.ledger.records import (
    BegunStep,
    CheckpointRecord,
    Fence,
    StepAck,
    StepPlan,
    TrainedSample,
    TrainedStep,
    chain_of,
)
from paceline.ledger.refusals import (
    behind_head,
    contradicts,
    head_is_kept,
    history_is_folded,
    out_of_turn,
)
from paceline.ledger.stores.sqlite.samples import AMONG, SampleTable, json_list
from paceline.types import SampleRef, ref_to_json


class StepTable(SampleTable):
    # -- step plans ------------------------------------------------------------------------

    def begin_step(
        self,
        plan: StepPlan,
        *,
        ack: StepAck | None = None,
        fence: Fence | None = None,
        op_id: str | None = None,
    ) -> BegunStep:
        with self._mutation(fence, op_id) as operation:
            if operation.repeated:
                step, ids, last_seq, rev, deaths = operation.result
                return BegunStep(StepPlan(step, tuple(ids), last_seq, rev), deaths)
            run = self._run()
            if plan.step <= run.folded_step:
                raise history_is_folded(plan.step, run.folded_step)
            if ack is not None:
                self._take_ack(ack)
            self._change(
                "INSERT INTO plan (step, rev, sample_ids, last_seq) VALUES (?, ?, ?, ?) "
                "ON CONFLICT (step) DO UPDATE SET rev = excluded.rev, sample_ids = excluded.sample_ids, "
                "last_seq = excluded.last_seq, deaths = 0 WHERE excluded.rev > rev AND step > ?",
                *(plan.step, plan.rev, json.dumps(plan.sample_ids), plan.last_seq, run.trained_step),
            )
            run.started_step = plan.step
            stored = self._plan_on_record(plan.step)
            assert stored is not None, "the plan was inserted in this transaction"
            deaths = self._value("SELECT deaths FROM plan WHERE step = ?", plan.step)
            operation.keep([stored.step, stored.sample_ids, stored.last_seq, stored.rev, deaths])
            return BegunStep(stored, deaths)

    def leave_step(self, step: int, *, fence: Fence | None = None) -> None:
        with self._mutation(fence):
            if self._run().started_step == step:
                self._run().started_step = None

    def ack_step(self, ack: StepAck, *, fence: Fence | None = None, op_id: str | None = None) -> None:
        with self._mutation(fence, op_id) as operation:
            if not operation.repeated:
                self._take_ack(ack)

    def _take_ack(self, ack: StepAck) -> None:
        plan, run = self._plan_on_record(ack.step), self._run()
        if ack.step != run.trained_step + 1 or plan is None or plan.rev != ack.rev:
            raise out_of_turn(ack, run.trained_step, plan)
        self._ack(ack.finished, ack.step, durable=False)
        run.trained_step, run.started_step = ack.step, None
        self._change("UPDATE plan SET deaths = 0 WHERE step = ? AND deaths > 0", ack.step)

    def _plan_on_record(self, step: int) -> StepPlan | None:
        rows = self._rows("SELECT sample_ids, last_seq, rev FROM plan WHERE step = ?", step)
        return StepPlan(step, tuple(json.loads(rows[0][0])), *rows[0][1:]) if rows else None

    def get_plan(self, step: int) -> StepPlan | None:
        with self._reading():
            plan = self._plan_on_record(step)
            if plan is None and step <= self._run().folded_step:
                plan = next((p for p in self._folded_plans() if p.step == step), None)
        return plan

    def plans(self) -> Iterator[StepPlan]:
        with self._reading():
            found = list(self._folded_plans())
            rows = self._rows("SELECT step, sample_ids, last_seq, rev FROM plan ORDER BY step")
        found += [StepPlan(step, tuple(json.loads(ids)), last, rev) for step, ids, last, rev in rows]
        return iter(found)

    def trained_step(self) -> int:
        return self._run().trained_step

    # -- checkpoints -----------------------------------------------------------------------

    def record_checkpoint(self, checkpoint: CheckpointRecord, *, fence: Fence | None = None) -> None:
        with self._mutation(fence, final=True):
            head = self._head()
            if head == checkpoint:
                return
            if head is not None and checkpoint.step <= head.step:
                raise behind_head(checkpoint.step, head.step)
            if checkpoint.chain:
                first = head.step + 1 if head else 1
                plans = [self._plan_on_record(step) for step in range(first, checkpoint.step + 1)]
                known = [plan for plan in plans if plan is not None]
                before = head.chain if head else ""
                if len(known) < len(plans) or chain_of(before, known) != checkpoint.chain:
                    raise contradicts(checkpoint, "its lineage is not that of the plans on record")
            self._become_head(checkpoint)

    def _head(self) -> CheckpointRecord | None:
        records = self.checkpoints()
        return records[-1] if records else None

    def _become_head(self, checkpoint: CheckpointRecord) -> None:
        self._change(
            "INSERT INTO checkpoint VALUES (?, ?, ?, ?, ?)",
            *(checkpoint.step, checkpoint.name, checkpoint.manifest_digest),
            *(checkpoint.last_seq, checkpoint.chain),
        )
        self._run().trained_step = max(self._run().trained_step, checkpoint.step)
        self._change("UPDATE ack SET durable = 1 WHERE durable = 0 AND step <= ?", checkpoint.step)

    def checkpoints(self) -> list[CheckpointRecord]:
        rows = self._rows("SELECT step, name, manifest_digest, last_seq, chain FROM checkpoint ORDER BY step")
        return [CheckpointRecord(*row) for row in rows]

    def forget_checkpoint(self, step: int, *, fence: Fence | None = None) -> None:
        with self._mutation(fence, final=True):  # its folder is removed next
            head = self._head()
            if head is not None and step == head.step:
                raise head_is_kept(step)
            self._change("DELETE FROM checkpoint WHERE step = ?", step)

    def fall_back(self, step: int, *, fence: Fence | None = None) -> list[str]:
        with self._mutation(fence, final=True):
            folded = self._run().folded_step
            if step < folded:
                raise history_is_folded(step, folded)
            lost = self._rows(
                "SELECT sample_id FROM sample JOIN ack USING (sample_id) "
                "WHERE state = 'released' AND step > ? ORDER BY seq",
                step,
            )
            self._change("DELETE FROM checkpoint WHERE step > ?", step)
            self._change("DELETE FROM ack WHERE step > ?", step)
            self._lose(i for (i,) in lost)
            self._run().trained_step = min(self._run().trained_step, step)
            return [i for (i,) in lost]

    # -- rolling forward -------------------------------------------------------------------

    def adopt_checkpoint(
        self, checkpoint: CheckpointRecord, lineage: Sequence[TrainedStep], *, fence: Fence | None = None
    ) -> None:
        with self._mutation(fence, final=True):
            self._check_lineage(checkpoint, lineage)
            for trained in lineage:
                plan = trained.plan
                self._change(
                    "INSERT OR REPLACE INTO plan (step, rev, sample_ids, last_seq) VALUES (?, ?, ?, ?)",
                    *(plan.step, plan.rev, json.dumps(plan.sample_ids), plan.last_seq),
                )
                for sample in trained.samples:
                    self._adopt_sample(sample, trained.step)
            self._refuse_gaps(checkpoint)
            self._become_head(checkpoint)
            self._run().trained_step = checkpoint.step

    def _check_lineage(self, checkpoint: CheckpointRecord, lineage: Sequence[TrainedStep]) -> None:
        head = self._head()
        first = max(0, head.step if head else 0) + 1
        if head is not None and checkpoint.step <= head.step:
            raise behind_head(checkpoint.step, head.step)
        if [trained.step for trained in lineage] != list(range(first, checkpoint.step + 1)):
            raise contradicts(checkpoint, f"its steps do not follow the head at step {first - 1}")
        if chain_of(head.chain if head else "", [trained.plan for trained in lineage]) != checkpoint.chain:
            raise contradicts(checkpoint, "its chain does not continue that of the head")
        for trained in lineage:
            on_record = self._plan_on_record(trained.step)
            if on_record is not None and trained.rev > on_record.rev:
                on_record = None  # a revision that the ledger has forgotten
            if on_record is not None and on_record.digest != trained.plan.digest:
                raise contradicts(checkpoint, f"step {trained.step} was planned otherwise")
            for sample in trained.samples:
                self._check_place(checkpoint, sample, planned=on_record is not None)
        self._check_trained(checkpoint, [sample for trained in lineage for sample in trained.samples])

    def _check_trained(self, checkpoint: CheckpointRecord, samples: Sequence[TrainedSample]) -> None:
        """No sample comes after its last visit, neither in this lineage nor in what it continues."""
        ack, row = "SELECT durable FROM ack WHERE sample_id = ?", "SELECT 1 FROM sample WHERE sample_id = ?"
        done = {s.sample_id for s in samples if self._value(ack, s.sample_id)}
        unknown = {s.seq: s.sample_id for s in samples if self._value(row, s.sample_id) is None}
        ids = set(unknown.values())
        for seq, sample_id, _, _ in self._folded_samples() if unknown else ():
            if seq in unknown or sample_id in ids:
                raise contradicts(checkpoint, f"{sample_id} is folded history at place {seq}")
        for sample in samples:
            if sample.sample_id in done:
                raise contradicts(checkpoint, f"{sample.sample_id} was trained for the last time before")
            if sample.finished:
                done.add(sample.sample_id)

    def _check_place(self, checkpoint: CheckpointRecord, sample: TrainedSample, *, planned: bool) -> None:
        for seq, sample_id, state in self._rows(
            "SELECT seq, sample_id, state FROM sample WHERE seq = ? OR sample_id = ?",
            *(sample.seq, sample.sample_id),
        ):
            if (seq, sample_id) != (sample.seq, sample.sample_id):
                raise contradicts(checkpoint, f"{sample.sample_id} has another place in the log")
            if state == "quarantined" and not planned:
                raise contradicts(checkpoint, f"{sample.sample_id} is quarantined")

    def _adopt_sample(self, sample: TrainedSample, step: int) -> None:
        """A sample that this ledger forgot is lost, until its last visit says otherwise."""
        ref = ref_to_json(SampleRef(sample.sample_id, "", sample.task_id, "", {}, {}, ""))
        entered = self._change(
            "INSERT INTO sample (seq, sample_id, task_id, state, resident, bytes, ref) "
            "VALUES (?, ?, ?, 'lost', 0, 0, ?) ON CONFLICT DO NOTHING",
            *(sample.seq, sample.sample_id, sample.task_id, ref),
        )
        if entered:
            ordinal = self._ordinal_of(sample.task_id)
            self._change("UPDATE sample SET ordinal = ? WHERE seq = ?", ordinal, sample.seq)
            self._run().last_seq = max(self._run().last_seq, sample.seq)
        if sample.finished:
            self._ack([sample.sample_id], step, durable=True)
            if self._change(
                "UPDATE sample SET state = 'released' WHERE seq = ? AND state = 'lost'", sample.seq
            ):
                self._finish_task_of(sample.seq, sample.task_id)

    def _refuse_gaps(self, checkpoint: CheckpointRecord) -> None:
        run = self._run()
        if self._value("SELECT count(*) FROM sample WHERE seq > ?", run.folded_seq) != (
            run.last_seq - run.folded_seq
        ):
            raise contradicts(checkpoint, "samples before those it trained are unknown here")

    # -- poison ----------------------------------------------------------------------------

    def quarantine(
        self, sample_ids: Sequence[str], *, step: int | None, reason: str, fence: Fence | None = None
    ) -> None:
        with self._mutation(fence, final=True):
            for sample_id in sample_ids:
                changed = self._change(
                    "UPDATE sample SET state = 'quarantined', reason = ?, quarantine_step = ? "
                    "WHERE sample_id = ? AND state IN ('present', 'lost') AND NOT EXISTS "
                    "(SELECT 1 FROM ack WHERE ack.sample_id = sample.sample_id AND durable = 1)",
                    *(reason, step, sample_id),
                )
                if changed:
                    self._change("DELETE FROM ack WHERE sample_id = ?", sample_id)
                    [(ordinal, task_id)] = self._rows(
                        "SELECT ordinal, task_id FROM sample WHERE sample_id = ?", sample_id
                    )
                    self._bury_task(ordinal, task_id, reason)

    def quarantined(self, among: Sequence[str] | None = None) -> dict[str, str]:
        if among is None:
            rows = self._rows("SELECT sample_id, reason FROM sample WHERE state = 'quarantined' ORDER BY seq")
        else:
            rows = self._rows(
                "SELECT sample_id, reason FROM sample "  # noqa: S608 (ours)
                f"WHERE state = 'quarantined' AND sample_id {AMONG} ORDER BY seq",
                json_list(among),
            )
        return dict(rows)
