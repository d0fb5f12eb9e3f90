"""What the plan says of a GPU's memory, against the count of a device without numbers, at several sizes: each
term is large in one of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from paceline.config.load import load_run_config
from paceline.engines.engine import CaptureRequest
from paceline.engines.transformers import TransformersEngine
from paceline.methods.settings import MicroBatch
from paceline.methods.table import METHODS
from paceline.roles.cost_plan import CostPlan, cost_plan
from paceline.roles.device_memory import Extent, capture_bytes
from paceline.roles.footprint import states_of_a_token
from paceline.target.head import TargetHead
from paceline.target.shape import LayerSizes
from paceline.testing.fake_cuda import fake_cuda
from paceline.testing.tiny_folder import make_tiny_folder, write_tokenizer
from paceline.testing.tiny_run import TinyRun
from paceline.training.settings import TrainerSettings, TrainingSection
from paceline.training.step import accumulate_gradients
from paceline.training.torch_learner import TorchLearner

TARGETS = Path(__file__).parents[2] / "targets"
SIZES = LayerSizes(
    hidden_size=64,
    num_hidden_layers=10,
    vocab_size=512,
    intermediate_size=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
WIDE = replace(SIZES, intermediate_size=1024)
HEADS = replace(SIZES, num_attention_heads=16, num_key_value_heads=16, head_dim=64)
WORDS = replace(SIZES, vocab_size=8192)
ABOUT = pytest.approx(1.0, abs=1 / 3)
STEPS: dict[str, Any] = {"name": "eagle3", "init": "random", "draft_vocab_size": 64, "ttt_steps": 3}
BLOCKS: dict[str, Any] = {"name": "dflash", "init": "random", "layers": 4, "block_size": 8}


def counted(knobs: dict[str, Any], sizes: LayerSizes, samples: int, tokens: int, targets: int) -> float:
    """Bytes beside weights and moments, of a step of two micro-batches."""
    config = {**vars(sizes), "rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 4096}
    rows = torch.randn(2, sizes.vocab_size, sizes.hidden_size, dtype=torch.bfloat16)
    norm = torch.ones(sizes.hidden_size, dtype=torch.bfloat16)
    head = TargetHead(config=config, embed_tokens=rows[0], norm_weight=norm, lm_head=rows[1])
    method = METHODS.find(knobs["name"]).parse(knobs).build()
    fused = states_of_a_token(method.features(head.facts))
    sample = {
        "input_ids": torch.arange(tokens) % sizes.vocab_size,
        "loss_mask": torch.arange(tokens) >= tokens - targets,
        "aux_hidden_states": torch.randn(tokens - 1, fused * sizes.hidden_size, dtype=torch.bfloat16),
        "last_hidden_states": torch.randn(targets, sizes.hidden_size, dtype=torch.bfloat16),
    }
    training = TrainingSection.parse(
        {"device": "cuda:0", "batch_size": 2 * samples, "micro_batch_size": samples}
    )
    settings = TrainerSettings(4, first_samples=1, training=training, autocast_dtype=torch.bfloat16)
    with fake_cuda() as device:
        learner = TorchLearner(method, head, settings)
        learner.build([sample])
        assert learner.draft is not None
        device.most_bytes = before = device.bytes
        accumulate_gradients([sample] * 2 * samples, learner.draft, method, settings, what="step 1")
        return device.most_bytes - before


@pytest.mark.parametrize(
    ("knobs", "sizes", "samples", "tokens", "targets"),
    [
        pytest.param({}, SIZES, 1, 300, 250, id="states of every step"),
        pytest.param({}, WIDE, 1, 300, 250, id="the MLP of every step"),
        pytest.param({"ttt_steps": 2}, SIZES, 1, 2500, 20, id="states of the rows"),
        pytest.param({"ttt_steps": 2}, HEADS, 1, 2500, 20, id="keys of the rows"),
        pytest.param({"draft_vocab_size": 4096}, WORDS, 1, 200, 150, id="logits"),
        pytest.param({"recompute": True}, SIZES, 1, 300, 250, id="computed again"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_step_of_eagle3_takes_what_the_plan_says(
    knobs: dict[str, Any], sizes: LayerSizes, samples: int, tokens: int, targets: int
) -> None:
    assert ratio({**STEPS, **knobs}, sizes, samples, tokens, targets) == ABOUT


@pytest.mark.parametrize(
    ("knobs", "sizes", "tokens"),
    [
        pytest.param({}, SIZES, 200, id="states of the places"),
        pytest.param({}, HEADS, 200, id="queries and keys of the places"),
        pytest.param({"anchors_max": 4}, SIZES, 2500, id="states of the rows"),
        pytest.param({"anchors_max": 4}, HEADS, 2500, id="keys of the rows"),
        pytest.param({"layers": 1}, WORDS, 200, id="logits"),
        pytest.param({"name": "dflash2", "conv_kernel_size": 4}, SIZES, 200, id="convolutions"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_step_of_a_block_method_takes_what_the_plan_says(
    knobs: dict[str, Any], sizes: LayerSizes, tokens: int
) -> None:
    assert ratio({**BLOCKS, **knobs}, sizes, 2, tokens, 150) == ABOUT


def ratio(knobs: dict[str, Any], sizes: LayerSizes, samples: int, tokens: int, targets: int) -> float:
    """Of the plan's figure and the counted one; both with gradients and the weights in bfloat16."""
    section = METHODS.find(knobs["name"]).parse(knobs)
    batch = MicroBatch(samples, samples * tokens, samples * targets)
    planned = section.activation_bytes(sizes, batch) + 6 * (section.num_parameters(sizes) or 0)
    found: float = planned / counted(knobs, sizes, samples, tokens, targets)
    return found


