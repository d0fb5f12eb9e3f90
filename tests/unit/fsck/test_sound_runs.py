"""The checker finds nothing wrong with a run at any moment of its life, and says what it saw."""

from __future__ import annotations

import random
import shutil
import tracemalloc
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from paceline import crashpoints
from paceline.features.store import FeatureStore
from paceline.features.stores.directory import DirectoryFeatureStore
from paceline.features.stores.shm import SharedMemoryFeatureStore
from paceline.fsck.checker import check, check_view
from paceline.ledger.stores.sqlite.view import SQLiteView
from paceline.testing.ledger_calls import refs_of
from paceline.testing.light_run import LightRun, RunShape
from paceline.testing.run_by_hand import Nothing, RunByHand
from paceline.testing.small_run import SmallRun


def passes_as_live_and_as_crashed(run: RunByHand, scratch: Path) -> str:
    """The notes on the run as it is, open for writing; a copy without its shared index says the same."""
    live = check(run.folder)
    assert live.errors == check_view(SQLiteView(run.folder / "ledger.db"), run.folder).errors == []
    assert (run.folder / "ledger.db-wal").stat().st_size > 0, "the ledger is open"
    shutil.copytree(run.folder, scratch, ignore=shutil.ignore_patterns("*-shm", "*-gate"))
    assert check(scratch) == live
    shutil.rmtree(scratch)
    return "\n".join(live.notes)


def test_every_moment_of_a_run_is_sound(by_hand: RunByHand, tmp_path: Path) -> None:
    """Looked at after every call, while the writer has it open, and as a crash would leave it."""
    copy = tmp_path / "crashed"

    def look() -> str:
        return passes_as_live_and_as_crashed(by_hand, copy)

    look()
    ids = by_hand.capture(4)
    look()
    by_hand.checkpoint()  # step 0
    by_hand.producer.lease(2)
    refs_of(by_hand.producer, 4)
    by_hand.begin(ids[:2])
    look()
    by_hand.train(ids[:2])
    look()
    record, _ = by_hand.write_checkpoint()
    assert f"checkpoints of later steps than the head's, 0: {record.name}" in look()
    by_hand.consumer.head(record)
    look()
    by_hand.consumer.release(Nothing())
    look()
    for sample_id in ids[2:]:
        by_hand.train([sample_id])
        by_hand.checkpoint(keep=1)
        look()
    assert check(by_hand.folder).counts["archived_samples"] == 4
    by_hand.ledger.close()
    assert check(by_hand.folder).errors == []
    by_hand.open()
    by_hand.train(by_hand.capture(8))
    by_hand.checkpoint()
    assert look() == ""
    assert check(by_hand.folder).counts["samples"] == 12


def test_quarantine_revisions_and_failed_prompts_are_sound(by_hand: RunByHand, tmp_path: Path) -> None:
    """What was quarantined is told with its reason, and the step without it is the one that counts."""
    ids = by_hand.capture(4)
    by_hand.begin(ids[:3])
    by_hand.consumer.quarantine([ids[1]], step=1, reason="loss is nan")
    by_hand.train([ids[0], ids[2]], rev=1)
    by_hand.consumer.quarantine([ids[3]], step=None, reason="never readable")
    by_hand.train([])  # all its samples are bad
    by_hand.producer.lease(1)
    by_hand.producer.fail([4], "task-4: no text", retryable=False)
    by_hand.checkpoint()
    notes = passes_as_live_and_as_crashed(by_hand, tmp_path / "crashed")
    assert "quarantined: run0:s1: loss is nan" in notes
    assert "failed prompt task-4: no text" in notes


def test_a_longer_history_takes_no_more_memory(tmp_path: Path) -> None:
    """Also where hardly anything of it is archived."""
    peaks = []
    for count in (2, 12):
        run = RunByHand(tmp_path / str(count), prompts=100 * count)
        for _ in range(count):
            run.train(run.capture(100))
            run.checkpoint(keep=99)
        tracemalloc.start()
        report = check(run.folder)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert report.errors == []
    assert peaks[1] < peaks[0] + 200_000, peaks


