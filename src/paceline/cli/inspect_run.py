"""`paceline inspect`: shows the samples of a step, or the life of a sample, from the ledger alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from paceline.cli.named_run import directory_of
from paceline.cli.plain import out, say
from paceline.config.load import setting
from paceline.errors import ConfigError
from paceline.ledger.facts import CONFIG, RUN_ID
from paceline.ledger.records import SampleRecord, Snapshot, State, TrainedStep
from paceline.ledger.view import LedgerView
from paceline.roles.snapshot import making_sense, open_run


def inspect_run(run: Path, step: int | None, sample: str | None) -> None:
    """A step, a sample or both; without either the whole run. Raises PacelineError."""
    directory = directory_of(run)
    with making_sense(directory):
        view = open_run(directory)
        if step is not None:
            inspect_step(out, view, step)
        if sample is not None:
            inspect_sample(out, view, sample)
        if step is None and sample is None:
            inspect_all(out, view)


def inspect_step(console: Console, view: LedgerView, step: int) -> None:
    """The samples of a step, in the order they were trained. Raises ConfigError for an unknown step."""
    if step == 0:
        say(console, "step 0: the checkpoint of the first weights, before any sample is trained")
        return
    now, found = view.snapshot(), view.history(step=step)
    if not found:
        raise ConfigError(
            f"Step {step} has no plan in this ledger.",
            why=f"The last acked step is {now.trained_step}.",
            next="paceline inspect RUN shows how far the run is.",
        )
    [trained] = found
    revision = f", plan revision {trained.rev}" if trained.rev else ""
    say(console, f"step {step}: {_progress(now, step)}{revision}, {len(trained.samples)} samples")
    for number, sample in enumerate(trained.samples, start=1):
        life = view.history(sample_id=sample.sample_id)
        visits = [t.step for t in life if t.step <= step]
        last = " and last" if sample.finished else ""
        record = view.find([sample.sample_id]).get(sample.sample_id)
        is_known = record is not None or sample.place >= 0
        state = _state(record, now, life[-1]) if is_known else "unknown to this ledger"
        say(
            console,
            f"{number:4}  {sample.sample_id}  place {sample.place}, visit {len(visits)}{last}; {state}",
        )


def inspect_sample(console: Console, view: LedgerView, sample_id: str) -> None:
    """A sample's life. Raises ConfigError if the run does not know it.

    `sample_id` may also be the prompt's task id, `round/id`, or its id in the prompt file, which shows the
    samples of all its rounds.
    """
    facts = view.facts()
    run_id = facts.get(RUN_ID, "")
    task_id = sample_id.removeprefix(f"{run_id}:")
    rounds = range(setting(facts.get(CONFIG, {}), "data.rounds", 1))
    reasons = list(view.failed().values())
    for task_ids in ([task_id], [f"{turn}/{task_id}" for turn in rounds]):
        records = view.find([f"{run_id}:{i}" for i in task_ids])
        lives = [(i, records.get(f"{run_id}:{i}"), view.history(sample_id=f"{run_id}:{i}")) for i in task_ids]
        if any(record or steps for _, record, steps in lives) or any(_failure(reasons, i) for i in task_ids):
            for known_id, record, steps in lives:
                _tell_life(
                    console,
                    view.snapshot(),
                    f"{run_id}:{known_id}",
                    record,
                    steps,
                    _failure(reasons, known_id),
                )
            return
    raise ConfigError(
        f"No sample {sample_id!r} was ever committed, and no prompt {task_id!r} has failed.",
        why="Its prompt waits to be captured, is being captured, or is not of this run.",
        next="paceline status RUN shows how many prompts are pending.",
    )


def _failure(reasons: Sequence[str], task_id: str) -> str | None:
    """Why a prompt failed: a reason begins with the prompt's id."""
    mine = [reason for reason in reasons if reason.startswith(f"{task_id}: ")]
    return mine[0].removeprefix(f"{task_id}: ") if mine else None


def _tell_life(
    console: Console,
    now: Snapshot,
    sample_id: str,
    record: SampleRecord | None,
    steps: Sequence[TrainedStep],
    failed: str | None,
) -> None:
    if record is None and not steps:
        what = "never committed; failed: " + failed if failed is not None else "not captured yet"
        say(console, f"prompt {sample_id.partition(':')[2]}: {what}")
        return
    places = [s.place for trained in steps for s in trained.samples if s.sample_id == sample_id]
    place = record.place if record is not None else places[0]
    say(console, f"sample {sample_id} (prompt {sample_id.partition(':')[2]}), place {place} in the log")
    for trained in steps:
        say(console, f"  visited by step {trained.step} ({_progress(now, trained.step)})")
    say(console, f"  {_state(record, now, steps[-1] if steps else None)}")
    if failed is not None:
        say(console, f"  its prompt failed: {failed}")


def inspect_all(console: Console, view: LedgerView) -> None:
    """How far the run is; failed prompts, quarantined and lost samples."""
    now = view.snapshot()
    say(
        console,
        f"{now.committed} samples committed, step {now.trained_step} acked, "
        f"head {now.head.name if now.head else 'none yet'}, retained: {[c.step for c in now.checkpoints]}",
    )
    for record in view.find(state=State.QUARANTINED).values():
        say(console, f"quarantined {record.sample_id}: {record.reason}")
    for reason in view.failed().values():
        say(console, f"failed prompt {reason}")
    for record in view.find(state=State.LOST).values():
        say(console, f"to be captured again {record.sample_id}")


def _progress(now: Snapshot, step: int) -> str:
    if now.head is not None and step <= now.head.step:
        return "durable"
    return "provisional" if step <= now.trained_step else "planned"


def _state(record: SampleRecord | None, now: Snapshot, last: TrainedStep | None) -> str:
    """A sample's state; `record` is None for an archived one, and `last` is the step of its last visit."""
    if record is None:
        at = f", last by step {last.step}" if last is not None else ""
        return f"trained{at}, durable; features freed"
    if record.state == State.QUARANTINED:
        at = "" if record.step is None else f" by step {record.step}"
        return f"in quarantine{at}: {record.reason}"
    trained = "not trained to the end yet"
    if record.step is not None:
        trained = f"trained, last by step {record.step}, {_progress(now, record.step)}"
    features = {State.PRESENT: "resident", State.LOST: "lost, to be captured again", State.RELEASED: "freed"}
    return f"{trained}; features {features[record.state]}"
