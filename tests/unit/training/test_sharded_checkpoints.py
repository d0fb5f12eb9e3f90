"""Two ranks write a checkpoint together, each its part: it is there whole or not at all."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from paceline import crashpoints, durable_files
from paceline.durable_files import FileContent
from paceline.errors import CheckpointError
from paceline.ledger.records import State
from paceline.parts import part_name
from paceline.testing.light_run import RUN_ID
from paceline.testing.two_ranks import WAIT_S, TwoRanks, closing_links
from paceline.training.checkpoint import CheckpointFolder
from paceline.training.checkpoint_writer import InlineExecutor
from paceline.training.learner import DRAFT
from paceline.training.part_writing import PartWriter

PARTS = [part_name(DRAFT, rank, 2) for rank in range(2)]


@contextmanager
def two_ranks(folder: Path, **how: object) -> Iterator[TwoRanks]:
    two = TwoRanks(folder, sharded=True, **how)  # type: ignore[arg-type]
    with closing_links(*two.links):
        yield two


@pytest.fixture
def finished(tmp_path: Path) -> TwoRanks:
    with two_ranks(tmp_path) as run:
        assert run.trainer.fit(run.loader) == 3
        run.end()
    return run


def test_each_rank_writes_its_part_and_the_manifest_names_all(finished: TwoRanks) -> None:
    """The first weights, which rank 0 builds, are written by both ranks, too."""
    first, second = finished.learners
    head = finished.folder.read(finished.ledger.snapshot().checkpoints[-1])
    assert sorted(head.files) == PARTS
    assert first.weight is not None
    assert [float(head.files[name]) for name in PARTS] == [first.weight / 2] * 2
    assert first.weight == second.weight
    assert finished.features.usage().resident_samples == 0


def test_ranks_go_on_from_the_parts_that_all_of_them_wrote(tmp_path: Path, finished: TwoRanks) -> None:
    """Each reads them by itself from the checkpoint's folder."""
    with two_ranks(tmp_path, before=finished) as again:
        assert again.trainer.step == 3
        assert [learner.weight for learner in again.learners] == [finished.learners[0].weight] * 2
        again.end()


def test_a_crash_anywhere_before_the_rename_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    """A copy of the folder is taken at every point of both ranks; none holds a checkpoint more."""
    images = list[tuple[str, Path]]()
    lock = threading.Lock()

    def take(point: str) -> None:
        if point.startswith("checkpoint."):
            with lock:
                image = tmp_path / f"image-{len(images)}"
                images.append((point, image))
                shutil.copytree(tmp_path / "run", image)

    with two_ranks(tmp_path / "run") as run:
        crashpoints.watch(take)
        try:
            run.trainer.fit(run.loader)
        finally:
            crashpoints.watch(None)
        run.end()
    records = run.ledger.snapshot().checkpoints
    points = [point for point, _ in images]
    assert points.count("checkpoint.after_file") == 2 * 3, "checkpoints of steps 0, 2 and 3, by both ranks"
    for point in ("after_aside", "before_manifest", "before_rename", "before_sync"):
        assert points.count(f"checkpoint.{point}") == 3
    steps = [-1]
    for point, image in images:
        found = [record.step for record, _ in CheckpointFolder(image, RUN_ID).unrecorded([])]
        if point == "checkpoint.before_sync":
            assert found[-1] > steps[-1]
        else:
            assert found[-1:] in (steps[-1:], []), point
        steps += found[-1:]
    assert steps[-1] == records[-1].step


@pytest.mark.parametrize("what", ["gone", "flipped", "short"])
@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_missing_or_damaged_is_found_and_the_checkpoint_before_is_used(
    tmp_path: Path, finished: TwoRanks, what: str, part: str
) -> None:
    before, head = finished.ledger.snapshot().checkpoints[-2:]
    path = tmp_path / head.name / part
    data = path.read_bytes()
    path.unlink()
    if what != "gone":
        path.write_bytes(data[:-1] if what == "short" else bytes([data[0] ^ 1]) + data[1:])
    with two_ranks(tmp_path, before=finished) as again:
        assert again.events[:2] == ["checkpoint_damaged", "fall_back"]
        assert again.trainer.step == before.step
        again.end()


class Full(CheckpointFolder):
    """A rank's view of the checkpoints on a disk that is full from its third part on."""

    parts = 0

    def write_files(self, aside: str, files: dict[str, FileContent]):  # type: ignore[no-untyped-def, override]
        self.parts += 1
        if self.parts < 3:
            return super().write_files(aside, files)
        raise CheckpointError("No space is left on rank 1's disk.")


def test_a_rank_that_cannot_write_its_part_ends_training_and_leaves_nothing_half_written(
    tmp_path: Path,
) -> None:
    with ThreadPoolExecutor(1) as executor:
        writer = PartWriter(1, Full(tmp_path, RUN_ID), executor)
        with two_ranks(tmp_path, writer=writer) as run:
            with pytest.raises(CheckpointError, match="rank 1's disk") as caught:
                run.trainer.fit(run.loader)
            assert caught.value.__notes__ == ["on rank 1"]
            run.end()
    assert [record.step for record in run.ledger.snapshot().checkpoints] == [0, 2]
    assert len(list(tmp_path.iterdir())) == 2


