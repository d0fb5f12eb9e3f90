"""The trainer: whatever is lost or damaged on the way, every sample once and the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from paceline import InMemoryMetadataStore, SQLiteMetadataStore
from paceline.capture.backpressure import Watermarks
from paceline.errors import CheckpointError, ConfigError, FencedError, TrainingError
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.loader.loader import StepLoader
from paceline.methods.table import METHODS
from paceline.roles.wire import build_disagg_online_consumer, resolve_ledger, run_disagg_online
from paceline.testing.memory_features import InMemoryFeatureStore
from paceline.testing.small_run import SmallRun, same_bits, weights
from paceline.testing.synthetic import SyntheticEngine
from paceline.training import torch_learner
from paceline.training.checkpoint import CheckpointFolder
from paceline.training.step import Whole


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of a run that nothing happened to."""
    return weights(SmallRun(tmp_path_factory.mktemp("plain")).run())


def test_a_run_trains_every_sample_once_in_prompt_order(tmp_path: Path) -> None:
    """Groups, batches and the short last step: all 14 samples, none twice, all released."""
    run = SmallRun(tmp_path)
    trainer = run.run()
    store = SQLiteMetadataStore(run.db)
    assert trainer.step == 5
    assert store.all_committed_ids() == [f"small:{n}" for n in range(14)]
    assert store.durable_marker()["acked"] == set(store.all_committed_ids())
    assert store.durable_marker()["global_step"] == 5
    assert store.snapshot().usage.resident_samples == 0
    assert run.features.usage().resident_samples == 0
    assert [record.step for record in store.snapshot().checkpoints] == [4, 5]


def test_the_same_configuration_gives_the_same_weights(
    tmp_path: Path, uninterrupted: dict[str, torch.Tensor]
) -> None:
    """Without this nothing below would mean anything; and another prompt set gives other weights."""
    assert same_bits(weights(SmallRun(tmp_path / "a").run()), uninterrupted)
    assert not same_bits(weights(SmallRun(tmp_path / "b", num_prompts=13).run()), uninterrupted)


@pytest.mark.parametrize("steps", [1, 3, 4, 5, 8, 9])
def test_a_consumer_that_vanishes_between_passes_is_replayed(tmp_path: Path, steps: int) -> None:
    """With two passes a sample is needed until its second visit is durable; still the same weights."""
    plain = weights(SmallRun(tmp_path / "plain", passes=2).run())
    run = SmallRun(tmp_path / "killed", passes=2)
    run.producer()[1]()
    doomed, loader = run.consumer()
    die_after(loader, steps)
    with pytest.raises(Killed):
        doomed.fit(loader)
    trainer = run.run()
    assert trainer.step == 10
    assert same_bits(weights(trainer), plain)
    assert SQLiteMetadataStore(run.db).durable_marker()["acked"] == {f"small:{n}" for n in range(14)}


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_a_consumer_that_vanishes_is_replayed_to_the_same_weights(
    tmp_path: Path, uninterrupted: dict[str, torch.Tensor], steps: int
) -> None:
    """The first consumer dies after `steps` steps, between checkpoints or on one."""
    run = SmallRun(tmp_path)
    run.producer()[1]()
    doomed, loader = run.consumer()
    die_after(loader, steps)
    with pytest.raises(Killed):
        doomed.fit(loader)
    trainer = run.run()
    assert same_bits(weights(trainer), uninterrupted)
    assert SQLiteMetadataStore(run.db).durable_marker()["acked"] == {f"small:{n}" for n in range(14)}


SMALL = {"init": "random", "dtype": "float32"}
EAGLE3 = {"name": "eagle3", "draft_vocab_size": 32, "ttt_steps": 2, **SMALL}
DFLASH = {"name": "dflash", "block_size": 3, "layers": 1, "target_states": 3, **SMALL}
# What a step leaves behind or draws, beside the weights: method and training with it, and without.
STATES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "muon's momentum": (EAGLE3, {"optimizer": "muon"}, EAGLE3, {}),
    "the momentum of muon in blocks": (EAGLE3, {"optimizer": {"name": "muon", "block_rows": 8}}, EAGLE3, {}),
    "the average of the weights": (EAGLE3, {"ema_decay": 0.7}, EAGLE3, {}),
    "noise": ({**EAGLE3, "feature_noise": 0.2}, {}, EAGLE3, {}),
    "anchors": ({**DFLASH, "anchors_max": 2}, {"ema_decay": 0.7}, {**DFLASH, "anchors_max": 64}, {}),
}


