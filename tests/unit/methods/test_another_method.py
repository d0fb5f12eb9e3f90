"""A second method, with other layers, other rows and no last state: no file of the product knows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from paceline.capture.producer import CaptureSettings
from paceline.engines.engine import TargetEngine
from paceline.engines.transformers import TransformersEngine
from paceline.features.stores.memory import InMemoryFeatureStore
from paceline.ledger.channel import CommittedRefLog
from paceline.ledger.stores.sqlite import SQLiteMetadataStore
from paceline.methods.method import LossSums
from paceline.roles.wire import (
    ConsumerParts,
    build_disagg_online_consumer,
    build_disagg_online_producer,
    run_disagg_online,
)
from paceline.target.facts import TargetFacts
from paceline.target.head import TargetHead
from paceline.testing.synthetic import SyntheticEngine, synthetic_head
from paceline.testing.tiny_folder import make_tiny_folder
from paceline.training.settings import OptimizerSettings, TrainerSettings
from paceline.types import Feature, Rows, States, Targets, Tokens


class Guess(nn.Linear):
    """A draft: called with a batch, it gives the loss."""

    def forward(self, batch: Any) -> LossSums:
        states, words = batch
        logits = super().forward(states)
        return LossSums(nn.functional.cross_entropy(logits, words, reduction="sum"), len(words))


class OneLayerGuess:
    """Guesses a token from the early states of the token before it: a linear map, nothing else."""

    name = "one-layer-guess"

    def features(self, target: TargetFacts) -> tuple[Feature, ...]:
        return (
            Feature("words", Tokens(), dtype="int64"),
            Feature("wanted", Targets(), dtype="bool"),
            Feature("shallow", States((0, 1, 3)), Rows.PREDICTED, dtype="float16"),
        )

    def check_target(self, head: TargetHead) -> None:
        """Every target will do."""

    def build(self, head: TargetHead, samples: Sequence[Any], seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return Guess(3 * head.hidden_size, head.vocab_size)

    def restore(self, head: TargetHead, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
        draft = Guess(3 * head.hidden_size, head.vocab_size)
        draft.load_state_dict(dict(tensors))
        return draft

    def learning_rate_scales(self) -> Mapping[str, float]:
        return {}

    def describe(self, draft: nn.Module) -> dict[str, Any]:
        return {"states": 3}

    def num_tokens(self, samples: Sequence[Mapping[str, torch.Tensor]]) -> int:
        return sum(int(sample["wanted"].sum()) for sample in samples)

    def collate(self, samples: Sequence[Mapping[str, torch.Tensor]], device: torch.device) -> Any:
        assert all(set(sample) == {"words", "wanted", "shallow"} for sample in samples)
        return (
            torch.cat([sample["shallow"] for sample in samples]).float().to(device),
            torch.cat([sample["words"][sample["wanted"]] for sample in samples]).to(device),
        )

    def drafter(self, draft: nn.Module, dtype: torch.dtype) -> Any:
        raise NotImplementedError

    def mean_metrics(self, metrics: Mapping[str, float]) -> dict[str, float]:
        return {}


@pytest.mark.parametrize("target", ["synthetic", "real"])
def test_a_method_of_other_features_goes_from_capture_to_checkpoint(tmp_path: Path, target: str) -> None:
    """What it declares is captured, stored, sized, collated and trained; nothing else is."""
    if target == "real":
        folder = make_tiny_folder(tmp_path / "model")
        engine: TargetEngine = TransformersEngine(folder, dtype="float32")
        head = TargetHead.load(folder)
    else:
        engine, head = SyntheticEngine(), synthetic_head()
    method = OneLayerGuess()
    store = SQLiteMetadataStore(tmp_path / "ledger.db")
    features = InMemoryFeatureStore(budget_bytes=8 << 20)
    capture = CaptureSettings(group_size=4, max_answer_tokens=6, features=method.features(engine.facts))
    _, drive = build_disagg_online_producer(
        run_id="other",
        engine=engine,
        feature_store=features,
        prompts=[f"the wind turns a wheel{'s' * n}" for n in range(10)],
        capture=capture,
        metadata_store=store,
    )
    trainer, loader = build_disagg_online_consumer(
        run_id="other",
        feature_store=features,
        parts=ConsumerParts(
            method=method,
            head=head,
            checkpoint_folder=tmp_path / "checkpoints",
            settings=TrainerSettings(OptimizerSettings(total_steps=3), first_samples=4),
            batch_size=4,
            block_size=4,
        ),
        metadata_store=store,
        resume=True,
    )
    assert run_disagg_online(trainer=trainer, loader=loader, drive_producer=drive) == 3
    for ref in CommittedRefLog(store).poll():
        shapes = {name: spec.shape for name, spec in ref.feature_specs.items()}
        answer = shapes["shallow"][0]
        assert shapes == {
            "words": (ref.num_tokens + 1,),
            "wanted": (ref.num_tokens + 1,),
            "shallow": (answer, 3 * engine.facts.hidden_size),
        }
        assert 1 <= answer <= 6
    head_record = store.checkpoints()[-1]
    assert head_record.step == 3
    assert (tmp_path / "checkpoints" / head_record.name / "draft.safetensors").is_file()
