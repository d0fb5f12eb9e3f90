"""Shortcuts for a run's ordinary ledger calls, for suites and tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from paceline.errors import PacelineError
from paceline.ledger.consumer_session import ConsumerSession
from paceline.ledger.ledger import Ledger
from paceline.ledger.producer_session import ProducerSession
from paceline.ledger.records import (
    CheckpointRecord,
    Order,
    SourceBlock,
    StepPlan,
    TrainedSample,
    TrainedStep,
    Wanted,
    chain_of,
)
from paceline.testing.samples import sample_ref
from paceline.types import SampleRef

RUN_ID = "run0"


def id_of(number: int) -> str:
    return f"{RUN_ID}:s{number}"


def ids_of(*numbers: int) -> list[str]:
    return [id_of(number) for number in numbers]


def producer_of(
    ledger: Ledger, worker: str = "0", *, prompts: int = 6, attempt_max: int = 5
) -> ProducerSession:
    """A producer that has its role, and a source of `prompts`."""
    session = ProducerSession(ledger, RUN_ID, worker, order=Order.ORDINAL, attempt_max=attempt_max)
    session.acquire()
    session.extend([SourceBlock(0, prompts, f"{prompts} prompts")])
    return session


def refusal_of(call: Callable[[], object]) -> str:
    """What the ledger says when it refuses the call; empty: it made it."""
    try:
        call()
    except PacelineError as error:
        return str(error)
    return ""


def consumer_of(ledger: Ledger) -> ConsumerSession:
    session = ConsumerSession(ledger, RUN_ID)
    session.acquire()
    return session


def refs_of(producer: ProducerSession, *numbers: int, num_bytes: int = 100) -> list[SampleRef]:
    """Refs with an intent each."""
    wanted = [Wanted(number, id_of(number), num_bytes) for number in numbers]
    generations = producer.reserve(wanted)
    assert generations is not None, "no budget was given"
    return [
        replace(sample_ref(number, ordinal=number, num_bytes=num_bytes), generation=generation)
        for number, generation in zip(numbers, generations, strict=True)
    ]


def capture(producer: ProducerSession, *numbers: int) -> list[str]:
    """Lease, reserve and commit these prompts, which must be the next ones; their sample ids."""
    leased = [lease.ordinal for lease in producer.lease(len(numbers))]
    assert leased == list(numbers), leased
    refs = refs_of(producer, *numbers)
    assert producer.commit(refs) == refs
    return [ref.sample_id for ref in refs]


@dataclass
class Training:
    """A consumer's steps, as its trainer would make them."""

    consumer: ConsumerSession
    lineage: tuple[TrainedStep, ...] = ()

    def step(self, *numbers: int, finished: Sequence[int] | None = None) -> TrainedStep:
        """Plan and ack the next step; `finished` have their last visit in it (None: all)."""
        done = numbers if finished is None else finished
        step = self.consumer.snapshot().trained_step + 1
        trained = trained_step(step, *numbers, finished=done)
        self.consumer.plan(trained.plan)
        self.consumer.ack(step, 0, ids_of(*done))
        self.consumer.write_ack()
        self.lineage = (*self.lineage, trained)
        return trained

    def checkpoint(self, *, first_place: int = 0) -> CheckpointRecord:
        """Make what was trained the head."""
        record = checkpoint_of(self.lineage, first_place=first_place)
        self.consumer.head(record)
        return record


def trained_step(
    step: int, *numbers: int, finished: Sequence[int] | None = None, rev: int = 0
) -> TrainedStep:
    done = numbers if finished is None else finished
    return TrainedStep(step, rev, tuple(TrainedSample(n, id_of(n), n, n in done) for n in numbers))


def checkpoint_of(
    lineage: Sequence[TrainedStep], before: str = "", *, first_place: int = 0, name: str = ""
) -> CheckpointRecord:
    step, chain = lineage[-1].step, chain_of(before, [trained.plan for trained in lineage])
    return CheckpointRecord(step, name or f"step-{step}", f"digest-{step}", chain, first_place)


def plan_of(step: int, *numbers: int, rev: int = 0) -> StepPlan:
    return StepPlan(step, tuple(ids_of(*numbers)), rev)