def run_of(folder: Path, method: dict[str, Any], training: dict[str, Any]) -> SmallRun:
    made = METHODS.find(method["name"]).parse(method).build()
    return SmallRun(folder, method=made, training=training, passes=2)


def kept(run: SmallRun) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint."""
    head = SQLiteLedger(run.db).snapshot().head
    assert head is not None
    files = (run.folder / "checkpoints" / head.name).glob("*.safetensors")
    return {f"{path.name}/{name}": tensor for path in files for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("steps", [1, 3, 6])
@pytest.mark.parametrize("what", STATES)
def test_what_a_step_leaves_or_draws_is_the_same_after_a_kill(tmp_path: Path, what: str, steps: int) -> None:
    """A consumer that dies before its first checkpoint, between two or on one: every tensor of the last
    checkpoint has the same bits, the draft that is given away among them."""
    method, training, other_method, other_training = STATES[what]
    undisturbed = run_of(tmp_path / "plain", method, training)
    undisturbed.run()
    without = run_of(tmp_path / "without", other_method, other_training)
    without.run()
    plain = kept(undisturbed)
    drafts = [{k: t for k, t in kept(r).items() if k.startswith("draft")} for r in (undisturbed, without)]
    assert not same_bits(*drafts), "the setting reaches the trainer"
    run = run_of(tmp_path / "killed", method, training)
    run.producer()[1]()
    doomed, loader = run.consumer()
    die_after(loader, steps)
    with pytest.raises(Killed):
        doomed.fit(loader)
    run.run()
    assert same_bits(kept(run), plain)


class Killed(BaseException):
    """Stands for SIGKILL where one process plays both sides."""


def die_after(loader: StepLoader, steps: int) -> None:
    real = loader.next_step

    def next_step(step: int) -> object:
        if step > steps:
            raise Killed
        return real(step)

    loader.next_step = next_step  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize(("passes", "batch_size"), [(1, 3), (2, 3), (3, 5)])
@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_a_stop_after_the_stream_closed_is_not_its_end(
    tmp_path: Path, passes: int, batch_size: int, steps: int
) -> None:
    """Ctrl-C once all is captured: the consumer ends at a step's end and goes on to the same weights."""
    plain = weights(SmallRun(tmp_path / "plain", passes=passes, batch_size=batch_size).run())
    run = SmallRun(tmp_path / "stopped", passes=passes, batch_size=batch_size)
    run.producer()[1]()
    stop = [False]
    trainer, loader = run.consumer(should_stop=lambda: stop[0])
    real = loader.next_step

    def next_step(step: int) -> object:
        stop[0] = step > steps
        return real(step)

    loader.next_step = next_step  # type: ignore[method-assign, assignment]
    assert trainer.fit(loader) == steps
    assert not loader.exhausted
    trainer = run.run()
    assert same_bits(weights(trainer), plain)
    assert SQLiteMetadataStore(run.db).durable_marker()["acked"] == {f"small:{n}" for n in range(14)}