def test_rank_0_that_cannot_write_its_part_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = durable_files.write_file

    def fail(path: Path, data: FileContent) -> None:
        if path.name == PARTS[0]:
            raise OSError(28, "No space left on device")
        write(path, data)

    with two_ranks(tmp_path) as run:
        monkeypatch.setattr(durable_files, "write_file", fail)
        with pytest.raises(CheckpointError, match="No space left on device"):
            run.trainer.fit(run.loader)
        run.end()
    assert [path.name[:13] for path in tmp_path.iterdir()] == ["step-00000000"]


def test_a_rank_that_does_not_see_the_run_s_checkpoints_says_so(tmp_path: Path) -> None:
    """Its host has not mounted them: a part in a folder of its own would be lost with that host."""
    with ThreadPoolExecutor(1) as executor:
        writer = PartWriter(1, CheckpointFolder(tmp_path / "elsewhere", RUN_ID), executor)
        with two_ranks(tmp_path / "run", writer=writer) as run:
            with pytest.raises(CheckpointError, match=r"Rank 1 does not find .*/elsewhere/step-00000000"):
                run.trainer.fit(run.loader)
            run.end()
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_rank_has_synced_its_part_and_the_part_s_name_before_it_tells_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a host of its own: rank 0 syncs the folder on another one."""
    folder, synced = CheckpointFolder(tmp_path, RUN_ID), list[list[str]]()
    aside = folder.set_aside(2, 1)

    def sync(path: Path) -> None:
        synced.append([path.name, *(file.name for file in path.iterdir())])

    monkeypatch.setattr(durable_files, "sync_folder", sync)
    writer = PartWriter(1, folder, InlineExecutor())
    writer.begin(aside, {PARTS[1]: b"its rows"})
    assert synced == [[aside, PARTS[1]]]
    assert writer.told(patience_s=0) is not None


class Elsewhere(CheckpointFolder):
    """Rank 1's view of the checkpoints: its parts go to a disk of its own, and it does not know."""

    def write_files(self, aside: str, files: dict[str, FileContent]):  # type: ignore[no-untyped-def, override]
        entries = super().write_files(aside, files)
        for name in entries:
            (self.folder / aside / name).unlink()
        return entries


def test_a_part_that_rank_0_does_not_see_is_in_no_checkpoint(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as executor:
        writer = PartWriter(1, Elsewhere(tmp_path, RUN_ID), executor)
        with two_ranks(tmp_path, writer=writer) as run:
            with pytest.raises(CheckpointError, match="No such file"):
                run.trainer.fit(run.loader)
            run.end()
    assert list(tmp_path.iterdir()) == []


class Slow(CheckpointFolder):
    """Rank 1's view of the checkpoints; its second part waits for `go`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, RUN_ID)
        self.go, self.parts = threading.Event(), 0

    def write_files(self, aside: str, files: dict[str, FileContent]):  # type: ignore[no-untyped-def, override]
        self.parts += 1
        if self.parts == 2:
            assert self.go.wait(WAIT_S)
        return super().write_files(aside, files)


def test_no_checkpoint_is_head_before_the_slowest_rank_has_written_its_part(tmp_path: Path) -> None:
    """Training goes on meanwhile, and its features stay."""
    slow, heads = Slow(tmp_path), list[tuple[int, int]]()
    with (
        ThreadPoolExecutor(1) as executor,
        ThreadPoolExecutor(1) as own,
        two_ranks(tmp_path, writer=PartWriter(1, slow, executor), executor=own) as run,
    ):
        step = run.learners[0].step

        def watched(number: int, *args: object) -> dict[str, object]:
            heads.append((number, run.ledger.snapshot().checkpoints[-1].step))
            if number == 3:
                assert run.features.usage().resident_samples > 0
                slow.go.set()
            return step(number, *args)  # type: ignore[arg-type]

        run.learners[0].step = watched  # type: ignore[assignment]
        assert run.trainer.fit(run.loader) == 3
        run.end()
    assert heads == [(1, 0), (2, 0), (3, 0)]
    assert [record.step for record in run.ledger.snapshot().checkpoints] == [2, 3]


@pytest.mark.parametrize("culprit", ["light:5", "light:6"])
def test_isolation_gathers_the_weights_on_all_ranks_whoever_holds_the_samples(
    tmp_path: Path, culprit: str
) -> None:
    """A rank that has none of the tried samples would be missed where the others gather."""
    with two_ranks(tmp_path, bad=[culprit]) as run:
        assert run.trainer.fit(run.loader) == 3
        run.end()
    assert list(run.ledger.find(state=State.QUARANTINED)) == [culprit]
    assert run.learners[0].weight == run.learners[1].weight


def test_a_machine_that_trains_nothing_on_one_sharded_rank_quarantines_no_sample(tmp_path: Path) -> None:
    with two_ranks(tmp_path) as run:
        run.learners[1].breaks_after = 1
        with pytest.raises(Exception, match=r"every sample that one rank holds.*no sample was quarantined"):
            run.trainer.fit(run.loader)
        run.end()
    assert run.ledger.find(state=State.QUARANTINED) == {}
