"""Every family: captured states are the model's own, or the family is refused by name at the start."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from paceline.engines import families
from paceline.engines.families import OWN, Way
from paceline.engines.hooks import Hooks
from paceline.engines.probe import Bounds
from paceline.engines.transformers import TransformersEngine
from paceline.errors import CaptureMismatchError, PacelineError
from paceline.evaluation.library_target import LibraryTarget
from paceline.evaluation.speculative import Decoding, plain_generate, speculative_generate
from paceline.evaluation.tree import Drafting
from paceline.methods.drafter import Choose
from paceline.methods.eagle3.method import draft_config
from paceline.precision import CPU
from paceline.target.decoder import TextDecoder
from paceline.target.facts import TargetFacts
from paceline.target.folder import read_config
from paceline.target.head import TargetHead
from paceline.target.layout import decoder_parts
from paceline.target.plain_llama import why_not_plain_llama
from paceline.testing.engine_suite import capture, requests
from paceline.testing.tiny_families import FAMILIES, family_folder

TARGETS = Path(__file__).parents[3] / "docs" / "targets.md"


def documented(family: str) -> tuple[str, str]:
    """How docs/targets.md says that the family is captured and evaluated."""
    rows = [
        line.strip("| ").split(" | ") for line in TARGETS.read_text().splitlines() if line.count("|") == 4
    ]
    [row] = [row for row in rows if family in row[-1].split(", ")]
    return row[0], row[1]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_family_is_captured_and_evaluated_exactly(tmp_path: Path, family: str) -> None:
    """And in the way that the table of the documentation says."""
    folder = family_folder(tmp_path / family, family)
    engine = TransformersEngine(folder, dtype="float32")
    engine.probe()
    target = LibraryTarget(folder, (2, 4, 5), torch.float32)
    _captures_exactly(engine, target.decoder.model)
    _decodes_losslessly(target, prompt=engine.encode("the wind"))
    _has_a_draft_of_its_size(folder, engine.facts, target.decoder.config)
    captured, evaluated = (
        {Way.OWN: "a batch, fast", Way.BATCH: "a batch", Way.ALONE: "alone"}[engine._way],
        "",
    )
    if why_not_plain_llama(read_config(folder)):
        past = target._past
        evaluated = "a tree" if past.has_cache and past.can_cut else "by token" if past.has_cache else "again"
    print(f"| {captured} | {evaluated or 'a tree, fast'} | {family} |")  # noqa: T201 (the table, with pytest -s)
    assert documented(family) == (captured, evaluated or "a tree, fast")


def _captures_exactly(engine: TransformersEngine, model: PreTrainedModel) -> None:
    """A padded group with answers through the cache, against the stock model on each sample alone."""
    layers, last = decoder_parts(model).layers, engine.facts.num_hidden_layers
    assert all(bool(p.any()) for p in model.parameters())  # a capture that drops zeros would pass
    group = requests(engine)
    for request, sample in zip(group, capture(engine, group), strict=True):
        tokens, prompt = sample.tensors["tokens"].long(), len(request.token_ids)
        with torch.inference_mode(), Hooks(layers, [1, last // 2, last]) as own:
            logits = model(tokens[None, :-1], use_cache=False).logits[0]
        early = torch.cat([own.taken[1][0], own.taken[last // 2][0]], dim=-1)
        torch.testing.assert_close(sample.tensors["early"], early, atol=1e-3, rtol=1e-3)
        expected = own.taken[last][0, prompt - 1 :]
        torch.testing.assert_close(sample.tensors["last"], expected, atol=1e-3, rtol=1e-3)
        best = logits[prompt - 1 :].topk(2, -1).values
        clear = best[:, 0] - best[:, 1] > 1e-3
        wrote = tokens[prompt:] == logits[prompt - 1 :].argmax(-1)
        assert bool((wrote | ~clear).all())


def _has_a_draft_of_its_size(folder: Path, facts: TargetFacts, config: PreTrainedConfig) -> None:
    """A Llama layer that a server can build: the target's width, base of its rotary embedding and length."""
    draft = draft_config(TargetHead.load(folder), 48)
    assert (draft.hidden_size, draft.vocab_size) == (facts.hidden_size, facts.vocab_size)
    assert draft.num_attention_heads % draft.num_key_value_heads == 0
    assert draft.head_dim % 2 == 0
    assert draft.intermediate_size == (getattr(config, "intermediate_size", None) or 4 * facts.hidden_size)
    rope = getattr(config, "rope_parameters", None) or {}
    assert draft.rope_theta == rope.get("full_attention", rope).get("rope_theta", 1e4)
    assert draft.max_position_embeddings == (facts.max_positions or 2048)


