"""Conformance suite for draft methods. Subclass it, define `make`, and pytest runs the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.distributed.tensor import DTensor

from paceline.capture.settings import CaptureSettings
from paceline.engines.engine import CaptureRequest
from paceline.engines.transformers import TransformersEngine
from paceline.evaluation.speculative import Decoding, plain_generate, speculative_generate
from paceline.evaluation.target import LlamaTarget
from paceline.evaluation.tree import Drafting
from paceline.features.float8 import SCALES
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.methods.method import DraftMethod, LossSums
from paceline.precision import CPU
from paceline.roles.wire import (
    ConsumerParts,
    build_disagg_online_consumer,
    build_disagg_online_producer,
    run_disagg_online,
)
from paceline.target.head import TargetHead
from paceline.testing.memory_features import InMemoryFeatureStore
from paceline.testing.tiny_folder import make_tiny_folder
from paceline.training.settings import TrainerSettings, TrainingSection
from paceline.training.sharding import Sharding
from paceline.types import States, Targets, Tokens, name_of

Sample = dict[str, torch.Tensor]
PROMPTS = [f"the wind turns a wheel{'s' * n}" for n in range(10)]


class MethodSuite(ABC):
    drafts = True  # False for a method that cannot be decoded with

    @abstractmethod
    def make(self) -> DraftMethod:
        """The method, for a vocabulary of 61 tokens and 8 layers of size 32."""

    engine: TransformersEngine
    head: TargetHead

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def _target(cls, tmp_path_factory: pytest.TempPathFactory) -> None:
        folder = make_tiny_folder(tmp_path_factory.mktemp("target") / "model")
        cls.engine = TransformersEngine(folder, dtype="float32", device="cpu")
        cls.head = TargetHead.load(folder)

    @pytest.fixture(autouse=True)
    def _method(self, _target: None) -> None:
        self.method = self.make()
        self.method.check_target(self.head)
        self.features = self.method.features(self.engine.facts)

    def samples(self) -> list[Sample]:
        """Written answers of 1 to 12 tokens, and a chat whose two answers were given."""
        requests = [
            CaptureRequest(f"s{n}", self.engine.encode(prompt), max_new_tokens=1 + n, seed=n, temperature=0.9)
            for n, prompt in enumerate(PROMPTS)
        ]
        chat = self.engine.encode(PROMPTS[-1])
        requests.append(CaptureRequest("chat", chat, spans=((3, 8), (14, 20))))
        return [sample.tensors for sample in self.engine.capture(requests, self.features)]

    def draft(self) -> torch.nn.Module:
        """Fresh weights, no two of them alike."""
        draft = self.method.build(self.head, self.samples(), seed=3)
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for weight in draft.parameters():
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
        return draft

    def loss(self, draft: torch.nn.Module, samples: list[Sample]) -> LossSums:
        sums: LossSums = draft(self.method.collate(samples, CPU))
        return sums

    def test_the_features_can_be_captured(self) -> None:
        """Names of their own; tokens and targets once each; no layer that the target has not."""
        names = [feature.name for feature in self.features]
        assert len(set(names)) == len(names)
        for kind in (Tokens, Targets):
            assert sum(isinstance(feature.source, kind) for feature in self.features) == 1
        layers = {k for f in self.features if isinstance(f.source, States) for k in f.source.layers}
        assert layers <= set(range(self.engine.facts.num_hidden_layers + 1))
        assert self.method.features(self.engine.facts) == self.features

    def test_first_weights_are_a_pure_function(self) -> None:
        """The same samples and seed give the same bits, on the CPU, every parameter trainable."""
        samples = self.samples()
        one, other = (self.make().build(self.head, samples, seed=3) for _ in range(2))
        state = one.state_dict()
        assert state.keys() == other.state_dict().keys()
        assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in state.items())
        assert all(weight.requires_grad and weight.device == CPU for weight in one.parameters())
        names = {name for name, _ in one.named_parameters()}
        assert set(self.method.learning_rate_scales()) <= names
        assert not isinstance(self.method.adamw_for(), str)

    def test_a_checkpoint_holds_the_whole_draft(self) -> None:
        """Restored from its state dict a draft gives the same loss, bit for bit."""
        draft, samples = self.draft(), self.samples()
        again = self.make().restore(self.head, {k: v.clone() for k, v in draft.state_dict().items()})
        assert torch.equal(self.loss(draft, samples).loss_sum, self.loss(again, samples).loss_sum)

    def test_losses_are_sums_over_tokens(self) -> None:
        """Loss, tokens and metrics of all samples are those of each alone, added up."""
        draft, samples = self.draft(), self.samples()
        whole, parts = self.loss(draft, samples), [self.loss(draft, [sample]) for sample in samples]
        total = torch.stack([part.loss_sum for part in parts]).sum()
        torch.testing.assert_close(whole.loss_sum, total, rtol=1e-4, atol=1e-4)
        assert whole.num_tokens == sum(part.num_tokens for part in parts) == self.method.num_tokens(samples)
        for name, value in whole.metrics.items():
            added = torch.stack([part.metrics[name].double() for part in parts]).sum()
            torch.testing.assert_close(value.double(), added, rtol=1e-4, atol=1e-4)
        means = self.method.mean_metrics({name: float(value) for name, value in whole.metrics.items()})
        assert all(isinstance(value, float) for value in means.values())

    def test_every_weight_learns(self) -> None:
        """Each parameter gets a gradient of finite numbers, not all zero."""
        draft = self.draft()
        self.loss(draft, self.samples()).loss_sum.backward()
        for name, weight in draft.named_parameters():
            assert weight.grad is not None, name
            assert torch.isfinite(weight.grad).all(), name
            assert weight.grad.abs().sum() > 0, name

    def test_a_draft_can_be_divided_among_ranks(self, tmp_path: Path) -> None:
        """By rows: gathered, it has the gradients of the whole draft, and each rank gets its rows of them."""
        samples, whole, divided = self.samples(), self.draft(), self.draft()
        self.loss(whole, samples).loss_sum.backward()
        distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
        try:
            sharding = Sharding(divided, rank=0, ranks=1)
            sharding.gather()
            self.loss(divided, samples).loss_sum.backward()
            sharding.reduce(list(divided.parameters()))
            found = {name: weight.grad for name, weight in divided.named_parameters()}
            for name, weight in whole.named_parameters():
                gradient = found[name]
                assert isinstance(gradient, DTensor)
                torch.testing.assert_close(gradient.to_local(), weight.grad)
        finally:
            distributed.destroy_process_group()

    def test_what_is_no_target_is_not_learned(self) -> None:
        """A sample without a target among its tokens has no token to learn, and a loss of 0."""
        request = CaptureRequest("none", self.engine.encode(PROMPTS[0]))
        [sample] = self.engine.capture([request], self.features)
        assert not sample.tensors[name_of(Targets, self.features)].any()
        sums = self.loss(self.draft(), [sample.tensors])
        assert (float(sums.loss_sum.detach()), sums.num_tokens) == (0.0, 0)

    def test_training_lowers_the_loss(self) -> None:
        """Thirty steps on the same samples: less than at the start."""
        draft, batch = self.draft(), self.method.collate(self.samples(), CPU)
        optimizer = torch.optim.AdamW(draft.parameters(), lr=3e-3)
        losses = []
        for _ in range(30):
            sums: LossSums = draft(batch)
            optimizer.zero_grad()
            (sums.loss_sum / sums.num_tokens).backward()
            optimizer.step()
            losses.append(float(sums.loss_sum.detach()))
        assert losses[-1] < 0.9 * losses[0]

    def test_decoding_with_the_draft_is_lossless(self) -> None:
        """Whatever the draft guesses, the text is the target's own; and it guesses what it says it reads."""
        if not self.drafts:
            pytest.skip("this method cannot be decoded with")
        drafter = self.method.drafter(self.draft(), torch.float32)
        target = LlamaTarget(self.head, drafter.layers, torch.float32)
        decoding = Decoding(max_new_tokens=24)
        for prompt in PROMPTS[:3]:
            ids = self.engine.encode(prompt)
            plain = plain_generate(target, ids, decoding).tokens
            for drafting in (Drafting(3), Drafting(6, 3, 3)):
                assert speculative_generate(target, drafter, ids, decoding, drafting).tokens == plain

    def test_it_goes_from_capture_to_checkpoint(self, tmp_path: Path) -> None:
        """What it declares is captured, stored, sized, collated and trained; nothing else is."""
        ledger = SQLiteLedger(tmp_path / "ledger.db")
        features = InMemoryFeatureStore(budget_bytes=8 << 20)
        capture = CaptureSettings(group_size=4, max_answer_tokens=6, features=self.features)
        shared: dict[str, Any] = {"run_id": "suite", "feature_store": features, "metadata_store": ledger}
        _, drive = build_disagg_online_producer(
            engine=self.engine, prompts=PROMPTS, capture=capture, **shared
        )
        training = TrainingSection(batch_size=4, micro_batch_size=2, device="cpu")
        parts = ConsumerParts(
            method=self.method,
            head=self.head,
            checkpoint_folder=tmp_path / "checkpoints",
            settings=TrainerSettings(3, first_samples=4, training=training),
            block_size=4,
        )
        trainer, loader = build_disagg_online_consumer(parts=parts, resume=True, **shared)
        assert run_disagg_online(trainer=trainer, loader=loader, drive_producer=drive) == 3
        names = {feature.name for feature in self.features}
        scales = {feature.name + SCALES for feature in self.features if feature.narrowed}
        for entry in ledger.read(0, len(PROMPTS)).entries:
            assert set(entry.ref.feature_specs) == names | scales
        newest = ledger.snapshot().checkpoints[-1]
        assert newest.step == 3
        assert (tmp_path / "checkpoints" / newest.name / "draft.safetensors").is_file()
