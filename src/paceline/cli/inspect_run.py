"""`paceline inspect`: which samples trained a step, and what became of a sample, from the ledger alone."""

from __future__ import annotations

from collections import Counter

from rich.console import Console

from paceline.cli.plain import say
from paceline.errors import ConfigError
from paceline.ledger.facts import CONFIG, RUN_ID
from paceline.ledger.records import SampleRecord
from paceline.ledger.store import MetadataStore


def inspect_step(console: Console, store: MetadataStore, step: int) -> None:
    """The samples of a step, in the order they were trained. Raises ConfigError for an unknown step."""
    if step == 0:
        say(console, "step 0: the checkpoint before the first step, the draft as it is built; no sample yet")
        return
    plan, visits = None, Counter[str]()
    for plan in store.plans():
        if plan.step >= step:
            break
        visits.update(plan.sample_ids)
    if plan is None or plan.step != step:
        raise ConfigError(
            f"Step {step} has no plan in this ledger.",
            why=f"The last step acked is {store.trained_step()}.",
            next="paceline inspect RUN shows how far the run is.",
        )
    revision = f", plan revision {plan.rev}" if plan.rev else ""
    say(console, f"step {step}: {_progress(store, step)}{revision}, {len(plan.sample_ids)} samples")
    for place, sample_id in enumerate(plan.sample_ids, start=1):
        visits[sample_id] += 1
        record = store.sample_record(sample_id)
        if record is None:
            say(console, f"{place:4}  {sample_id}  unknown to this ledger")
            continue
        last = " and last" if record.step == step and record.state != "quarantined" else ""
        say(
            console,
            f"{place:4}  {sample_id}  seq {record.seq}, visit {visits[sample_id]}{last}; {_state(record)}",
        )


def inspect_sample(console: Console, store: MetadataStore, sample_id: str) -> None:
    """A sample's life. Raises ConfigError if nobody knows it.

    `sample_id` may also be the prompt's task id, `round/id`, or its id in the prompt file: then the
    samples of all its rounds are told.
    """
    facts, failed = store.facts(), store.failed_tasks()
    task_id = sample_id.removeprefix(f"{facts.get(RUN_ID, '')}:")
    of_rounds = [f"{turn}/{task_id}" for turn in range(facts.get(CONFIG, {}).get("prompts.rounds", 1))]
    for task_ids in ([task_id], of_rounds):
        records = [_record_of(store, sample_id if i == task_id else i) for i in task_ids]
        if any(records) or failed.keys() & set(task_ids):
            for record, known_id in zip(records, task_ids, strict=True):
                _tell_life(console, store, known_id, record, failed.get(known_id))
            return
    raise ConfigError(
        f"No sample {sample_id!r} was ever committed, and no prompt {task_id!r} has failed.",
        why="Its prompt waits to be captured, is being captured, or is not of this run.",
        next="paceline status RUN shows how many prompts are pending.",
    )


def _record_of(store: MetadataStore, name: str) -> SampleRecord | None:
    return store.sample_record(name) or store.sample_record(f"{store.facts().get(RUN_ID, '')}:{name}")


def _tell_life(
    console: Console, store: MetadataStore, task_id: str, record: SampleRecord | None, failed: str | None
) -> None:
    if record is None:
        what = "never committed; set aside: " + failed if failed is not None else "not captured yet"
        say(console, f"prompt {task_id}: {what}")
        return
    say(console, f"sample {record.sample_id} (prompt {record.task_id}), place {record.seq} in the log")
    for plan in store.plans():
        if record.sample_id in plan.sample_ids:
            say(console, f"  visited by step {plan.step} ({_progress(store, plan.step)})")
    say(console, f"  {_state(record)}")
    if failed is not None:
        say(console, f"  its prompt was set aside: {failed}")


def inspect_all(console: Console, store: MetadataStore) -> None:
    """How far the run is, and what was set aside and why."""
    heads = store.checkpoints()
    say(
        console,
        f"{store.committed_count()} samples committed, step {store.trained_step()} acked, "
        f"head {heads[-1].name if heads else 'none yet'}, retained: {[head.step for head in heads]}",
    )
    for sample_id, reason in store.quarantined().items():
        say(console, f"quarantined {sample_id}: {reason}")
    for task_id, reason in store.failed_tasks().items():
        say(console, f"failed prompt {task_id}: {reason}")
    for sample_id in store.lost_ids():
        say(console, f"to be captured again {sample_id}")


def _progress(store: MetadataStore, step: int) -> str:
    heads = store.checkpoints()
    if heads and step <= heads[-1].step:
        return "durable"
    return "provisional" if step <= store.trained_step() else "planned"


def _state(record: SampleRecord) -> str:
    if record.state == "quarantined":
        at = "" if record.step is None else f" by step {record.step}"
        return f"in quarantine{at}: {record.reason}"
    trained = "not trained to the end yet"
    if record.step is not None:
        trained = f"trained, last by step {record.step}, {'durable' if record.durable else 'provisional'}"
    features = {"present": "resident", "lost": "lost, to be captured again", "released": "freed"}
    return f"{trained}; features {features[record.state]}"
