"""Reading the next step's features ahead: the same bytes, and nothing decided early."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from paceline.errors import FeatureMissingError, StoreError
from paceline.loader.read_ahead import ReadAhead
from paceline.testing.light_run import LightRun, RunShape, build_consumer, head_of, uninterrupted
from paceline.testing.samples import sample_ref
from paceline.types import SampleRef

REFS = [sample_ref(number) for number in range(4)]


class Reader:
    """Counts what is read; `gone` samples cannot be."""

    def __init__(self) -> None:
        self.read: list[str] = []
        self.gone: set[str] = set()

    def __call__(self, ref: SampleRef) -> dict[str, Any]:
        self.read.append(ref.sample_id)
        if ref.sample_id in self.gone:
            raise FeatureMissingError(f"{ref.sample_id} is gone.")
        return {"of": ref}


def test_what_was_read_ahead_is_not_read_again() -> None:
    """Each sample is read once, whether it was announced or not."""
    reader = Reader()
    with ThreadPoolExecutor(1) as executor:
        ahead = ReadAhead(reader, executor)
        ahead.start(REFS[:2])
        assert [ahead.get(ref)["of"] for ref in REFS[:3]] == REFS[:3]
    assert sorted(reader.read) == sorted(ref.sample_id for ref in REFS[:3])


def test_a_sample_captured_again_meanwhile_is_read_again() -> None:
    """Bytes belong to a ref: those of an earlier generation are dropped."""
    reader = Reader()
    newer = replace(REFS[0], generation=REFS[0].generation + 7)
    with ThreadPoolExecutor(1) as executor:
        ahead = ReadAhead(reader, executor)
        ahead.start(REFS[:1])
        assert ahead.get(newer)["of"] == newer


def test_a_sample_that_was_missing_ahead_of_time_is_looked_for_again() -> None:
    """It may be there by the time its step begins; if not, that is an error then."""
    reader = Reader()
    reader.gone = {REFS[0].sample_id, REFS[1].sample_id}
    with ThreadPoolExecutor(1) as executor:
        ahead = ReadAhead(reader, executor)
        ahead.start(REFS[:2])
        executor.submit(int).result()  # both have been tried by now
        reader.gone = {REFS[1].sample_id}
        assert ahead.get(REFS[0])["of"] == REFS[0]
        with pytest.raises(FeatureMissingError):
            ahead.get(REFS[1])


@pytest.mark.parametrize("passes", [1, 2])
def test_a_loader_that_reads_ahead_trains_the_same_steps(tmp_path: Path, passes: int) -> None:
    """Plans, lineage and weights are those of a loader that does not; the ledger is never ahead."""
    shape = RunShape(prompts=14, group=4, batch=3, passes=passes, interval=2)
    run = LightRun(tmp_path / "run", shape)
    run.produce()
    ledger, features = run.open_ledger(), run.open_features(owner=False)
    planned_at: list[int] = []

    def report(event: str, **fields: Any) -> None:
        if event == "step":
            planned_at.append(max(trained.step for trained in ledger.history()) - fields["step"])

    with ThreadPoolExecutor(2) as executor:
        trainer, loader = build_consumer(
            shape, ledger, features, run.checkpoints, executor=executor, report=report
        )
        trainer.fit(loader)
    assert set(planned_at) == {0}
    assert head_of(ledger, run.checkpoints) == uninterrupted(shape, tmp_path / "undisturbed")
    ledger.close()


def test_samples_that_the_store_reads_together_are_read_by_one_call() -> None:
    """One that could not be read is looked for again, alone."""
    reader, calls = Reader(), list[list[SampleRef]]()

    def read_many(refs: Sequence[SampleRef]) -> list[dict[str, Any] | StoreError]:
        calls.append(list(refs))
        return [FeatureMissingError("s1 is gone.") if ref == REFS[1] else {"of": ref} for ref in refs]

    with ThreadPoolExecutor(1) as executor:
        ahead = ReadAhead(reader, executor, read_many)
        ahead.start(REFS[:3])
        assert [ahead.get(ref)["of"] for ref in REFS] == REFS
        ahead.start([])
    assert calls == [REFS[:3]]
    assert reader.read == [REFS[1].sample_id, REFS[3].sample_id]
