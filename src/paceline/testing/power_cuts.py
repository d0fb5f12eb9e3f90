"""Whole light runs on a machine that loses power, after which only synced ledger calls are certain.

With durability "head" most calls are not synced, so a power failure takes the ledger back behind the
checkpoints: to its last synced call, or to any call since. The features are gone, as after every boot.
The other files are as the run left them (recording_files.py tests unsynced files). The run that goes on
from there must end in the weights of the undisturbed run, and the checker must find nothing wrong at any
time.
"""

from __future__ import annotations

import gc
import random
import shutil
from collections import Counter
from pathlib import Path

from paceline import crashpoints
from paceline.errors import PacelineError
from paceline.fsck.checker import check
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.testing.light_run import LightRun, Outcome, RunShape, head_of, uninterrupted


class PowerCutError(BaseException):
    """The machine is off."""


class Violation(AssertionError):  # noqa: N818 (it is what the tests look for)
    """The run broke a promise."""


class MainsRun(LightRun):
    """A light run that remembers what of its ledger is on the disk."""

    def __init__(self, folder: Path, shape: RunShape) -> None:
        super().__init__(folder, shape)
        self.images: list[dict[str, bytes]] = [{}]  # the last synced state and every later one
        self.reached = 0
        self.cut_at = -1

    def open_ledger(self) -> SQLiteLedger:
        ledger = super().open_ledger()
        self._note(synced=True)
        return ledger

    def watch(self, name: str) -> None:
        if name in ("ledger.after_commit", "ledger.after_sync"):
            self._note(synced=name == "ledger.after_sync")
        self.reached += 1
        if self.reached == self.cut_at:
            crashpoints.watch(None)
            raise PowerCutError

    def _note(self, *, synced: bool) -> None:
        files = [self.ledger_path, self.ledger_path.with_name("ledger.db-wal")]
        image = {path.name: path.read_bytes() for path in files if path.exists()}
        self.images = [image] if synced else [*self.images, image]

    def boot(self, folder: Path, rng: random.Random) -> LightRun:
        """The run after a power failure, in another folder."""
        folder.mkdir()
        if self.checkpoints.is_dir():
            shutil.copytree(self.checkpoints, folder / "checkpoints")
        # As far back as can be, most of the time: that is where trouble is.
        image = self.images[0] if rng.random() < 0.7 else rng.choice(self.images)
        for name, data in image.items():
            (folder / name).write_bytes(data)
        return LightRun(folder, self.shape)


def cut_everywhere(folder: Path, shape: RunShape, every: int = 1, first: int = 1) -> Counter[str]:
    """Cut the power at every so many-th point of a run. Raises Violation."""
    wanted = uninterrupted(shape, folder / "undisturbed")
    whole = MainsRun(folder / "whole", shape)
    _whole(whole, cut_at=-1)
    counts: Counter[str] = Counter()
    for at in range(first, whole.reached + 1, every):
        place = folder / f"cut-{at}"
        place.mkdir()
        counts["commits lost"] += _cut(place, shape, at, wanted)
        counts["power failures"] += 1
        shutil.rmtree(place)
    return counts


def _cut(folder: Path, shape: RunShape, at: int, wanted: Outcome) -> int:
    """Cut the power at the `at`-th place; commits that were lost. Raises Violation."""
    run = MainsRun(folder / "before", shape)
    try:
        _whole(run, cut_at=at)
    except PowerCutError:
        gc.collect()  # closes what the dead run had open
    after = run.boot(folder / "after", random.Random(at))
    if after.ledger_path.exists():
        _judge(after, f"after the power failure at point {at}")
    try:
        after.produce()
        after.consume()
    except PacelineError as error:
        raise Violation(f"after the power failure at point {at} the run does not go on: {error}") from error
    _judge(after, f"after the run that went on from the power failure at point {at}")
    ledger = after.open_ledger()
    if head_of(ledger, after.checkpoints) != wanted:
        raise Violation(f"other weights after a power failure at point {at} of {shape}")
    ledger.close()
    return len(run.images) - 1


def _whole(run: MainsRun, cut_at: int) -> None:
    run.cut_at = cut_at
    crashpoints.watch(run.watch)
    try:
        run.produce()
        run.consume()
    finally:
        crashpoints.watch(None)


def _judge(run: LightRun, when: str) -> None:
    report = check(run.folder, passes=run.shape.passes)
    if report.errors or report.unchecked:
        raise Violation(f"{when}: {report.errors or report.unchecked}")
