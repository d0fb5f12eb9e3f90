"""The in-process engine: its states are those of a plain forward, its answers those of generate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from paceline.engines.engine import CaptureRequest
from paceline.engines.transformers import TransformersEngine
from paceline.errors import CaptureMismatchError, ConfigError, EngineError
from paceline.precision import has_bfloat16, torch_dtype
from paceline.testing.engine_suite import requests
from paceline.testing.tiny_folder import make_tiny_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("target") / "model")


@pytest.fixture(scope="module")
def engine(folder: Path) -> TransformersEngine:
    return TransformersEngine(folder, dtype="float32", max_prompt_tokens=64)


def test_states_equal_those_of_a_plain_forward(engine: TransformersEngine, folder: Path) -> None:
    """Aux layers by vLLM's ids, last state before the norm, for every row of a padded group."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    states: list[torch.Tensor] = []
    model.model.layers[-1].register_forward_hook(lambda _m, _i, out: states.append(out))
    for sample in engine.capture(requests(engine)):
        with torch.inference_mode():
            out = model(sample.input_ids[None].long(), output_hidden_states=True)
        aux = torch.cat([out.hidden_states[k][0] for k in engine.facts.aux_layer_ids], dim=-1)
        torch.testing.assert_close(sample.aux_hidden_states, aux, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(sample.last_hidden_states, states.pop()[0], atol=1e-4, rtol=1e-4)


def test_greedy_answers_are_the_targets_own(engine: TransformersEngine, folder: Path) -> None:
    """Token for token what transformers' own greedy generate writes, end of text included."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for request, sample in zip(requests(engine), engine.capture(requests(engine)), strict=True):
        ids = torch.tensor([request.prompt_ids])
        with torch.inference_mode():
            own = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
        assert sample.input_ids.tolist() == own[0, :-1].tolist()


def test_an_answer_ends_with_the_end_of_text(engine: TransformersEngine) -> None:
    """Sampled long enough some answers end by themselves; nothing follows their end."""
    ids = engine.encode("go")
    group = [CaptureRequest(f"s{i}", ids, 40, temperature=1.5, seed=i) for i in range(24)]
    lengths = [sample.input_ids.shape[0] - len(ids) for sample in engine.capture(group)]
    assert min(lengths) < 39
    assert all(2 not in sample.input_ids[len(ids) :].tolist() for sample in engine.capture(group))


def test_sampled_tokens_follow_the_targets_distribution(engine: TransformersEngine, folder: Path) -> None:
    """The first token of many seeds is distributed as the softmax says."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = engine.encode("a rider")
    with torch.inference_mode():
        expected = (model(torch.tensor([ids])).logits[0, -1] / 1.5).softmax(-1)
    count = 600
    group = [CaptureRequest(f"s{i}", ids, 2, temperature=1.5, seed=i) for i in range(count)]
    first = [s.input_ids[len(ids)].item() for s in engine.capture(group) if s.input_ids.shape[0] > len(ids)]
    ended = count - len(first)  # an answer whose first token ends it has no processed answer token
    seen = torch.bincount(torch.tensor(first, dtype=torch.long), minlength=expected.numel()).double()
    seen[2] += ended
    assert (seen / count - expected).abs().sum() < 0.25


def test_the_probe_finds_a_wrong_layer(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """An off-by-one in the layer ids is caught before anything is captured."""
    monkeypatch.setattr(engine, "_captured_ids", (1, 4, 5, 8))
    with pytest.raises(CaptureMismatchError, match="layers differ"):
        engine.probe()
    monkeypatch.setattr(engine, "_captured_ids", (2, 4, 5, 7))
    with pytest.raises(CaptureMismatchError, match="argmax differs"):
        engine.probe()


def test_states_that_are_not_finite_never_leave(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A NaN is an error that names the sample, not a feature."""
    weight = engine._model.model.layers[3].mlp.down_proj.weight
    with torch.no_grad():
        before = weight.clone()
        weight[0, 0] = float("nan")
        with pytest.raises(EngineError, match="first: s0"):
            engine.capture(requests(engine))
        weight.copy_(before)


def test_a_missing_or_broken_model_is_one_clear_error(tmp_path: Path, folder: Path) -> None:
    """The path, why it is needed, and the command that makes one."""
    with pytest.raises(EngineError, match="make model"):
        TransformersEngine(tmp_path / "nowhere")
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (broken / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(EngineError, match="no model that can be loaded"):
        TransformersEngine(broken)


def test_a_target_with_too_few_layers_is_refused(tmp_path: Path, folder: Path) -> None:
    """EAGLE-3 needs three different aux layers."""
    small = make_tiny_folder(tmp_path / "small")
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    with pytest.raises(EngineError, match="at least 7 layers"):
        TransformersEngine(small)


def test_a_prompt_beyond_the_limit_is_refused(engine: TransformersEngine) -> None:
    """Cutting a prompt would change its meaning."""
    with pytest.raises(ConfigError, match="max_prompt_tokens"):
        engine.encode("wind " * 40)


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("flags : fpu avx512_bf16 sse", True),
        ("flags : fpu avx2", False),
        ("Features : fp asimd bf16", True),
        ("", False),
    ],
)
def test_bfloat16_is_used_where_the_processor_has_it(tmp_path: Path, cpuinfo: str, expected: bool) -> None:
    """x86 and Arm name it differently; elsewhere float32 is the faster one."""
    path = tmp_path / "cpuinfo"
    path.write_text(cpuinfo)
    assert has_bfloat16(path) is expected
    assert torch_dtype("auto", path) is (torch.bfloat16 if expected else torch.float32)
    assert torch_dtype("float32", path) is torch.float32
