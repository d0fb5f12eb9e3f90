"""The conformance suite of a tracker: it remembers what it has, and goes on in the same run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from paceline.trackers.tensorboard import fields_of, records
from paceline.trackers.tracker import HELDOUT, TRAIN, Point, TrackedRun, Tracker

Rows = dict[tuple[str, int], list[dict[str, float]]]


def trained(*steps: int) -> list[Point]:
    return [Point(TRAIN, step, 1000.0 + step, {"loss": 1 / step, "samples": 4.0}) for step in steps]


def measured(*steps: int) -> list[Point]:
    return [Point(HELDOUT, step, 2000.0 + step, {"acceptance_length": 1.5}) for step in steps]


def scalars(folder: Path) -> list[tuple[str, int]]:
    """Tag and step of every scalar in TensorBoard's files of a folder, in the order of the files."""
    found = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for data in records(path.read_bytes()):
            fields = dict(fields_of(data))
            for _, value in fields_of(fields.get(5, b"")):
                found.append((dict(fields_of(value))[1].decode(), int.from_bytes(fields[2], "little")))
    return found


class TrackerSuite:
    """A test class of an adapter derives from it, and says how it is opened and what it holds."""

    tells_newest = True  # whether the tracker itself knows how far it is

    def open(self, run: TrackedRun) -> Tracker:
        raise NotImplementedError

    def rows(self, run: TrackedRun) -> Rows:
        """What the tracker holds of the run: by series and step, the figures of every row there."""
        raise NotImplementedError

    @pytest.fixture
    def run(self, tmp_path: Path) -> TrackedRun:
        return TrackedRun("my-run", "0123456789abcdef" * 2, tmp_path, {"training.batch_size": 4})

    def test_every_point_is_there_once(self, run: TrackedRun) -> None:
        """With its figures, of both series, held-out points later than their steps."""
        tracker = self.open(run)
        tracker.write(trained(1, 2, 3, 4))
        tracker.write(measured(2))
        tracker.write(trained(5))
        tracker.close()
        found = self.rows(run)
        assert found.keys() == {*((TRAIN, step) for step in range(1, 6)), (HELDOUT, 2)}
        assert all(len(rows) == 1 for rows in found.values())
        [row] = found[TRAIN, 4]
        assert math.isclose(row["train/loss"], 0.25)
        assert found[HELDOUT, 2][0]["heldout/acceptance_length"] == 1.5

    def test_points_of_both_series_may_come_in_any_order(self, run: TrackedRun) -> None:
        """Of a run that is tracked late, all measurements come together, and training goes on afterwards."""
        tracker = self.open(run)
        tracker.write([*trained(1, 2, 3), *measured(1, 2, 3)])
        tracker.write([*trained(4), *measured(4), *trained(5)])
        tracker.close()
        found = self.rows(run)
        assert found.keys() == {(series, n) for series in (TRAIN, HELDOUT) for n in range(1, 6)} - {
            (HELDOUT, 5)
        }
        assert all(len(rows) == 1 for rows in found.values())

    def test_another_process_goes_on_in_the_same_run(self, run: TrackedRun) -> None:
        """After a crash, too: nothing was closed then."""
        killed = self.open(run)
        killed.write(trained(1, 2))
        again = self.open(run)
        if self.tells_newest:
            assert dict(again.newest()) == {TRAIN: 2}
        again.write(trained(3))
        again.close()
        killed.close()  # only the test's own files
        assert sorted(step for _, step in self.rows(run)) == [1, 2, 3]

    def test_a_run_that_begins_anew_is_another_one(self, run: TrackedRun) -> None:
        """Under the same name, in the same folder."""
        first = self.open(run)
        first.write(trained(7))
        first.close()
        anew = TrackedRun(run.name, "f" * 32, run.directory)
        other = self.open(anew)
        assert dict(other.newest()) == {}
        other.write(trained(1))
        other.close()
        assert sorted(step for _, step in self.rows(anew)) == [1]
        assert sorted(step for _, step in self.rows(run)) == [7]
