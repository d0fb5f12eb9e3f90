"""Whole light runs on a machine that loses power, after which only synced ledger calls are certain.

With durability "head" most calls are not synced, so a power failure takes the ledger back behind the
checkpoints: to its last synced call, or to any call since. The features are gone, as after every boot.
The other files are as the run left them (recording_files.py tests unsynced files). The run that goes on
from there must end in the weights of the undisturbed run, and the checker must find nothing wrong at any
time.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from itertools import count
from pathlib import Path

from paceline import crashpoints
from paceline.errors import PacelineError
from paceline.fsck.checker import check
from paceline.ledger.stores.redis import RedisLedger
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.testing.light_run import LightRun, Outcome, RunShape, head_of, uninterrupted

CUTS_OF_A_RUN = 200  # what they leave lies in memory at a time


class Violation(AssertionError):  # noqa: N818 (it is what the tests look for)
    """The run broke a promise."""


class MainsRun(LightRun):
    """A light run that keeps what a power failure at each of `points` leaves.

    `left`: the point, how many commits are lost, and the run after the failure, in a folder of its own.
    """

    def __init__(self, folder: Path, shape: RunShape, points: range) -> None:
        super().__init__(folder, shape)
        self.images: list[dict[str, bytes]] = [{}]  # the last synced state and every later one
        self.left: list[tuple[int, int, LightRun]] = []
        self._reached = 0
        self._points = points

    def open_ledger(self) -> RedisLedger | SQLiteLedger:
        ledger = super().open_ledger()
        self._note(synced=True)
        return ledger

    def watch(self, name: str) -> None:
        if name in ("ledger.after_commit", "ledger.after_sync"):
            self._note(synced=name == "ledger.after_sync")
        self._reached += 1
        if self._reached in self._points:
            at = self._reached
            after = self._boot(self.folder.with_name(f"cut-{at}"), random.Random(at))
            self.left.append((at, len(self.images) - 1, after))

    def _note(self, *, synced: bool) -> None:
        files = [self.ledger_path, self.ledger_path.with_name("ledger.db-wal")]
        image = {path.name: path.read_bytes() for path in files if path.exists()}
        self.images = [image] if synced else [*self.images, image]

    def _boot(self, folder: Path, rng: random.Random) -> LightRun:
        """The run after a power failure."""
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
    counts: Counter[str] = Counter()
    for begin in count(first, every * CUTS_OF_A_RUN):
        run = MainsRun(folder / f"whole-{begin}", shape, range(begin, begin + every * CUTS_OF_A_RUN, every))
        _run_through(run)
        for at, lost, after in run.left:
            _go_on(after, at, wanted)
            counts["commits lost"] += lost
            counts["power failures"] += 1
            shutil.rmtree(after.folder)
        shutil.rmtree(run.folder)
        if len(run.left) < CUTS_OF_A_RUN:
            break
    return counts


def _run_through(run: MainsRun) -> None:
    crashpoints.watch(run.watch)
    try:
        run.produce()
        run.consume()
    finally:
        crashpoints.watch(None)


def _go_on(run: LightRun, at: int, wanted: Outcome) -> None:
    """From the power failure to the end. Raises Violation."""
    if run.ledger_path.exists():
        _judge(run, f"after the power failure at point {at}")
    try:
        run.produce()
        run.consume()
    except PacelineError as error:
        raise Violation(f"after the power failure at point {at} the run does not go on: {error}") from error
    _judge(run, f"after the run that went on from the power failure at point {at}")
    ledger = run.open_ledger()
    if head_of(ledger, run.checkpoints) != wanted:
        raise Violation(f"other weights after a power failure at point {at} of {run.shape}")
    ledger.close()


def _judge(run: LightRun, when: str) -> None:
    report = check(run.folder, passes=run.shape.passes)
    if report.errors or report.unchecked:
        raise Violation(f"{when}: {report.errors or report.unchecked}")