@pytest.mark.parametrize(
    ("rows", "prompt", "answer", "change"),
    [
        pytest.param(8, 24, 3, {"hidden_size": 512, "num_attention_heads": 2}, id="the prefill"),
        pytest.param(8, 100, 3, {"intermediate_size": 2048}, id="the MLP of the prefill"),
        pytest.param(16, 40, 3, {"num_attention_heads": 8, "num_key_value_heads": 8}, id="keys and values"),
        pytest.param(32, 12, 3, {"vocab_size": 20_000}, id="logits"),
        pytest.param(32, 30, 0, {"num_attention_heads": 8, "num_key_value_heads": 8}, id="given answers"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_capture_group_takes_what_the_plan_says(
    rows: int, prompt: int, answer: int, change: dict[str, int], tmp_path: Path
) -> None:
    sizes = replace(SIZES, **change)
    folder = target_of(sizes, tmp_path / "model")
    data = {"data": {"path": "chats.jsonl", "answers": "target" if answer else "data"}}
    tiny = make_tiny_folder(tmp_path / "tiny")
    config = load_run_config(TinyRun(tmp_path / "run", tiny, capture={"group_size": rows}, **data).run_file)
    with fake_cuda() as device:
        engine = TransformersEngine(folder, dtype="bfloat16", device="cuda:0")
        features = config.method.features(engine.facts)
        group = [
            CaptureRequest(f"s{n}", (n, *[5] * (prompt - 1)), max_new_tokens=answer, temperature=1.0)
            for n in range(rows)
        ]
        device.most_bytes = before = device.bytes
        engine.capture(group, features)
        found = device.most_bytes - before
    sample = Extent(prompt, answer, answer) if answer else Extent(prompt - 20, 20, 0)
    planned = capture_bytes(config, sizes, sample, states_of_a_token(features), 2)
    assert planned / found == ABOUT


def target_of(sizes: LayerSizes, folder: Path) -> Path:
    config = LlamaConfig(**vars(sizes), max_position_embeddings=4096, bos_token_id=1, eos_token_id=2)
    LlamaForCausalLM(config).save_pretrained(folder)
    return write_tokenizer(folder)


def planned(tmp_path: Path, **given: dict[str, Any]) -> CostPlan:
    """For GPUs of 24 GB, on short prompts whose answers the target writes."""
    run = run_of(tmp_path, **given)
    return cost_plan(load_run_config(run.run_file), gpu="RTX 4090", target_config=TARGETS / "qwen3-8b")


def run_of(tmp_path: Path, **given: dict[str, Any]) -> TinyRun:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "the wind"}\n' * 200)
    sections: dict[str, dict[str, Any]] = {
        "engine": {"name": "vllm", "managed": True, "devices": [0]},
        "target": {"model": "Qwen/Qwen3-8B", "dtype": "bfloat16"},
        "features": {"budget_mib": 1 << 18},
        "data": {"path": str(prompts), "max_prompt_tokens": 1024, "max_answer_tokens": 1536},
        "training": {"device": "cuda:1", "batch_size": 16, "micro_batch_size": 4},
        "method": {"name": "eagle3", "draft_vocab_size": 32000, "ttt_steps": 7},
    }
    merged = {**given, **{name: {**section, **given.get(name, {})} for name, section in sections.items()}}
    return TinyRun(tmp_path / "run", Path("Qwen/Qwen3-8B"), **merged)


def test_activations_that_do_not_fit_are_told_with_what_to_lower(tmp_path: Path) -> None:
    """Answers may be 1,536 tokens long, and nothing says that they are shorter."""
    found = planned(tmp_path)
    [told] = [one for one in found.findings if one.refuses and "cuda:1" in one.what]
    assert "would end out of memory" in told.what
    assert told.next == "Lower training.micro_batch_size (or set method.recompute: true)."
    for mended in ({"method": {"recompute": True}}, {"training": {"micro_batch_size": 2}}):
        again = planned(tmp_path, **mended)
        assert not [one for one in again.findings if "cuda:1" in one.what], again.findings


def test_advice_begins_with_what_takes_most_and_leaves_out_what_saves_nothing(tmp_path: Path) -> None:
    """Block drafts keep few logits, so to compute them again saves them little."""
    run = run_of(tmp_path, capture={"group_size": 2})
    sections = yaml.safe_load(run.run_file.read_text())
    sections["engine"] = {"name": "transformers", "device": "cuda:0"}
    sections["method"] = {"name": "dflash", "anchors_max": 1024, "layers": 5}
    sections["training"] |= {"device": "cuda:0", "micro_batch_size": 16}
    run.run_file.write_text(yaml.safe_dump(sections))
    config = load_run_config(run.run_file)
    found = cost_plan(config, gpu="RTX 4090", target_config=TARGETS / "smollm2-135m")
    [told] = [one for one in found.findings if "would end out of memory" in one.what]
    assert told.next.startswith("Lower training.micro_batch_size or capture.group_size"), found.findings


def test_samples_that_may_be_too_long_for_a_gpu_are_noted(tmp_path: Path) -> None:
    """The prompts of the data are short, and the run file allows long ones."""
    found = planned(tmp_path, data={"max_prompt_tokens": 20_000}, training={"micro_batch_size": 2})
    [told] = [one for one in found.findings if "cuda:1" in one.what]
    assert not told.refuses
    assert "not for the largest that the run file allows" in told.what


def test_an_evaluator_beside_training_counts(tmp_path: Path) -> None:
    """Its copy of the target leaves training too little."""
    prompts = tmp_path / "heldout.jsonl"
    prompts.write_text('{"prompt": "a rider"}\n')
    evaluation = {"prompts": str(prompts), "device": "cuda:1"}
    at_the_end = planned(tmp_path, evaluation=evaluation, training={"micro_batch_size": 2})
    beside = planned(tmp_path, evaluation={**evaluation, "every_steps": 50}, training={"micro_batch_size": 2})
    for found, roles in ((at_the_end, 1), (beside, 2)):
        assert sum(process.device == "cuda:1" for process in found.processes) == roles
        assert any("cuda:1" in one.what for one in found.findings if one.refuses) == (roles == 2)


def test_a_single_sample_that_is_too_much_is_no_advice_for_smaller_micro_batches(tmp_path: Path) -> None:
    found = planned(
        tmp_path,
        data={"max_prompt_tokens": 20_000, "max_answer_tokens": 8000},
        training={"micro_batch_size": 1},
        method={"recompute": True},
    )
    [told] = [one for one in found.findings if "cuda:1" in one.what]
    assert told.next == "Lower data.max_prompt_tokens or data.max_answer_tokens."


def test_the_largest_samples_take_at_least_what_others_do(tmp_path: Path) -> None:
    """A micro-batch in tokens holds more to learn if prompts are short."""
    in_tokens = {"batch_size": 8, "micro_batch_size": 8, "tokens_per_step": 8192, "micro_batch_tokens": 4096}
    found = planned(tmp_path, data={"max_prompt_tokens": 4096}, training=in_tokens)
    [consumer] = [one for one in found.processes if one.role == "consumer"]
    assert consumer.activations_about is not None
    assert consumer.activations_max is not None
    assert consumer.activations_max >= consumer.activations_about


def test_an_evaluator_that_cannot_measure_takes_nothing(tmp_path: Path) -> None:
    """The run trains without it, so it must not refuse the run."""
    prompts = tmp_path / "heldout.jsonl"
    prompts.write_text('{"prompt": "a rider"}\n')
    given: dict[str, Any] = {"prompts": str(prompts), "device": "cuda:1", "every_steps": 50}
    told = cost_plan(
        load_run_config(run_of(tmp_path, evaluation=given).run_file),
        gpu="RTX 4090",
        target_config=TARGETS / "gpt-oss-20b",
    )
    assert any("evaluation.every_steps has no effect" in one.what for one in told.findings)
    assert "evaluator" not in [process.role for process in told.processes]


def test_what_runs_beside_a_server_counts_together(tmp_path: Path) -> None:
    """Training and evaluation each fit into what the server leaves, and both do not."""
    prompts = tmp_path / "heldout.jsonl"
    prompts.write_text('{"prompt": "a rider"}\n')
    small: dict[str, dict[str, Any]] = {
        "target": {"model": "HuggingFaceTB/SmolLM2-135M-Instruct"},
        "engine": {"args": ["--gpu-memory-utilization", "0.9"]},
        "data": {"max_answer_tokens": 256},
        "method": {"draft_vocab_size": 8192, "ttt_steps": 1},
        "training": {"device": "cuda:0", "micro_batch_size": 1},
    }
    evaluation = {"prompts": str(prompts), "device": "cuda:0"}
    for every, said in ((0, []), (50, ["the consumer and the evaluator need about 2.9 GiB"])):
        run = run_of(tmp_path, **small, evaluation={**evaluation, "every_steps": every})
        found = cost_plan(
            load_run_config(run.run_file), gpu="RTX 4090", target_config=TARGETS / "smollm2-135m"
        )
        told = [one.what for one in found.findings if one.what.startswith("The server takes")]
        assert len(told) == len(said), told
        assert all(words in what for words, what in zip(said, told, strict=True))
        assert all(
            "--gpu-memory-utilization, '0.87']" in one.next for one in found.findings if one.what in told
        )


def test_a_server_is_asked_for_no_share_that_its_weights_would_not_fit(tmp_path: Path) -> None:
    """Of 22 GiB, the target's weights take 15 and training 10: no share has room for both."""
    found = planned(tmp_path, training={"device": "cuda:0", "micro_batch_size": 1})
    [told] = [one for one in found.findings if one.what.startswith("The server takes")]
    assert told.next.startswith("Lower what the consumer needs: lower data.max_prompt_tokens or")