def test_a_run_that_fell_back_is_sound(by_hand: RunByHand, tmp_path: Path) -> None:
    """Its head was damaged: what was freed since is lost, is captured again and trained once."""
    ids = by_hand.capture(6)
    for at in (0, 2, 4):
        by_hand.train(ids[at : at + 2])
        by_hand.checkpoint()
    head = by_hand.consumer.checkpoints()[-1]
    (by_hand.checkpoints.folder / head.name / "weights.bin").write_bytes(b"damaged")
    assert any("weights.bin is damaged" in error for error in check(by_hand.folder).errors)
    by_hand.consumer.acquire()
    assert by_hand.consumer.fall_back(2) == ids[4:]
    notes = passes_as_live_and_as_crashed(by_hand, tmp_path / "crashed")
    assert "2 samples wait to be captured again: run0:s4, run0:s5" in notes
    by_hand.capture(2)
    by_hand.train(ids[4:])
    by_hand.checkpoint()
    assert passes_as_live_and_as_crashed(by_hand, tmp_path / "crashed") == ""


def test_a_run_that_rolled_forward_is_sound(by_hand: RunByHand, tmp_path: Path) -> None:
    """A checkpoint that the ledger had forgotten is adopted, with the samples it trained."""
    ids = by_hand.capture(2)
    by_hand.train(ids)
    by_hand.checkpoint()
    older = tmp_path / "older.db"
    by_hand.ledger._db.execute("VACUUM INTO ?", (str(older),))
    by_hand.train(by_hand.capture(3))
    record, lineage = by_hand.write_checkpoint()
    by_hand.ledger.close()
    older.rename(by_hand.folder / "ledger.db")
    assert check(by_hand.folder).errors == []
    by_hand.open()
    by_hand.consumer.adopt(record, lineage)
    passes_as_live_and_as_crashed(by_hand, tmp_path / "crashed")
    by_hand.train(by_hand.capture(7))
    by_hand.checkpoint(keep=1)
    passes_as_live_and_as_crashed(by_hand, tmp_path / "crashed")
    assert check(by_hand.folder).counts["samples"] == 12


def test_features_lost_after_their_ack_are_no_harm(by_hand: RunByHand) -> None:
    """The weights contain the sample; should it be captured once more, that is not wanted."""
    ids = by_hand.capture(2)
    by_hand.train(ids)
    by_hand.consumer.report_lost(ids[:1])
    assert check(by_hand.folder).errors == []
    by_hand.checkpoint()
    assert check(by_hand.folder).errors == []
    [lease] = by_hand.producer.lease(1)
    [ref] = refs_of(by_hand.producer, lease.ordinal)
    assert ref.sample_id == ids[0]
    assert check(by_hand.folder).errors == []
    assert by_hand.producer.commit([ref]) == []
    assert check(by_hand.folder).errors == []


@pytest.mark.parametrize("shape", [RunShape(passes=3), RunShape(prompts=2, batch=5, passes=2)])
def test_several_passes_are_sound(tmp_path: Path, shape: RunShape) -> None:
    """Every sample is visited so often, also twice in one step where a run is smaller than a batch."""
    run = LightRun(tmp_path, shape)
    run.produce()
    run.consume()
    assert check(tmp_path).errors == []
    assert check(tmp_path, passes=shape.passes).errors == []
    assert any("C2 durable after" in error for error in check(tmp_path, passes=4).errors)
    assert any(error.startswith("C2 visited more than 1") for error in check(tmp_path, passes=1).errors)


def put_five(by_hand: RunByHand, features: FeatureStore) -> tuple[list[str], Mapping[str, int]]:
    """Three committed samples and two that are promised; returns ids and generations of the three."""
    ids = by_hand.capture(3)
    generations = by_hand.ledger.ownership().present
    by_hand.producer.lease(2)
    intent = {ref.sample_id: ref.generation for ref in refs_of(by_hand.producer, 3, 4)}
    for sample_id, generation in [*generations.items(), *intent.items()]:
        features.put(sample_id, {"x": torch.zeros(3)}, generation=generation)
    return ids, generations


def test_slots_are_held_against_the_ledger(by_hand: RunByHand, directory: Path) -> None:
    """Orphans and missing bytes are notes; bytes under another sample's generation are an error."""
    features = SharedMemoryFeatureStore(directory, budget_bytes=1 << 20, owner=True)
    ids, generations = put_five(by_hand, features)
    report = check(by_hand.folder, features=directory)
    assert (report.errors, report.notes, report.counts["slots"]) == ([], [], 5)
    by_hand.producer.give_back([3])
    features.free([(ids[1], 0)])
    features.put("run0:s9", {"x": torch.zeros(3)}, generation=1000)  # begun after the ledger was read
    report = check(by_hand.folder, features=directory)
    assert report.errors == []
    assert any(note.startswith("1 samples have no sealed bytes") and ids[1] in note for note in report.notes)
    assert any(note.startswith("slots without an owner") and "run0:s3" in note for note in report.notes)
    features.put("run0:s7", {"x": torch.zeros(3)}, generation=generations[ids[1]])
    [error] = check(by_hand.folder, features=directory).errors
    assert error.startswith("C9 slot-")
    assert "holds run0:s7 under the generation of: run0:s1" in error
    features.free([("run0:s7", 0)])
    slot = min(directory.glob("slot-*"))
    shutil.copy(slot, directory / "slot-00000099")
    [error] = check(by_hand.folder, features=directory).errors
    assert error == "C9 slot-00000099 and another slot hold the same sample: run0:s0"
    features.destroy()
    shutil.rmtree(directory, ignore_errors=True)
    report = check(by_hand.folder, features=directory)
    assert report.errors == []
    assert any("captured again at the next start: run0:s0" in note for note in report.notes)


