"""`paceline inspect`: shows the samples of a step, or the life of a sample, from the ledger alone."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from paceline.cli.named_run import directory_of
from paceline.cli.plain import out, say
from paceline.ledger.records import State
from paceline.ledger.view import LedgerView
from paceline.monitoring.lineage import SampleLineage, sample_lives, step_lineage
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
    found = step_lineage(view, step)
    revision = f", plan revision {found.rev}" if found.rev else ""
    say(console, f"step {step}: {found.fate}{revision}, {len(found.samples)} samples")
    for number, sample in enumerate(found.samples, start=1):
        last = " and last" if sample.is_last else ""
        visit = f"place {sample.place}, visit {sample.visit}{last}"
        say(console, f"{number:4}  {sample.sample_id}  {visit}; {sample.state}")


def inspect_sample(console: Console, view: LedgerView, sample_id: str) -> None:
    """A sample's life. Raises ConfigError if the run does not know it.

    `sample_id` may also be the prompt's task id, `round/id`, or its id in the prompt file, which shows the
    samples of all its rounds.
    """
    for life in sample_lives(view, sample_id):
        _tell_life(console, life)


def _tell_life(console: Console, life: SampleLineage) -> None:
    prompt = life.sample_id.partition(":")[2]
    if life.place is None:
        what = "never committed; failed: " + life.failed if life.failed else "not captured yet"
        say(console, f"prompt {prompt}: {what}")
        return
    say(console, f"sample {life.sample_id} (prompt {prompt}), place {life.place} in the log")
    for visit in life.visits:
        say(console, f"  visited by step {visit.step} ({visit.fate})")
    say(console, f"  {life.state}")
    if life.failed:
        say(console, f"  its prompt failed: {life.failed}")


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
