"""What runs on a GPU, on a device without numbers: no tensor is left on the host, no two types are mixed, and
the host waits for the device only where it is meant to."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from paceline.engines.engine import CaptureRequest
from paceline.engines.transformers import TransformersEngine
from paceline.errors import ConfigError
from paceline.evaluation.library_target import LibraryTarget
from paceline.evaluation.speculative import Decoding, speculative_generate
from paceline.evaluation.target import LlamaTarget
from paceline.evaluation.tree import Drafting
from paceline.features import codec
from paceline.features.float8 import narrowed, widened
from paceline.methods.dflash import attention
from paceline.methods.dflash.attention import KERNEL_HEAD_DIM
from paceline.methods.method import DraftMethod
from paceline.methods.rope import Rope
from paceline.methods.table import METHODS
from paceline.target.head import TargetHead
from paceline.testing.fake_cuda import CUDA, fake_cuda
from paceline.testing.tiny_folder import make_tiny_folder
from paceline.training.settings import TrainerSettings, TrainingSection
from paceline.training.torch_learner import TorchLearner

SMALL: dict[str, Any] = {"draft_vocab_size": 24, "ttt_steps": 2}
BLOCK: dict[str, Any] = {"block_size": 4, "layers": 1, "target_states": 3}
METHODS_OF: dict[str, dict[str, Any]] = {
    "eagle3": {**SMALL, "loss": "lk_lambda", "transfer": "float8"},
    "eagle3 with norms and a window": {**SMALL, "fc_norm": True, "norm_output": True, "sliding_window": 17},
    "eagle3 computed again": {**SMALL, "norm_before_fc": True, "recompute": True, "train_lm_head": False},
    "p-eagle": {**SMALL, "loss": "tv"},
    "dflash": {**BLOCK, "causal": True, "loss": "lk_alpha"},
    "dflash in tiles": {**BLOCK, "attention": "tiles"},
    "dspark": {**BLOCK, "markov_rank": 6, "weighting": "dpace", "recompute": True},
    "domino": {**BLOCK, "gru_hidden_dim": 12, "emb_dim": 5, "loss": "kl"},
    "dflash2": {**BLOCK, "selector_rank": 6, "selector_top_k": 5, "conv_group_size": 8},
}
# Loss, metrics and the gradients' norm, after the whole step was asked of the device.
MEANT = [
    "to_copy in training.step._backward",
    "local_scalar_dense in training.step._mean_and_clip",
]
Sample = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("target") / "model", head_dim=KERNEL_HEAD_DIM)


@pytest.fixture(scope="module")
def head(folder: Path) -> TargetHead:
    return TargetHead.load(folder)


@pytest.fixture(scope="module")
def engine(folder: Path) -> TransformersEngine:
    return TransformersEngine(folder, dtype="bfloat16", device="cpu")


@cache
def method_of(case: str) -> DraftMethod:
    method: DraftMethod = METHODS.find(case.partition(" ")[0]).parse(METHODS_OF[case]).build()
    return method


def group_of(engine: TransformersEngine) -> list[CaptureRequest]:
    """One is drawn, one is not."""
    return [
        CaptureRequest(f"s{n}", engine.encode("the wind" * (1 + n)), max_new_tokens=5, temperature=float(n))
        for n in range(2)
    ]


def samples_of(engine: TransformersEngine, method: DraftMethod) -> list[Sample]:
    captured = engine.capture(group_of(engine), method.features(engine.facts))
    return [sample.tensors for sample in captured]


def learner_of(
    method: DraftMethod, head: TargetHead, dtype: torch.dtype | None, **knobs: Any
) -> TorchLearner:
    training = TrainingSection.parse({"device": "cuda:0", "micro_batch_size": 2, **knobs})
    return TorchLearner(
        method, head, TrainerSettings(4, first_samples=2, training=training, autocast_dtype=dtype)
    )


@pytest.mark.parametrize("case", METHODS_OF)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_step_makes_the_host_wait_for_its_figures_alone(
    case: str, engine: TransformersEngine, head: TargetHead
) -> None:
    """In bfloat16, over float32 weights; the gradients reach every weight."""
    method = method_of(case)
    samples = samples_of(engine, method)
    with fake_cuda() as device:
        learner = learner_of(method, head, torch.bfloat16)
        learner.build(samples)
        device.waits.clear()
        learner.step(1, samples)
        assert device.waits == MEANT
        assert learner.draft is not None
        assert {(w.device, w.dtype) for w in learner.draft.parameters()} == {(CUDA, torch.float32)}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_block_draft_in_tiles_compiles_nothing(
    engine: TransformersEngine, head: TargetHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a machine on which no kernel can be compiled trains it. The other way ends with advice, and the same
    run may go on in tiles."""

    def without_compiler(*_: Any, **__: Any) -> None:
        raise BackendCompilerFailed(None, RuntimeError("Failed to find C compiler."), None)

    samples = samples_of(engine, method_of("dflash"))
    with fake_cuda():
        monkeypatch.setattr(attention, "_compiled_flex_attention", lambda: without_compiler)
        kernel, tiles = (learner_of(method_of(name), head, None) for name in ("dflash", "dflash in tiles"))
        kernel.build(samples)
        with pytest.raises(ConfigError, match=r"Triton could not compile .*method.attention: tiles"):
            kernel.step(1, samples)
        tiles.load({name: bytes(content) for name, content in kernel.files().items()})
        tiles.step(1, samples)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", {"name": "muon", "block_rows": 8}])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_training_goes_on_from_a_checkpoint_on_the_device(
    optimizer: Any, engine: TransformersEngine, head: TargetHead
) -> None:
    """In float32, with the average of the weights: what is written from the device is read onto it again."""
    method = method_of("eagle3")
    samples = samples_of(engine, method)
    with fake_cuda() as device:
        first, second = (learner_of(method, head, None, optimizer=optimizer, ema_decay=0.9) for _ in range(2))
        first.build(samples)
        first.step(1, samples)
        files = first.files()
        second.load({name: bytes(content) for name, content in files.items()})
        device.waits.clear()
        second.step(2, samples)
        assert device.waits == MEANT
        assert second.files().keys() == files.keys()


