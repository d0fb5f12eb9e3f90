"""Finds the checkpoint from which a run's draft is loaded: the newest, the best, or that of a step."""

from __future__ import annotations

from collections.abc import Collection

from paceline.config.run import RunConfig
from paceline.errors import CheckpointDamagedError, CheckpointError
from paceline.evaluation.curve import read_curve
from paceline.ledger.records import CheckpointRecord
from paceline.ledger.view import LedgerView
from paceline.roles.best_draft import Choice, choose, held_drafts, record_of
from paceline.training.checkpoint import Checkpoint, CheckpointFolder

TRIES = 5  # a checkpoint may be retired between two looks


def checkpoint_of_step(
    config: RunConfig, view: LedgerView, step: int | None, only: Collection[str]
) -> tuple[Checkpoint, CheckpointRecord]:
    """The kept checkpoint of this step (None: the newest valid one); only the files `only` are checked.

    Of a checkpoint that is kept as the best alone there is no file but the draft's. Raises CheckpointError if
    there is none, CheckpointDamagedError if it is damaged.
    """
    if step is None:
        return _newest(config, view, only)
    kept = {record.step: record for record in view.snapshot().checkpoints}
    held = held_drafts(config)
    names = held.names()
    points = read_curve(config.run.directory, view.facts()).points
    best = {point.step: record_of(point) for point in points if point.checkpoint in names}
    if step in kept:
        return CheckpointFolder(config.checkpoint_folder, config.run.name).read(kept[step], only), kept[step]
    if step in best:
        return held.read(best[step]), best[step]
    steps = sorted({*kept, *best})
    raise CheckpointError(
        f"The run in {config.run.directory} keeps no checkpoint of step {step}.",
        why=f"It keeps those of the steps {', '.join(map(str, steps)) or 'none'}.",
        next="choose one of them, or leave --step out.",
    )


def draft_to_give(
    config: RunConfig, view: LedgerView, step: int | None, only: Collection[str]
) -> tuple[Checkpoint, Choice]:
    """The checkpoint whose draft is given away, and why that one: the best unless `step` names another.

    Raises as `checkpoint_of_step` does.
    """
    checkpoint, record = checkpoint_of_step(config, view, step, only)
    if step is not None:
        points = read_curve(config.run.directory, view.facts()).points
        point = next((point for point in points if point.checkpoint == record.name), None)
        return checkpoint, Choice(record, point, "as asked for", is_held=False)
    choice = choose(config, record, view.facts())
    if not choice.is_held:
        return checkpoint, choice
    try:
        return held_drafts(config).read(choice.record), choice
    except CheckpointDamagedError as error:
        why = f"the newest, because the best, step {choice.record.step}, cannot be used: {error.what}"
        return checkpoint, Choice(record, None, why, is_held=False)


def hold_newest(
    config: RunConfig, view: LedgerView, only: Collection[str]
) -> tuple[Checkpoint, CheckpointRecord]:
    """Hold the draft of the newest valid checkpoint, and read it from there; training may retire the
    checkpoint meanwhile. Raises as `newest_checkpoint` does, and OSError."""
    held = held_drafts(config)
    for tries_left in reversed(range(TRIES)):
        try:
            _, record = _newest(config, view, only)
            held.hold(record)
            return held.read(record), record
        except (CheckpointError, FileNotFoundError):  # retired between two looks, or damaged
            if not tries_left:
                raise
    raise AssertionError("unreachable")


def newest_checkpoint(config: RunConfig, view: LedgerView, only: Collection[str]) -> Checkpoint:
    """A run's newest valid checkpoint; only the files `only` are checked. Raises CheckpointError if it has
    none."""
    return _newest(config, view, only)[0]


def _newest(
    config: RunConfig, view: LedgerView, only: Collection[str]
) -> tuple[Checkpoint, CheckpointRecord]:
    folder = CheckpointFolder(config.checkpoint_folder, config.run.name)
    damaged = ""
    for record in reversed(view.snapshot().checkpoints):
        try:
            return folder.read(record, only), record
        except CheckpointDamagedError as error:
            damaged = damaged or error.what  # the checkpoint before it may be valid
    if damaged:
        raise CheckpointError(
            f"The run in {config.run.directory} has no checkpoint that can be read. {damaged}",
            why="There is no draft to measure.",
            next=f"paceline fsck {config.run.directory} says what is wrong with each of them.",
        )
    raise CheckpointError(
        f"The run in {config.run.directory} has no valid checkpoint yet.",
        why="There is no draft to measure.",
        next="train first: paceline train RUN.yaml",
    )