def test_files_that_hosts_share_are_held_against_the_ledger(by_hand: RunByHand, directory: Path) -> None:
    """As slots are. A file that is cut off or has another one's name is as good as missing."""
    features = DirectoryFeatureStore(directory, budget_bytes=1 << 20, owner=True)
    ids, generations = put_five(by_hand, features)
    report = check(by_hand.folder, features=directory)
    assert (report.errors, report.notes, report.counts["slots"]) == ([], [], 5)
    by_hand.producer.give_back([3])
    first, second, third, *_ = (found.path for found in features._files.list())
    second.write_bytes(second.read_bytes()[:-1])
    shutil.copy(first, third)
    report = check(by_hand.folder, features=directory)
    assert report.errors == []
    assert any(note.startswith("2 samples have no sealed bytes") and ids[1] in note for note in report.notes)
    [left] = [note for note in report.notes if note.startswith("slots without an owner")]
    assert "run0:s3" in left
    assert second.name in left
    features.put("run0:s7", {"x": torch.zeros(3)}, generation=generations[ids[1]])
    [error] = check(by_hand.folder, features=directory).errors
    assert "holds run0:s7 under the generation of: run0:s1" in error


@pytest.mark.parametrize("seed", range(4))
def test_a_run_is_sound_at_every_named_place(tmp_path: Path, seed: int) -> None:
    """Looked at in the middle of whatever producer, trainer, recovery and ledger do, over three deaths."""
    rng = random.Random(seed)
    run = LightRun(
        tmp_path, RunShape(prompts=9, passes=1 + seed % 2, bad_prompt=1, bad_sample=7, kept=2 + seed // 2)
    )
    looked: Counter[str] = Counter()
    lives = iter([*(rng.randrange(60, 200) for _ in range(3)), 100_000])
    left = [next(lives)]

    def look(name: str) -> None:
        if looked[name] < 6:
            looked[name] += 1
            report = check(run.folder, passes=run.shape.passes)
            assert report.errors == [], name
        left[0] -= 1
        if left[0] == 0:
            left[0] = next(lives)
            raise KilledError

    crashpoints.watch(look)
    try:
        for _ in range(4):
            try:
                run.produce()
                run.consume()
            except KilledError:
                shutil.rmtree(run.feature_folder, ignore_errors=True)
    finally:
        crashpoints.watch(None)
    assert sum(looked.values()) > 150
    assert check(run.folder, passes=run.shape.passes).errors == []


class KilledError(BaseException):
    """The process is gone."""


def test_a_step_may_visit_a_sample_twice(tmp_path: Path) -> None:
    """Where a run has fewer samples than a batch, or its last block has, its passes meet in one step."""
    SmallRun(tmp_path, num_prompts=3, passes=2, batch_size=4).run()
    assert check(tmp_path).errors == []


def test_a_store_that_hosts_share_is_found_where_this_host_has_mounted_it(
    by_hand: RunByHand, directory: Path
) -> None:
    """By its identity. Of one that is not seen here nothing is said but what to do."""
    features = DirectoryFeatureStore(directory / "run", budget_bytes=1 << 20, owner=True)
    put_five(by_hand, features)
    lies = {"folder": "/on/the/first/host/run", "store": (directory / "run" / "store-id").read_text()}
    by_hand.ledger.set_facts(None, {"features_lie": lies})
    report = check(by_hand.folder, mounted=directory)
    assert (report.errors, report.notes, report.counts["slots"]) == ([], [], 5)
    for mounted in (None, directory / "empty"):
        report = check(by_hand.folder, mounted=mounted)
        assert report.errors == []
        [note] = report.notes
        assert "does not see the run's feature store" in note
        assert "paceline fsck RUN.yaml" in note
    (directory / "run" / "store-id").write_text("f" * 32)
    [note] = check(by_hand.folder, mounted=directory).notes
    assert "does not see the run's feature store" in note
