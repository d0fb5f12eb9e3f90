"""Every family: captured states are the model's own, or the family is refused by name at the start."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from paceline.engines import families
from paceline.engines.families import OWN, Way
from paceline.engines.hooks import Hooks
from paceline.engines.probe import Bounds
from paceline.engines.transformers import TransformersEngine
from paceline.errors import CaptureMismatchError, PacelineError
from paceline.target.layout import decoder_parts
from paceline.testing.engine_suite import capture, requests
from paceline.testing.tiny_families import FAMILIES, family_folder

REFUSED = {"recurrent_gemma": "returns no cache", "mamba": "states after block 1 differ"}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_family_is_captured_exactly_or_refused_by_name(tmp_path: Path, family: str) -> None:
    """A padded group with answers through the cache, against the stock model on each sample alone."""
    folder = family_folder(tmp_path / family, family)
    engine = TransformersEngine(folder, dtype="float32")
    if family in REFUSED:
        with pytest.raises(PacelineError, match=f"{family}.*{REFUSED[family]}"):
            engine.probe()
        return
    engine.probe()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    layers, last = decoder_parts(model).layers, engine.facts.num_hidden_layers
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
