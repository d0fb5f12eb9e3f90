"""Every planted protocol bug is found, most of them by the simulation within a few seeds."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from paceline.ledger.controller import DataFlowController
from paceline.ledger.store import MetadataStore
from paceline.ledger.stores.memory import InMemoryMetadataStore
from paceline.ledger.trial import Trial
from paceline.testing.metadata_protocol_suite import MetadataProtocolSuite
from paceline.testing.metadata_store_suite import MetadataStoreSuite

from paceline.errors import FencedError
from paceline.features.store import Written
from paceline.ledger.records import TrainedSample, TrainedStep
from paceline.testing.light_adapters import InMemoryLightFeatureStore, LightEngine
from paceline.testing.mutants import MUTANTS, seeds_to_detect
from paceline.testing.simulated_run import Shape, simulated_producer
from paceline.training.checkpoint import Checkpoint, CheckpointFolder
from paceline.training.commits import Commits
from paceline.training.recovery import Start, recover

SEEDS = 600


class Suite(MetadataProtocolSuite):
    def make(self) -> MetadataStore:
        return InMemoryMetadataStore()


class StoreSuite(MetadataStoreSuite):
    def make(self) -> MetadataStore:
        return InMemoryMetadataStore()


def a_held_up_deleter_frees_nothing_captured_since() -> None:
    """It asked what to free; before it freed, head was lost and the sample captured again."""
    store, features = InMemoryMetadataStore(), InMemoryLightFeatureStore()
    shape = Shape(prompts=2, group=2)
    simulated_producer(shape, store, features, LightEngine(), lambda *_, **__: None).run()
    consumer = DataFlowController("light", metadata_store=store)
    store.record_train_ack(["light:0"], global_step=1, optimizer_durable=True)

    class HeldUp:
        def free(self, written: Iterable[Written]) -> None:
            [(sample_id, generation)] = written
            store.fall_back(0)
            store.report_lost([sample_id])
            simulated_producer(shape, store, features, LightEngine(), lambda *_, **__: None).run()
            before = dict(features.held)
            features.free([(sample_id, generation)])
            assert features.held == before
            raise StopIteration

    with pytest.raises(StopIteration):
        consumer.release(HeldUp())


def a_death_by_chance_convicts_nobody() -> None:
    """Somebody killed the process while it tried one sample alone."""
    store = InMemoryMetadataStore()

    def killed(tried: object) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trial(store, "t", ["a", "b"]).run(killed)
    assert Trial(store, "t", ["a", "b"]).run(lambda _: True) == []


def the_checkpoint_being_adopted_is_out_of_reach() -> None:
    """A consumer that was taken over had begun to sweep; simulation seed 17316 met it."""
    with tempfile.TemporaryDirectory() as place:
        folder = CheckpointFolder(Path(place), "run0")
        claimed = folder.claim(folder.write(Checkpoint(1, 1, {}, {}, epoch=1)), 2)
        assert claimed is not None
        assert folder.sweep(set(), epoch=1) == []
        assert folder.read(claimed).step == 1


def a_replaced_consumer_claims_nothing() -> None:
    """It was held up while it started; real kill schedule 7415 met it."""
    store = InMemoryMetadataStore()
    held_up, successor = store.acquire_role("consumer", "a"), store.acquire_role("consumer", "b")
    with tempfile.TemporaryDirectory() as place:
        folder = CheckpointFolder(Path(place), "run0")
        written = folder.write(Checkpoint(0, 0, {}, {}, epoch=successor.epoch))
        with pytest.raises(FencedError):
            recover(store, folder, held_up, 0, lambda *_, **__: None)
        assert folder.read(written).step == 0


def a_checkpoint_tells_the_steps_it_contains() -> None:
    """A ledger that never heard of it is rolled forward by them."""
    controller = DataFlowController("run0")
    trained = TrainedStep(1, 0, 1, (TrainedSample(1, "run0:s0", None, True),))
    with tempfile.TemporaryDirectory() as place:
        folder = CheckpointFolder(Path(place), "run0")
        features, start = InMemoryLightFeatureStore(), Start(controller.take_role("consumer"))
        commits = Commits(controller, features, folder, start, None, kept=2, report=lambda *_, **__: None)
        commits.add(trained)
        commits.stage(1, 1, lambda: lambda _: [], {})
        [(_, checkpoint)] = folder.unrecorded([])
        assert checkpoint.lineage == (trained,)


# What the simulation meets too rarely, because something else would have to fail as well.
DIRECTED: dict[str, Callable[[], None]] = {
    "acks in any order": Suite().test_steps_are_acked_one_after_another,
    "acks of any revision": Suite().test_steps_are_acked_one_after_another,
    "intents not checked": Suite().test_a_commit_of_a_revoked_intent_is_refused_whole,
    "release of any generation": a_held_up_deleter_frees_nothing_captured_since,
    "adopted without a claim": the_checkpoint_being_adopted_is_out_of_reach,
    # Captured again for nothing and refused at the commit: no weight and no byte shows it.
    "durable samples lost": StoreSuite().test_a_lost_sample_is_captured_again_but_a_durable_one_is_not,
    # What it would free is covered, and freed by generation: the fence here is a second lock.
    "release without fence": StoreSuite().test_an_old_epoch_is_fenced_on_every_mutation,
    "lineage left out": a_checkpoint_tells_the_steps_it_contains,
    "claimed though replaced": a_replaced_consumer_claims_nothing,
    "one death convicts": a_death_by_chance_convicts_nobody,
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_planted_bug_is_found(name: str, tmp_path: Path) -> None:
    """By a directed test where there is one, else by the simulation within so many seeds."""
    if name not in DIRECTED:
        assert seeds_to_detect(name, SEEDS) is not None, "it survived"
        return
    DIRECTED[name]()
    with MUTANTS[name].planted(), pytest.raises(BaseException):  # noqa: B017, PT011 (any failure will do)
        DIRECTED[name]()


def test_there_are_enough_of_them() -> None:
    """More than two dozen, over every part of the protocol."""
    assert len(MUTANTS) >= 40