def test_a_lost_sample_is_captured_again_into_a_full_store(
    tmp_path: Path, uninterrupted: dict[str, torch.Tensor]
) -> None:
    """Samples behind it fill the store and wait for it: they are given up and captured again later."""
    run = SmallRun(tmp_path)
    run.producer()[1]()
    run.features.free([("small:1", 0)])
    full = run.features.usage().resident_bytes
    run.engine = SyntheticEngine()
    trainer, loader = run.consumer()
    producer, drive = run.producer()
    producer._backpressure._marks = Watermarks(budget_bytes=full + 1, group_bytes=full // 2, group_samples=4)
    run_disagg_online(trainer=trainer, loader=loader, drive_producer=drive)
    assert same_bits(weights(trainer), uninterrupted)
    assert len(run.engine.captured) > 1, "more than the lost sample's group"


def test_leases_of_a_call_that_failed_return_with_the_next(
    tmp_path: Path, uninterrupted: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error in the middle of a group closes nothing and skips nothing (the order stays the prompts')."""
    run = SmallRun(tmp_path)
    _, drive = run.producer()
    real, calls = run.engine.capture, []

    def fail_once(group: Any, features: Any) -> Any:
        calls.append(group)
        if len(calls) == 2:
            raise Killed
        return real(group, features)

    monkeypatch.setattr(run.engine, "capture", fail_once)
    with pytest.raises(Killed):
        drive()
    assert not SQLiteMetadataStore(run.db).snapshot().closed
    drive()
    assert same_bits(weights(run.run()), uninterrupted)


def test_rounds_with_one_trainer_and_loader_lose_nothing(
    tmp_path: Path, uninterrupted: dict[str, torch.Tensor]
) -> None:
    """A producer driven a group at a time: what is not a whole block yet waits for the next call."""
    run = SmallRun(tmp_path)
    _, drive = run.producer()
    trainer, loader = run.consumer()
    for _ in range(6):
        run_disagg_online(trainer=trainer, loader=loader, drive_producer=drive, producer_max_rounds=1)
    assert same_bits(weights(trainer), uninterrupted)
    assert loader.exhausted


def test_two_private_stores_are_refused(tmp_path: Path) -> None:
    """Built without a store the sides would never meet; the loop says so instead of training nothing."""
    run = SmallRun(tmp_path)
    producer, drive = run.producer()
    trainer, loader = run.consumer()
    producer.session.ledger = InMemoryMetadataStore()
    trainer.session.ledger = InMemoryMetadataStore()
    with pytest.raises(ConfigError, match="each have a private in-process metadata store"):
        run_disagg_online(trainer=trainer, loader=loader, drive_producer=drive)


def test_a_replaced_consumer_is_fenced(tmp_path: Path) -> None:
    """Once a successor took the role, the old trainer can neither ack nor checkpoint."""
    run = SmallRun(tmp_path)
    run.producer()[1]()
    old, loader = run.consumer()
    die_after(loader, 1)
    with pytest.raises(Killed):
        old.fit(loader)
    run.consumer()
    before = SQLiteMetadataStore(run.db).lsn()
    with pytest.raises(FencedError):
        old.checkpoint()
    with pytest.raises(FencedError):
        old.session.leave()
    assert SQLiteMetadataStore(run.db).lsn() == before


def test_a_damaged_head_falls_back_and_captures_again(
    tmp_path: Path, uninterrupted: dict[str, torch.Tensor]
) -> None:
    """Features released under the damaged checkpoint are captured again, under the same ordinals."""
    run = SmallRun(tmp_path)
    run.producer()[1]()
    doomed, loader = run.consumer()
    die_after(loader, 4)
    with pytest.raises(Killed):
        doomed.fit(loader)
    doomed.checkpoint()  # it may still be being written
    head = SQLiteMetadataStore(run.db).snapshot().checkpoints[-1]
    assert head.step == 4
    (tmp_path / "checkpoints" / head.name / "draft.safetensors").write_bytes(b"damaged")
    captures = len(run.engine.captured)
    trainer, loader = run.consumer()
    assert trainer.step == 2
    assert SQLiteMetadataStore(run.db).lost_ids() == [f"small:{n}" for n in range(6, 12)]
    _, drive = run.producer()
    run_disagg_online(trainer=trainer, loader=loader, drive_producer=drive)
    assert len(run.engine.captured) == captures + 2, "the two groups that hold samples 6..11"
    assert same_bits(weights(trainer), uninterrupted)


def test_no_valid_checkpoint_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    """Starting over silently would train samples twice under one run."""
    run = SmallRun(tmp_path)
    run.run()
    for record in SQLiteMetadataStore(run.db).snapshot().checkpoints:
        (tmp_path / "checkpoints" / record.name / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="None of the 2 checkpoints"):
        run.consumer()


def test_lost_features_are_captured_again(tmp_path: Path, uninterrupted: dict[str, torch.Tensor]) -> None:
    """The whole feature store is gone (a host reboot): a cache miss, not data loss (hole A10)."""
    run = SmallRun(tmp_path)
    run.producer()[1]()
    doomed, loader = run.consumer()
    die_after(loader, 1)
    with pytest.raises(Killed):
        doomed.fit(loader)
    run.features = InMemoryFeatureStore(budget_bytes=8 << 20)
    captures = len(run.engine.captured)
    assert same_bits(weights(run.run()), uninterrupted)
    assert len(run.engine.captured) == captures + 4, "every group once more"
    assert SQLiteMetadataStore(run.db).committed_count() == 14


def test_a_feature_that_goes_missing_under_the_consumer_is_captured_again(
    tmp_path: Path, uninterrupted: dict[str, torch.Tensor]
) -> None:
    """One sample vanishes while both live: the step waits for it and then goes on in plan order."""
    run = SmallRun(tmp_path)
    run.producer()[1]()
    run.features.free([("small:7", 0)])
    trainer, loader = run.consumer()
    run_disagg_online(trainer=trainer, loader=loader, drive_producer=keep_producing(run))
    assert same_bits(weights(trainer), uninterrupted)


def keep_producing(run: SmallRun) -> Any:
    """A producer that comes back whenever a sample is lost, as the supervisor sees to it."""

    def drive(max_rounds: int | None = None, should_stop: Callable[[], bool] | None = None) -> int:
        assert should_stop is not None
        store = SQLiteMetadataStore(run.db)
        total = 0
        while not should_stop():
            mark = store.lsn()
            if store.snapshot().prompts.pending:
                total += run.producer()[1](should_stop=should_stop)
            else:
                store.wait(mark, 0.2)
        return total

    return drive


def test_a_finished_run_stays_finished(tmp_path: Path) -> None:
    """Running the same command again trains nothing more."""
    run = SmallRun(tmp_path)
    first = weights(run.run())
    captures = len(run.engine.captured)
    again = run.run()
    assert same_bits(weights(again), first)
    assert again.step == 5
    assert len(run.engine.captured) == captures


def test_max_steps_ends_the_run_with_a_checkpoint(tmp_path: Path) -> None:
    """The trainer stops at max_steps, the producer is stopped, the rest stays committed."""
    run = SmallRun(tmp_path, max_steps=3)
    assert run.run().step == 3
    assert SQLiteMetadataStore(run.db).snapshot().checkpoints[-1].step == 3


def test_a_loss_that_is_no_number_changes_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step is refused before the update, with advice."""
    run = SmallRun(tmp_path)
    run.producer()[1]()
    trainer, loader = run.consumer()
    die_after(loader, 2)
    with pytest.raises(Killed):
        trainer.fit(loader)
    trainer.checkpoint()  # it may still be being written
    before = weights(trainer)
    trainer, loader = run.consumer()
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(float("nan")))
    with pytest.raises(TrainingError, match=r"train.3.0 fails with each of its 3 samples"):
        trainer.fit(loader)
    assert same_bits(weights(trainer), before)
    assert trainer.session.snapshot().quarantined == 0, "it is not the samples' fault"


def test_resume_needs_a_durable_store(tmp_path: Path) -> None:
    """Neither no store nor an in-memory one has a history; the error is a ValueError with advice."""
    run = SmallRun(tmp_path)
    parts = None
    for store in (None, InMemoryMetadataStore()):
        with pytest.raises(ValueError, match="metadata_db_path"):
            build_disagg_online_consumer(
                run_id="r",
                feature_store=run.features,
                parts=parts,  # type: ignore[arg-type]
                metadata_store=store,
                resume=True,
            )


def test_starting_over_on_a_used_store_is_refused(tmp_path: Path) -> None:
    """Without resume the store's samples would be trained a second time."""
    run = SmallRun(tmp_path)
    run.run()
    with pytest.raises(ConfigError, match="resume=True"):
        run.consumer(resume=False)


def test_both_sides_share_the_store_they_are_given(tmp_path: Path) -> None:
    """A store object is used as it is, a path is opened, neither is a private store, both is an error."""
    store = InMemoryMetadataStore()
    assert resolve_ledger(store, None) is store
    opened = resolve_ledger(None, tmp_path / "db")
    assert isinstance(opened, SQLiteLedger)
    assert not resolve_ledger(None, None).durable
    with pytest.raises(ConfigError, match="one of the two"):
        resolve_ledger(store, tmp_path / "db")


def test_checkpoints_of_a_dead_consumer_that_never_became_head_are_swept(tmp_path: Path) -> None:
    """A folder without a ledger record is nobody's."""
    run = SmallRun(tmp_path)
    run.run()
    folder = CheckpointFolder(tmp_path / "checkpoints", "small")
    (folder.folder / "step-00000099-dead").mkdir()
    run.consumer()
    assert not (folder.folder / "step-00000099-dead").exists()


def test_gradients_are_divided_by_the_tokens_that_the_loss_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The count that the coordinator hands in, known before the step, is the loss's own on one rank."""
    given: list[tuple[float | None, int]] = []
    real = torch_learner.train_step

    def noted(*args: Any) -> Any:
        result = real(*args)
        [whole] = [one for one in args if isinstance(one, Whole)]
        given.append((whole.num_tokens, result["num_tokens"]))
        return result

    monkeypatch.setattr(torch_learner, "train_step", noted)
    SmallRun(tmp_path).run()
    assert len(given) == 5
    assert all(handed_in == counted > 0 for handed_in, counted in given)
