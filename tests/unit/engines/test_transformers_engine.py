"""The in-process engine: its states are those of a plain forward, its answers those of generate."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from paceline.engines.attention import ROWS
from paceline.engines.cache import PreallocatedLayer
from paceline.engines.capture_rows import PREFILL_ROWS
from paceline.engines.engine import Captured, CaptureRequest
from paceline.engines.transformers import TransformersEngine
from paceline.errors import CaptureMismatchError, ConfigError, EngineError
from paceline.precision import CPU, has_bfloat16, torch_dtype
from paceline.target.agreement import count_disagreements
from paceline.target.tokenizer import PromptEncoder
from paceline.testing.engine_suite import capture, requests
from paceline.testing.forked_commands import ForkedCommands
from paceline.testing.tiny_folder import make_tiny_folder
from paceline.types import Feature, States, Tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("target") / "model")


@pytest.fixture(scope="module")
def engine(folder: Path) -> TransformersEngine:
    return TransformersEngine(folder, dtype="float32")


def test_states_equal_those_of_a_plain_forward(engine: TransformersEngine, folder: Path) -> None:
    """By vLLM's layer ids, the first block's input and the last state before the norm included."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    states: list[torch.Tensor] = []
    model.model.layers[-1].register_forward_hook(lambda _m, _i, out: states.append(out))
    wanted = (
        Feature("tokens", Tokens(), dtype="int32"),
        Feature("some", States((0, 2, 7)), dtype="float32"),
        Feature("last", States((8,)), dtype="float32"),
    )
    for sample in engine.capture(requests(engine), wanted):
        with torch.inference_mode():
            out = model(sample.tensors["tokens"][None, :-1].long(), output_hidden_states=True)
        some = torch.cat([out.hidden_states[k][0] for k in (0, 2, 7)], dim=-1)
        torch.testing.assert_close(sample.tensors["some"], some, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(sample.tensors["last"], states.pop()[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("beginning", [(), (9, 8, 7)], ids=["nothing shared", "three tokens shared"])
@pytest.mark.parametrize("longest", [1, 12], ids=["one length", "many lengths"])
def test_each_of_many_rows_has_the_states_of_its_text_alone(
    engine: TransformersEngine, beginning: tuple[int, ...], longest: int
) -> None:
    """More rows than are read, or attended for, at a time; some have one token of their own, and in every
    third the answer is given. They come back in the order of the group."""
    drawn = torch.randint(
        3,
        engine.facts.vocab_size,
        (ROWS + PREFILL_ROWS + 3, longest + 1),
        generator=torch.Generator().manual_seed(1),
    )
    group = []
    for n, tokens in enumerate(drawn.tolist()):
        is_given, own = n % 3 == 0, 1 + n * 7 % longest
        ids = (*beginning, *tokens[: own + is_given])
        group.append(CaptureRequest(f"s{n}", ids, max_new_tokens=0 if is_given else 1 + n % 5, seed=n))
    layers = (1, 4, 8)
    features = [Feature(f"after {k}", States((k,)), dtype="float32") for k in layers]
    samples = engine.capture(group, (Feature("tokens", Tokens(), dtype="int32"), *features))
    for request, sample in zip(group, samples, strict=True):
        tokens = sample.tensors["tokens"].tolist()
        assert sample.sample_id == request.sample_id
        assert tuple(tokens[: len(request.token_ids)]) == request.token_ids
        plain = engine.plain(tokens[:-1])
        for k in layers:
            torch.testing.assert_close(sample.tensors[f"after {k}"], plain.states[k], atol=1e-4, rtol=1e-4)


def test_given_answers_need_no_cache_of_the_group(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be the largest thing in memory beside the model."""
    group = [CaptureRequest(f"s{n}", tuple(range(3, 9 + n)), max_new_tokens=0) for n in range(3)]
    wanted = (Feature("last", States((8,)), dtype="float32"),)
    made: list[int] = []
    initialised = PreallocatedLayer.lazy_initialization

    def noted(layer: PreallocatedLayer, key: torch.Tensor, value: torch.Tensor) -> None:
        made.append(layer._capacity)
        initialised(layer, key, value)

    monkeypatch.setattr(PreallocatedLayer, "lazy_initialization", noted)
    engine.capture(group, wanted)
    given = len(made)
    engine.capture([replace(one, max_new_tokens=2) for one in group], wanted)
    assert len(made) - given == given + engine.facts.num_hidden_layers


def test_a_layer_that_the_target_has_not_is_refused(engine: TransformersEngine) -> None:
    """Before anything is computed."""
    with pytest.raises(EngineError, match="after 9 decoder blocks"):
        engine.capture(requests(engine), (Feature("late", States((9,)), dtype="float32"),))


@pytest.mark.parametrize("spans", [((3, 2),), ((1, 4), (2, 5)), ((2, 9),)])
def test_spans_that_lie_outside_the_tokens_or_overlap_are_refused(
    spans: tuple[tuple[int, int], ...],
) -> None:
    """They would mark other tokens than those that were meant."""
    with pytest.raises(ValueError, match="spans"):
        CaptureRequest("s", (3, 4, 5, 6, 7), spans)


def test_greedy_answers_are_the_targets_own(engine: TransformersEngine, folder: Path) -> None:
    """Token for token what transformers' own greedy generate writes, end of text included."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for request, sample in zip(requests(engine), capture(engine, requests(engine)), strict=True):
        ids = torch.tensor([request.token_ids])
        with torch.inference_mode():
            own = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
        assert sample.tensors["tokens"].tolist() == own[0].tolist()


def test_an_answer_ends_with_the_end_of_text(engine: TransformersEngine) -> None:
    """Sampled long enough some answers end by themselves; nothing follows their end."""
    ids = engine.encode("go")
    group = [CaptureRequest(f"s{i}", ids, (), 40, temperature=1.5, seed=i) for i in range(24)]
    answers = [sample.tensors["tokens"][len(ids) :].tolist() for sample in capture(engine, group)]
    assert min(len(answer) for answer in answers) < 40
    assert all(2 not in answer[:-1] for answer in answers)
    assert all(len(answer) == 40 or answer[-1] == 2 for answer in answers)


def test_sampled_tokens_follow_the_targets_distribution(engine: TransformersEngine, folder: Path) -> None:
    """The first token of many seeds is distributed as the softmax says."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = engine.encode("a rider")
    with torch.inference_mode():
        expected = (model(torch.tensor([ids])).logits[0, -1] / 1.5).softmax(-1)
    count = 600
    group = [CaptureRequest(f"s{i}", ids, (), 2, temperature=1.5, seed=i) for i in range(count)]
    first = torch.stack([sample.tensors["tokens"][len(ids)] for sample in capture(engine, group)])
    seen = torch.bincount(first, minlength=expected.numel()).double()
    assert (seen / count - expected).abs().sum() < 0.25


def test_the_probe_finds_a_wrong_layer(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """An off-by-one in the layer ids is caught before anything is captured."""
    layers = engine._parts.layers
    for k, reason in ((2, "states after block 2 differ"), (8, "distribution to train on differs")):
        shifted = nn.ModuleList([*layers[: k - 1], layers[k - 2], *layers[k:]])
        monkeypatch.setattr(engine, "_parts", replace(engine._parts, layers=shifted))
        with pytest.raises(CaptureMismatchError, match=reason):
            engine.probe()
        monkeypatch.undo()


def test_states_that_are_not_finite_never_leave(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A NaN is an error that names the sample, not a feature."""
    weight = engine._model.model.layers[3].mlp.down_proj.weight
    with torch.no_grad():
        before = weight.clone()
        weight[0, 0] = float("nan")
        with pytest.raises(EngineError, match="first: s0"):
            capture(engine, requests(engine))
        weight.copy_(before)


FRESH_PROCESS = """
import sys
from pathlib import Path
from paceline.engines.transformers import TransformersEngine
from paceline.testing.engine_suite import capture, requests
sys.path.insert(0, sys.argv[2])
from test_transformers_engine import bits
engine = TransformersEngine(Path(sys.argv[1]), dtype="float32")
sys.stdout.write(bits(capture(engine, requests(engine, temperature=0.9))))
"""


def bits(samples: list[Captured]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        for tensor in sample.tensors.values():
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def test_a_fresh_process_gives_the_same_bits(
    engine: TransformersEngine, folder: Path, forked_commands: ForkedCommands
) -> None:
    """What was captured before a crash can be captured again after it."""
    fresh = forked_commands.script(FRESH_PROCESS, str(folder), str(Path(__file__).parent))
    assert fresh.returncode == 0, fresh.stderr
    assert fresh.stdout == bits(capture(engine, requests(engine, temperature=0.9)))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def no_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"x" * 5000)


def without_a_weight(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.pop("model.layers.3.mlp.up_proj.weight"))


def without_a_head(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.pop("lm_head.weight"))


def with_a_small_weight(folder: Path) -> None:
    name = "model.layers.3.mlp.up_proj.weight"
    change_weights(folder, lambda weights: weights.update({name: weights[name][:10].clone()}))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut_off, "incomplete"),
        (no_safetensors, "header"),
        (without_a_weight, "layers.3.mlp.up_proj"),
        (without_a_head, "lm_head"),
        (with_a_small_weight, "layers.3.mlp.up_proj"),
    ],
)
def test_a_model_that_is_not_whole_is_refused(
    tmp_path: Path, folder: Path, damage: Callable[[Path], None], reason: str
) -> None:
    """Missing weights would be filled with noise, other noise in every process."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    damage(copy)
    with pytest.raises((ConfigError, EngineError), match=reason) as caught:
        TransformersEngine(copy, dtype="float32")
    assert str(copy) in str(caught.value)
    assert "Next: " in str(caught.value)


def test_a_path_that_is_no_folder_is_not_looked_up_elsewhere(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would take models/Tiny for a hub id and load what its cache has under that name."""
    cached = tmp_path / "hub" / "models--models--Tiny"
    shutil.copytree(folder, cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EngineError, match="models/Tiny is not a folder"):
        PromptEncoder(Path("models/Tiny"))
    with pytest.raises(EngineError, match="models/Tiny is not a folder"):
        TransformersEngine(Path("models/Tiny"))


def test_the_version_tells_a_model_from_its_fine_tune(
    engine: TransformersEngine, tmp_path: Path, folder: Path
) -> None:
    """Same config, names, shapes and sizes, one other weight: another model; a copy is the same."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    assert TransformersEngine(copy, dtype="float32").facts.model_version == engine.facts.model_version
    change_weights(copy, lambda weights: weights["model.layers.5.self_attn.q_proj.weight"].mul_(1.01))
    assert TransformersEngine(copy, dtype="float32").facts.model_version != engine.facts.model_version


def test_the_probe_forgives_rounding_alone() -> None:
    """How near two logits must be to change places follows from the type they were computed in."""
    logits, chosen = torch.tensor([[10.0, 9.9, 0.0]]), torch.tensor([1])
    assert count_disagreements(logits, chosen, torch.finfo(torch.bfloat16).eps) == 0
    assert count_disagreements(logits, chosen, torch.finfo(torch.float32).eps) == 1
    assert count_disagreements(logits, torch.tensor([2]), torch.finfo(torch.bfloat16).eps) == 1
    assert count_disagreements(logits, torch.tensor([0]), 0.0) == 0


def test_a_missing_or_broken_model_is_one_clear_error(tmp_path: Path, folder: Path) -> None:
    """The path, why it is needed, and the command that makes one."""
    with pytest.raises(EngineError, match="make model"):
        TransformersEngine(tmp_path / "nowhere")
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (broken / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(ConfigError, match="neither model"):
        TransformersEngine(broken)


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
    assert has_bfloat16(CPU, path) is expected
    assert torch_dtype("auto", CPU, path) is (torch.bfloat16 if expected else torch.float32)
    assert torch_dtype("float32", CPU, path) is torch.float32
