"""A whole run in one process, small enough for dozens in a test: real EAGLE-3, synthetic target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from paceline.capture.producer import Producer
from paceline.capture.settings import CaptureSettings
from paceline.data.source import PromptList, RunPrompts
from paceline.features.store import FeatureStore
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.loader.loader import StepLoader
from paceline.methods.eagle3.method import Eagle3Method
from paceline.methods.method import DraftMethod
from paceline.roles.wire import (
    ConsumerParts,
    DriveProducer,
    build_disagg_online_consumer,
    build_disagg_online_producer,
    run_disagg_online,
)
from paceline.testing.kill_points import pointed
from paceline.testing.memory_features import InMemoryFeatureStore
from paceline.testing.synthetic import SyntheticEngine, synthetic_head
from paceline.training.group import Group
from paceline.training.settings import (
    CheckpointSection,
    TrainerSettings,
    TrainingSection,
)
from paceline.training.trainer import Trainer

RUN_ID = "small"


class SmallRun:
    """One run folder; build either side as often as a crash would.

    `num_prompts` prompts in groups of 4, steps of 3 samples, a checkpoint every 2 steps. Features
    are private to the process unless a store is given. Every part has its kill points (kill_points.py).
    """

    def __init__(
        self,
        folder: Path,
        *,
        num_prompts: int = 14,
        max_steps: int | None = None,
        passes: int = 1,
        batch_size: int = 3,
        features: FeatureStore | None = None,
        method: DraftMethod | None = None,
        training: Mapping[str, Any] | None = None,
        **capture: Any,
    ) -> None:
        """`method`: EAGLE-3 by default; `training`, `capture`: further settings of trainer and producer."""
        self.folder = folder
        self.num_prompts = num_prompts
        self.max_steps = max_steps
        self.passes = passes
        self.batch_size = batch_size
        self.method = method or Eagle3Method({"draft_vocab_size": 32, "ttt_steps": 2, "init": "random"})
        self.training = training or {}
        self.sharded = False  # whether several ranks divide the draft among them
        self.capture = {"max_prompt_tokens": 32, **capture}
        self.features = features or InMemoryFeatureStore(budget_bytes=8 << 20)
        self.engine = SyntheticEngine()
        self.prompts: list[Any] = [f"prompt {n}" for n in range(num_prompts)]
        self.report: Callable[..., None] = lambda *_, **__: None  # what the producer tells
        self.place: dict[str, Any] = {}  # of the producer among several: `worker` and `timeout_s`
        self.stretches: tuple[int, ...] = ()  # how many prompts there were at first, and after each extension

    @property
    def db(self) -> Path:
        return self.folder / "ledger.db"

    @property
    def source(self) -> RunPrompts:
        return RunPrompts(PromptList(self.prompts), 1, self.stretches)

    def producer(self) -> tuple[Producer, DriveProducer]:
        return build_disagg_online_producer(
            run_id=RUN_ID,
            engine=pointed(self.engine, "engine"),
            feature_store=pointed(self.features, "features"),
            prompts=self.source if self.stretches else self.prompts,
            capture=CaptureSettings(
                features=self.method.features(self.engine.facts),
                # The answers are random, never greedy.
                **{"group_size": 4, "max_answer_tokens": 6, "first_round_temperature": 1.0, **self.capture},
            ),
            window_size=16,
            step_tokens=self.training.get("tokens_per_step"),
            answers_folder=self.folder / "answers",
            metadata_store=pointed(SQLiteLedger(self.db), "ledger"),
            report=self.report,
            **self.place,
        )

    @property
    def settings(self) -> TrainerSettings:
        sizes = {"batch_size": self.batch_size, "micro_batch_size": min(2, self.batch_size)}
        by_tokens = "tokens_per_step" in self.training
        training = TrainingSection.parse(
            {
                "passes": self.passes,
                **({} if by_tokens else sizes),
                "warmup_steps": 1,
                "max_steps": self.max_steps,
                **self.training,
            }
        )
        return TrainerSettings(
            total_steps=5,
            first_samples=4,
            training=training,
            checkpoint=CheckpointSection(interval_steps=2),
            sharded=self.sharded,
        )

    def consumer(
        self,
        *,
        resume: bool = True,
        should_stop: Callable[[], bool] = lambda: False,
        group: Group | None = None,
    ) -> tuple[Trainer, StepLoader]:
        """`group`: of this process, rank 0, and others (ranks_of_a_run.py)."""
        parts = ConsumerParts(
            method=self.method,
            head=synthetic_head(),
            checkpoint_folder=self.folder / "checkpoints",
            settings=self.settings,
            block_size=4,
            starts=self.source.starts,
            size=self.source.size,
        )
        trainer, loader = build_disagg_online_consumer(
            run_id=RUN_ID,
            feature_store=pointed(self.features, "features"),
            parts=parts,
            metadata_store=pointed(SQLiteLedger(self.db), "ledger"),
            resume=resume,
            should_stop=should_stop,
            idle_timeout_s=60.0,
            group=group,
        )
        worker = trainer.ranks.worker
        worker.learner = pointed(worker.learner, "learner")
        return trainer, loader

    def die_in_ack(self, steps: int) -> None:
        """A consumer trains what was captured, and dies in its ack of that number, before it is recorded."""
        doomed, loader = self.consumer()
        session = doomed.session
        real, calls = session.ack, 0

        def die(*acked: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == steps:
                raise KeyboardInterrupt
            real(*acked)

        session.ack = die  # type: ignore[method-assign, assignment]
        with suppress(KeyboardInterrupt):
            doomed.fit(loader)
            raise AssertionError(f"it came to its end with {calls} acks")

    def run(self, group: Group | None = None) -> Trainer:
        """Both sides to the end of the stream."""
        _, drive = self.producer()
        trainer, loader = self.consumer(group=group)
        run_disagg_online(trainer=trainer, loader=loader, drive_producer=drive)
        return trainer


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    assert trainer.draft is not None
    return {name: tensor.clone() for name, tensor in trainer.draft.state_dict().items()}


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