class Knowing:
    """A draft that knows the target's answer and errs at every third token, in a chain and in a tree."""

    layers = (2, 4, 5)

    def __init__(self, answer: list[int], vocab_size: int) -> None:
        self.answer, self.target_ids = answer, torch.arange(vocab_size)

    def start(self, capacity: int) -> None:
        self.known = None

    def _guesses(self, aux: torch.Tensor, next_ids: torch.Tensor, count: int) -> tuple[list[int], list[int]]:
        """The `count` tokens to come, and wrong ones."""
        assert len(aux) == len(next_ids)
        self.known = 1 if self.known is None else self.known + len(next_ids)
        coming = (self.answer[self.known :] + [3] * count)[:count]
        return coming, [3 + (token + 1) % 50 for token in coming]

    def propose(
        self, aux: torch.Tensor, next_ids: torch.Tensor, count: int, choose: Choose
    ) -> tuple[list[int], list[torch.Tensor | None]]:
        right, wrong = self._guesses(aux, next_ids, count)
        chain = [wrong[i] if (self.known + i) % 3 == 0 else right[i] for i in range(count)]
        return chain, [None] * count

    def propose_tree(
        self, aux: torch.Tensor, next_ids: torch.Tensor, num_tokens: int, branching: int, depth: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Two guesses after the newest token and two after the first of them; the right one comes second."""
        (one, two), (not_one, not_two) = self._guesses(aux, next_ids, 2)
        return (not_one, one, not_two, two), (0, 0, 2, 2)


def _decodes_losslessly(target: LibraryTarget, prompt: tuple[int, ...]) -> None:
    """Chain and tree give the plain answer, which is the model's own choice at every place."""
    model, decoding = target.decoder.model, Decoding(max_new_tokens=12)
    plain = plain_generate(target, prompt, decoding).tokens
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *plain[:-1]]]), use_cache=False).logits[0, len(prompt) - 1 :]
    best = logits.topk(2, -1).values
    assert bool(((torch.tensor(plain) == logits.argmax(-1)) | (best[:, 0] - best[:, 1] < 1e-3)).all())
    drafter = Knowing(plain, logits.shape[-1])
    for drafting in (Drafting(4), Drafting(4, 2, 2)):
        drafted = speculative_generate(target, drafter, prompt, decoding, drafting)
        assert drafted.tokens == plain
        assert sum(drafted.accepted) >= len(drafted.accepted)


def test_only_tested_families_run_on_the_engines_own_attention() -> None:
    """And they are among those that the test above walks over."""
    assert set(FAMILIES) >= OWN
    assert families.own_attention({"model_type": "llama"})
    for other in (
        {"model_type": "mistral"},
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 6},
        {"model_type": "qwen3", "layer_types": ["sliding_attention"]},
    ):
        assert families.own_attention(other) is None


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text", "gpt_oss", "deepseek_v3", "cohere2"])
def test_the_probe_finds_a_family_that_the_own_attention_spoils(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows behind padding, dropped sinks, caps and caches of another width: never in silence."""
    monkeypatch.setattr(families, "_is_plain", lambda _: True)
    with pytest.raises(PacelineError, match=repr(family)):
        TransformersEngine(family_folder(tmp_path / family, family), dtype="float32").probe()


def test_the_probe_finds_a_family_that_padding_spoils(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forced into a padded batch, a family that cannot have one is refused."""
    engine = TransformersEngine(family_folder(tmp_path / "model", "recurrent_gemma"), dtype="float32")
    monkeypatch.setattr(engine, "_way", Way.BATCH)
    with pytest.raises(PacelineError, match="'recurrent_gemma'"):
        engine.probe()


def test_a_cache_that_forgets_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text is read again instead, which gives the same states."""
    decoder = TextDecoder(family_folder(tmp_path / "model", "mamba"), torch.float32, CPU)
    kept, read = decoder.past(), decoder.parts.decoder.forward
    forgets = lambda **given: read(**{**given, "cache_params": None})  # noqa: E731 (a stand-in)
    monkeypatch.setattr(decoder.parts.decoder, "forward", forgets)
    decoder._cache_is_right = None
    assert kept.has_cache
    assert not decoder.past().has_cache


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("gemma", {"gain_offset": 0.0}),
        ("granite", {"logit_scale": 1.0}),
        ("cohere", {"centred": False}),
        ("gemma2", {"soft_cap": 0.0}),
    ],
)
def test_the_probe_finds_a_head_that_is_not_the_models(
    tmp_path: Path, family: str, change: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the trainer would make of the captured states is compared with the model's own logits."""
    from paceline.target import head

    engine = TransformersEngine(family_folder(tmp_path / family, family), dtype="float32")
    known = head.head_layout
    monkeypatch.setattr(head, "head_layout", lambda *parts: replace(known(*parts), **change))
    with pytest.raises(CaptureMismatchError, match="distribution to train on differs"):
        engine.probe()


def test_bounds_follow_from_the_type() -> None:
    """Tight in float32, as wide as rounding in bfloat16, with strays for experts alone."""
    exact = Bounds.of(torch.float32, torch.float32, experts=False)
    rough = Bounds.of(torch.bfloat16, torch.bfloat16, experts=True)
    assert exact.state < rough.state
    assert exact.distribution < rough.distribution
    assert exact.stray == 0 < rough.stray
