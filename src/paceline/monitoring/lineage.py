"""Lineage both ways: the samples of a step, and the life of a sample, from the ledger alone."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from paceline.config.load import setting
from paceline.errors import ConfigError
from paceline.ledger.facts import CONFIG, RUN_ID
from paceline.ledger.records import SampleRecord, Snapshot, State, TrainedStep
from paceline.ledger.view import LedgerView


class StepSample(Struct, frozen=True, kw_only=True):
    sample_id: str
    place: int
    visit: int  # the how manieth of this sample
    is_last: bool
    state: str


class StepLineage(Struct, frozen=True, kw_only=True):
    """`fate`: `planned`, `provisional` or `durable`; `checkpoint`: the first one kept that contains it."""

    step: int
    fate: str
    checkpoint: str
    rev: int
    samples: tuple[StepSample, ...]


class SampleVisit(Struct, frozen=True, kw_only=True):
    step: int
    fate: str
    checkpoint: str


class SampleLineage(Struct, frozen=True, kw_only=True):
    """`place`: in the log, `ordinal`: of its prompt; both None before it is captured."""

    sample_id: str
    place: int | None
    ordinal: int | None
    state: str
    visits: tuple[SampleVisit, ...]
    failed: str = ""  # why its prompt failed


def step_lineage(view: LedgerView, step: int) -> StepLineage:
    """The samples of a step, in the order they were trained. Raises ConfigError for an unknown step."""
    now, found = view.snapshot(), view.history(step=step)
    if not found:
        raise ConfigError(
            f"Step {step} has no plan in this ledger.",
            why=f"The last acked step is {now.trained_step}.",
            next="paceline inspect RUN shows how far the run is.",
        )
    [trained] = found
    samples = []
    for sample in trained.samples:
        life = view.history(sample_id=sample.sample_id)
        record = view.find([sample.sample_id]).get(sample.sample_id)
        is_known = record is not None or sample.place >= 0
        samples.append(
            StepSample(
                sample_id=sample.sample_id,
                place=sample.place,
                visit=sum(one.step <= step for one in life),
                is_last=sample.finished,
                state=state_of(record, now, life[-1]) if is_known else "unknown to this ledger",
            )
        )
    return StepLineage(
        step=step,
        fate=fate_of(now, step),
        checkpoint=covering(now, step),
        rev=trained.rev,
        samples=tuple(samples),
    )


def sample_lives(view: LedgerView, sample_id: str) -> list[SampleLineage]:
    """A sample's life. Raises ConfigError if the run does not know it.

    `sample_id` may also be the prompt's task id, `round/id`, or its id in the prompt file, which means the
    samples of all its rounds.
    """
    facts, now = view.facts(), view.snapshot()
    run_id = facts.get(RUN_ID, "")
    task_id = sample_id.removeprefix(f"{run_id}:")
    rounds = range(setting(facts.get(CONFIG, {}), "data.rounds", 1))
    reasons = list(view.failed().values())
    for task_ids in ([task_id], [f"{turn}/{task_id}" for turn in rounds]):
        ids = [f"{run_id}:{one}" for one in task_ids]
        records = view.find(ids)
        lives = [(one, records.get(one), view.history(sample_id=one)) for one in ids]
        failed = [_failure(reasons, one) for one in task_ids]
        if any(record or steps for _, record, steps in lives) or any(failed):
            return [
                _life(now, one, record, steps, why)
                for (one, record, steps), why in zip(lives, failed, strict=True)
            ]
    raise ConfigError(
        f"No sample {sample_id!r} was ever committed, and no prompt {task_id!r} has failed.",
        why="Its prompt waits to be captured, is being captured, or is not of this run.",
        next="paceline status RUN shows how many prompts are pending.",
    )


def _failure(reasons: Sequence[str], task_id: str) -> str:
    """Why a prompt failed: a reason begins with the prompt's id; "" if it did not."""
    mine = [reason for reason in reasons if reason.startswith(f"{task_id}: ")]
    return mine[0].removeprefix(f"{task_id}: ") if mine else ""


def _life(
    now: Snapshot, sample_id: str, record: SampleRecord | None, steps: Sequence[TrainedStep], failed: str
) -> SampleLineage:
    here = [one for trained in steps for one in trained.samples if one.sample_id == sample_id]
    place = record.place if record is not None else here[0].place if here else None
    ordinal = record.ref.ordinal if record is not None else here[0].ordinal if here else None
    is_known = record is not None or bool(steps)
    return SampleLineage(
        sample_id=sample_id,
        place=place,
        ordinal=ordinal,
        state=state_of(record, now, steps[-1] if steps else None) if is_known else "never committed",
        visits=tuple(
            SampleVisit(step=one.step, fate=fate_of(now, one.step), checkpoint=covering(now, one.step))
            for one in steps
        ),
        failed=failed,
    )


def fate_of(now: Snapshot, step: int) -> str:
    if now.head is not None and step <= now.head.step:
        return "durable"
    return "provisional" if step <= now.trained_step else "planned"


def covering(now: Snapshot, step: int) -> str:
    """The name of the first checkpoint that is kept and contains the step; "" if none does."""
    return next((one.name for one in now.checkpoints if one.step >= step), "")


def state_of(record: SampleRecord | None, now: Snapshot, last: TrainedStep | None) -> str:
    """A sample's state; `record` is None for an archived one, and `last` is the step of its last visit."""
    if record is None:
        at = f", last by step {last.step}" if last is not None else ""
        return f"trained{at}, durable; features freed"
    if record.state == State.QUARANTINED:
        at = "" if record.step is None else f" by step {record.step}"
        return f"in quarantine{at}: {record.reason}"
    trained = "not trained to the end yet"
    if record.step is not None:
        trained = f"trained, last by step {record.step}, {fate_of(now, record.step)}"
    features = {State.PRESENT: "resident", State.LOST: "lost, to be captured again", State.RELEASED: "freed"}
    return f"{trained}; features {features[record.state]}"
