"""The ledger on a Redis or Valkey server, opened by every process of a run, on any host.

Each change is one call of a script, which runs alone and whole. With durability "full" every change is on the
server's disk when its call returns; with "head", those that durable weights depend on, and everything before
them (WAITAOF). A server that is killed keeps every answered change in either case.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from paceline.ledger.ledger import Ledger
from paceline.ledger.records import (
    BegunStep,
    Budget,
    CheckpointRecord,
    Fence,
    Lease,
    Order,
    SourceBlock,
    StepAck,
    StepPlan,
    TrainedSample,
    TrainedStep,
    Wanted,
    bare_ref,
    chain_of_digests,
    order_of,
)
from paceline.ledger.refusals import passed_over
from paceline.ledger.stores.redis.address import REPLY_S, Address
from paceline.ledger.stores.redis.reading import Reading
from paceline.ledger.stores.redis.replies import BasisMovedError
from paceline.ledger.stores.redis.requirements import Durability, Requirements
from paceline.ledger.stores.redis.scripts import NAMES
from paceline.ledger.stores.redis.server import PATIENCE_S, Server
from paceline.types import SampleRef, ref_to_json

BLOCK = 4096  # visits in one block of the archive, about
BLOCKING_S = 10.0  # how long the server holds one question for the next change


class RedisLedger(Reading, Ledger):
    archive_from = BLOCK  # how many samples or steps must be ready before any is archived
    block_size = BLOCK

    def __init__(
        self, url: str, name: str, *, durability: Durability = "full", patience_s: float = PATIENCE_S
    ) -> None:
        """Open the ledger `name`; create it if there is none.

        `patience_s`: how long a call waits for a server that is away or loads its data. Raises ConfigError
        for a server that could lose the ledger, with the setting to change; SchemaError for one that is too
        old or holds a newer version's ledger; LedgerError if it does not answer.
        """
        address = Address(url)
        requirements = Requirements(address, durability)
        super().__init__(Server(address, patience_s, requirements.admit), name, durability=durability)
        self._requirements = requirements
        self._call("create", None, secrets.token_hex(8), final=True, repeatable=True)
        self.know()

    @property
    def unverified(self) -> tuple[str, ...]:
        """What the server does not say about its durability, in words."""
        return self._requirements.unverified

    # -- roles -----------------------------------------------------------------------------

    def acquire(self, role: str, holder: str, order: Order | None = None) -> Fence:
        token, wanted = secrets.token_hex(8), None if order is None else Order(order).value
        arguments = (role, holder, token, wanted)
        epoch = self._call("acquire", None, *arguments, final=True, repeatable=True, subject=wanted)
        return Fence(role, epoch)

    # -- prompts ---------------------------------------------------------------------------

    def extend(self, fence: Fence | None, /, blocks: Sequence[SourceBlock]) -> int:
        rows = [(block.first, block.count, block.digest) for block in blocks]
        return int(self._call("extend", fence, rows))

    def forget_prompts(self, fence: Fence | None, /) -> bool:
        return bool(self._call("forget_prompts", fence))

    def lease(
        self, fence: Fence | None, /, limit: int, group_size: int | None = None, below: int | None = None
    ) -> list[Lease]:
        return [Lease(*row) for row in self._call("lease", fence, limit, group_size, below)]

    def give_back(
        self,
        fence: Fence | None,
        /,
        ordinals: Sequence[int],
        *,
        failure: str | None = None,
        attempt_max: int | None = None,
    ) -> list[int]:
        arguments = (list(ordinals), failure, attempt_max)
        return list(self._call("give_back", fence, *arguments, final=failure is not None))

    def end_stream(self, fence: Fence | None, /, ended: bool) -> bool:
        return bool(self._call("end_stream", fence, ended, final=True))

    # -- bytes and samples -----------------------------------------------------------------

    def reserve(
        self, fence: Fence | None, /, wanted: Sequence[Wanted], budget: Budget | None
    ) -> list[int] | None:
        rows = [(sample.ordinal, sample.sample_id, sample.num_bytes) for sample in wanted]
        limits = None if budget is None else (budget.num_bytes, budget.num_samples)
        generations: list[int] | None = self._call("reserve", fence, rows, limits)
        return generations

    def commit(self, fence: Fence | None, /, refs: Sequence[SampleRef]) -> list[bool]:
        rows = [
            (ref.sample_id, ref.ordinal, ref.generation, ref.estimated_bytes, ref_to_json(ref))
            for ref in refs
        ]
        return list(self._call("commit", fence, rows))

    def report_lost(self, fence: Fence | None, /, sample_ids: Sequence[str]) -> None:
        self._call("report_lost", fence, list(sample_ids))

    def swept(self, fence: Fence | None, /, generations: Sequence[int], skip_through: int = 0) -> None:
        self._call("swept", fence, list(generations), skip_through)

    # -- steps -----------------------------------------------------------------------------

    def plan(
        self, fence: Fence | None, /, plan: StepPlan | None, ack: StepAck | None = None
    ) -> BegunStep | None:
        planned = None if plan is None else (plan.step, plan.rev, plan.sample_ids, plan.digest)
        acked = None if ack is None else (ack.step, ack.rev, ack.finished)
        begun = self._call("plan", fence, planned, acked, subject=ack)
        if begun is None:
            return None
        step, rev, sample_ids, deaths = begun
        return BegunStep(StepPlan(step, tuple(sample_ids), rev), deaths)

    # -- checkpoints -----------------------------------------------------------------------

    def head(
        self,
        fence: Fence | None,
        /,
        checkpoint: CheckpointRecord,
        lineage: Sequence[TrainedStep] | None = None,
    ) -> None:
        """Hash here what the script cannot: it refuses the hash if head or plans are others by then."""
        row = (
            *(checkpoint.step, checkpoint.name, checkpoint.manifest_digest),
            *(checkpoint.chain, checkpoint.first_place),
        )
        while True:
            basis = self._basis(checkpoint, lineage)
            steps = None if lineage is None else [_lineage_row(trained) for trained in lineage]
            try:
                self._call("head", fence, row, basis, steps, final=True, subject=checkpoint)
            except BasisMovedError:
                continue
            return

    def _basis(self, checkpoint: CheckpointRecord, lineage: Sequence[TrainedStep] | None) -> dict[str, Any]:
        head_step, head_chain, digests = self._ask("basis", checkpoint.step if lineage is None else 0)
        basis = {"head_step": head_step, "head_chain": head_chain, "digests": digests}
        if lineage is None:
            return {**basis, "chain": chain_of_digests(head_chain, digests)}
        visits = {visit.sample_id: visit for trained in lineage for visit in trained.samples}
        refs = {i: ref_to_json(bare_ref(i, visit.ordinal)) for i, visit in visits.items()}
        return {
            **basis,
            "chain": chain_of_digests(head_chain, [trained.plan.digest for trained in lineage]),
            "order": order_of(visits.values()).value,
            "bare_refs": refs,
            "passed_over": passed_over(checkpoint.name),
        }

    def fall_back(self, fence: Fence | None, /, step: int) -> list[str]:
        return list(self._call("fall_back", fence, step, final=True))

    def retire(self, fence: Fence | None, /, keep: int) -> int:
        return int(self._call("retire", fence, keep, self.archive_from, self.block_size, final=True))

    def quarantine(
        self,
        fence: Fence | None,
        /,
        sample_ids: Sequence[str],
        *,
        step: int | None,
        reason: str,
    ) -> None:
        self._call("quarantine", fence, list(sample_ids), step, reason, final=True)

    def release(self, fence: Fence | None, /, freed: Sequence[str], limit: int) -> dict[str, int]:
        return dict(self._call("release", fence, list(freed), limit))

    # -- facts -----------------------------------------------------------------------------

    def set_facts(
        self, fence: Fence | None, /, facts: Mapping[str, Any], *, settle: bool = False
    ) -> dict[str, Any]:
        rows = [(key, json.dumps(value)) for key, value in facts.items()]
        # Settled once, a fact is what the first call made it, so the call can be repeated.
        result = self._call("set_facts", fence, rows, settle, final=settle, repeatable=settle)
        return {key: json.loads(text) for key, text in result}

    # -- waiting ---------------------------------------------------------------------------

    def wait(self, seen_lsn: int, timeout_s: float) -> int:
        """The server answers at the next change. A loss of changes is noticed when the connection breaks,
        or within BLOCKING_S."""
        deadline = self.clock() + timeout_s
        changes = self._keys[NAMES.index("changes")]
        while (now := self.lsn()) == seen_lsn and (left := deadline - self.clock()) > 0:
            block_s = min(left, BLOCKING_S)
            block_ms = str(math.ceil(block_s * 1000))
            question = ("XREAD", "BLOCK", block_ms, "COUNT", "1", "STREAMS", changes, f"{seen_lsn}-0")
            self._server.ask(lambda *_, q=question: [q], repeatable=True, reply_s=block_s + REPLY_S)
        return now


def _lineage_row(trained: TrainedStep) -> tuple[Any, ...]:
    visits = [_visit(sample) for sample in trained.samples]
    plan = trained.plan
    return (trained.step, trained.rev, visits, plan.digest, plan.sample_ids)


def _visit(sample: TrainedSample) -> tuple[Any, ...]:
    return (sample.place, sample.sample_id, sample.ordinal, sample.finished)
