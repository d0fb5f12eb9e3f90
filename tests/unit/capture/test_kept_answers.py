"""An engine that does not repeat its bits: the tokens that are trained are those first captured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from paceline.capture.settings import CaptureSettings
from paceline.data.answers import AnswerFiles
from paceline.engines.engine import Captured, CaptureRequest
from paceline.errors import ConfigError, EngineError
from paceline.ledger.records import State
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.methods.eagle3.method import Eagle3Method
from paceline.roles import wire
from paceline.roles.wire import build_disagg_online_producer
from paceline.target.facts import TargetFacts
from paceline.testing.memory_features import InMemoryFeatureStore
from paceline.testing.small_run import RUN_ID, SmallRun
from paceline.testing.synthetic import SyntheticEngine
from paceline.types import Feature

ALL = [f"{RUN_ID}:{n}" for n in range(14)]


class Restless(SyntheticEngine):
    """Other answers and other states at every call. `garbles`: it returns other tokens than it was given."""

    calls = 0
    garbles = False
    repeats = False  # what it says of itself

    def __init__(self) -> None:
        super().__init__()
        self.version: dict[str, str] = {}

    @property
    def facts(self) -> TargetFacts:
        return replace(super().facts, repeats_bits=self.repeats, **self.version)  # type: ignore[arg-type]

    def capture(self, group: Sequence[CaptureRequest], features: Sequence[Feature]) -> list[Captured]:
        self.calls += 1
        samples = super().capture([replace(r, seed=r.seed + self.calls) for r in group], features)
        for sample in samples if self.garbles else ():
            sample.tensors["input_ids"][0] += 1
        return samples


class Run(SmallRun):
    engine: Restless

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.engine = Restless()

    def captured(self) -> dict[str, dict[str, torch.Tensor]]:
        """What lies in the feature store, by sample."""
        records = SQLiteLedger(self.db).find(state=State.PRESENT).values()
        return {record.sample_id: self.features.get(record.ref) for record in records}

    def lose(self, *sample_ids: str) -> None:
        self.features.free(
            [(sample_id, g) for sample_id, g in self.features.written() if sample_id in sample_ids]
        )


def test_a_lost_sample_is_captured_again_of_the_tokens_first_written(tmp_path: Path) -> None:
    """Its states are others; its text, and which of it is the answer, are the same. It is captured alone."""
    run = Run(tmp_path)
    run.producer()[1]()
    first = run.captured()
    run.lose(ALL[5], ALL[9])
    run.engine.captured.clear()
    run.producer()[1]()
    again = run.captured()
    assert list(again) == ALL
    for sample_id, tensors in first.items():
        assert torch.equal(again[sample_id]["input_ids"], tensors["input_ids"])
        assert torch.equal(again[sample_id]["loss_mask"], tensors["loss_mask"])
        same = torch.equal(again[sample_id]["aux_hidden_states"], tensors["aux_hidden_states"])
        assert same is (sample_id not in (ALL[5], ALL[9]))
    assert run.engine.captured == [[ALL[5]], [ALL[9]]]
    run.run()
    assert SQLiteLedger(run.db).snapshot().samples_trained == len(ALL)


def test_answers_are_on_the_disk_before_their_samples_are_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A producer that dies between the two has a successor that goes on with the same text."""
    run = Run(tmp_path)
    written: list[tuple[str, list[int]]] = []
    real = run.features.put

    def put(sample_id: str, tensors: dict[str, torch.Tensor], *, generation: int = 0) -> object:
        written.append((sample_id, tensors["input_ids"].tolist()))
        if len(written) == 7:
            raise KeyboardInterrupt
        return real(sample_id, tensors, generation=generation)

    monkeypatch.setattr(run.features, "put", put)
    with pytest.raises(KeyboardInterrupt):
        run.producer()[1]()
    run.producer()[1]()
    assert len(written) == 7 + 10, "the second group was captured twice"
    assert written[4:7] == written[7:10]
    assert {sample_id: tokens["input_ids"].tolist() for sample_id, tokens in run.captured().items()} == dict(
        written
    )