def test_frequencies_are_copied_to_a_device_once() -> None:
    """Those of a scaled rotary embedding come from the host."""
    rope, positions = Rope(8, 10000.0, torch.rand(4)), torch.arange(5)
    with fake_cuda() as device:
        there = positions.pin_memory().to(CUDA, non_blocking=True)
        rope.tables(there)
        assert device.waits == ["to_copy in methods.rope.Rope._inverse"]
        cos, _ = rope.tables(there)
        assert (len(device.waits), cos.device) == (1, CUDA)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_group_is_captured_on_the_device(folder: Path) -> None:
    """By the engine's own attention and cache; states are narrowed there, and the store copies them."""
    method = method_of("eagle3")
    with fake_cuda():
        engine = TransformersEngine(folder, dtype="bfloat16", device="cuda:0")
        features = method.features(engine.facts)
        for sample in engine.capture(group_of(engine), features):
            stored = narrowed(sample.sample_id, sample.tensors, features)
            devices = {name: tensor.device.type for name, tensor in stored.items()}
            assert devices.pop("input_ids") == devices.pop("loss_mask") == "cpu"
            assert set(devices.values()) == {"cuda"}
            read = widened(bytes_and_back(sample.sample_id, stored))
            assert {name: tensor.shape for name, tensor in read.items()} == {
                name: tensor.shape for name, tensor in sample.tensors.items()
            }


def bytes_and_back(sample_id: str, tensors: Mapping[str, torch.Tensor]) -> Sample:
    layout = codec.layout_of_tensors(sample_id, tensors)
    payload, description = memoryview(bytearray(layout.num_bytes)), codec.describe(sample_id, layout)
    written = codec.write(layout, description, tensors, payload)
    found, digest = codec.read(layout, description, payload)
    assert digest == written
    return found


@pytest.mark.parametrize(
    ("case", "kind"),
    [("eagle3 with norms and a window", LlamaTarget), ("p-eagle", LlamaTarget), ("dspark", LibraryTarget)],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_draft_is_measured_on_the_device(
    case: str, kind: type[Any], engine: TransformersEngine, head: TargetHead, folder: Path
) -> None:
    """With a chain and a tree, in bfloat16."""
    method = method_of(case)
    draft = method.build(head, samples_of(engine, method), 0)
    with fake_cuda():
        drafter = method.drafter(draft.to(CUDA), torch.bfloat16)
        of = head if kind is LlamaTarget else folder
        target = kind(of, drafter.layers, torch.bfloat16, CUDA)
        for drafting in (Drafting(2), Drafting(4, 2, 2)):
            found = speculative_generate(target, drafter, (1, 5, 9), Decoding(3), drafting)
            assert len(found.tokens) == 3


def test_a_tensor_that_was_left_on_the_host_is_found() -> None:
    """And so are a type that does not fit, and what nobody can know without waiting."""
    with fake_cuda() as device:
        there = torch.ones(3, 4, device=CUDA)
        with pytest.raises(RuntimeError, match="two devices"):
            there + torch.ones(3, 4)
        with pytest.raises(RuntimeError, match="takes one type"):
            there @ there.bfloat16().T
        with pytest.raises(Exception, match="nonzero"):
            there[there > 0]
        device.waits.clear()
        assert (float(there.sum()), there.cpu().device.type) == (1.0, "cpu")
        torch.ones(3).to(CUDA)
        assert device.waits == ["local_scalar_dense in a test", "to_copy in a test", "to_copy in a test"]