def test_on_several_hosts_the_newest_record_of_an_answer_is_that_of_the_committed_capture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of one that a dead producer had written: an answer of another one may lie between the two."""
    run, names = Run(tmp_path), iter(["0-a", "1-b"])
    monkeypatch.setattr(wire, "AnswerFiles", lambda folder, _: AnswerFiles(folder, next(names)))
    with monkeypatch.context() as patch:
        patch.setattr(run.features, "put", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.producer()[1]()
    run.producer()[1]()
    committed = SQLiteLedger(run.db).find(state=State.PRESENT).values()
    files = AnswerFiles(run.folder / "answers", "2-c")
    kept = {r.ref.ordinal: files.get(r.ref.ordinal, anew=True) for r in committed}
    assert {n: answer and answer.generation for n, answer in kept.items()} == {
        r.ref.ordinal: r.ref.generation for r in committed
    }


def test_a_lost_sample_whose_answer_is_gone_is_quarantined(tmp_path: Path) -> None:
    """Another answer would be another sample."""
    run = Run(tmp_path)
    run.producer()[1]()
    for path in (tmp_path / "answers").iterdir():
        path.unlink()
    run.lose(ALL[5])
    run.producer()[1]()
    [record] = SQLiteLedger(run.db).find(state=State.QUARANTINED).values()
    assert record.sample_id == ALL[5]
    assert "its answer is missing from the kept answers" in record.reason


def test_other_tokens_than_were_given_to_read_stop_the_producer(tmp_path: Path) -> None:
    """Nothing is committed of them."""
    run = Run(tmp_path)
    run.producer()[1]()
    run.lose(ALL[5])
    run.engine.garbles = True
    with pytest.raises(EngineError, match="asked to prefill the tokens of 5, and returned other"):
        run.producer()[1]()
    run.engine.garbles = False
    run.producer()[1]()
    assert list(run.captured()) == ALL


def test_an_engine_that_repeats_its_bits_keeps_its_answers_too(tmp_path: Path) -> None:
    """Every sample's tokens, and which are answers; a lost group is still captured whole, and unchanged."""
    run = SmallRun(tmp_path)
    run.producer()[1]()
    kept = {answer.task_id: answer for answer in AnswerFiles(tmp_path / "answers").all()}
    assert list(kept) == [str(n) for n in range(14)]
    for record in SQLiteLedger(run.db).find(state=State.PRESENT).values():
        tensors, answer = run.features.get(record.ref), kept[record.sample_id.partition(":")[2]]
        assert answer.token_ids == tuple(tensors["input_ids"].tolist())
        [(start, stop)] = answer.spans
        assert tensors["loss_mask"].nonzero()[:, 0].tolist() == list(range(start, stop))
    size = sum(path.stat().st_size for path in (tmp_path / "answers").iterdir())
    run.engine.captured.clear()
    run.features.free([written for written in run.features.written() if written[0] == ALL[5]])
    run.producer()[1]()
    assert run.engine.captured == [ALL[4:8]]
    assert sum(path.stat().st_size for path in (tmp_path / "answers").iterdir()) == size


def test_a_lost_sample_that_comes_back_with_another_answer_keeps_the_one_it_had(tmp_path: Path) -> None:
    """Also with an engine that is to repeat its bits, say on another processor: a note says so, and the
    changed samples are prefilled; the rest of the group is not stored again."""
    run = Run(tmp_path)
    run.engine.repeats = True
    run.producer()[1]()
    first = run.captured()
    run.lose(ALL[5], ALL[6])
    run.engine.captured.clear()
    notes: list[str] = []
    run.report = lambda kind, **told: notes.append(told["message"]) if kind == "note" else None
    run.producer()[1]()
    again = run.captured()
    assert run.engine.captured == [ALL[4:8], ALL[5:7]]
    assert [note[:35] for note in notes] == ["2 lost samples (the first: 5) came "]
    for sample_id, tensors in first.items():
        assert torch.equal(again[sample_id]["input_ids"], tensors["input_ids"])
        assert torch.equal(again[sample_id]["loss_mask"], tensors["loss_mask"])


@pytest.mark.parametrize("change", ["target", "tokenizer", "temperature", "seed", "length"])
def test_an_answer_that_was_not_committed_binds_no_other_settings(tmp_path: Path, change: str) -> None:
    """A killed producer has kept answers and committed none, so settings and target may still change: the
    new ones decide, and the newest answer is the one that is kept."""
    run = Run(tmp_path)
    real = run.features.put
    run.features.put = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run.producer()[1]()
    run.features.put = real  # type: ignore[method-assign]
    old = AnswerFiles(tmp_path / "answers").get(0)
    if change in ("target", "tokenizer"):
        run.engine.version = {f"{'model' if change == 'target' else change}_version": "another"}
    else:
        name = {"temperature": "first_round_temperature", "length": "max_answer_tokens"}.get(change, change)
        run.capture[name] = {"temperature": 0.5, "seed": 3, "length": 4}[change]
    run.producer()[1]()
    new = AnswerFiles(tmp_path / "answers").get(0)
    assert old is not None
    assert new is not None
    assert new.token_ids != old.token_ids
    assert new.token_ids == tuple(run.captured()[ALL[0]]["input_ids"].tolist())
    run.lose(ALL[0])
    run.producer()[1]()
    assert new.token_ids == tuple(run.captured()[ALL[0]]["input_ids"].tolist())


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_an_engine_that_does_not_repeat_its_bits_needs_a_place_for_its_answers() -> None:
    """It is refused without one."""
    with pytest.raises(ConfigError, match="no folder for its answers"):
        build_disagg_online_producer(
            run_id="run",
            engine=Restless(),
            feature_store=InMemoryFeatureStore(budget_bytes=8 << 20),
            prompts=["a"],
            capture=CaptureSettings(features=Eagle3Method().features(Restless().facts), max_answer_tokens=4),
            window_size=1,
        )
