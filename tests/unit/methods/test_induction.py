"""The first weights of EAGLE-3's attention: heads that look for an earlier place like this one and copy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from paceline.methods.eagle3 import induction
from paceline.methods.eagle3.method import Eagle3Method
from paceline.methods.eagle3.model import Attention, Eagle3Draft
from paceline.methods.targets import direction
from paceline.target.head import TargetHead
from paceline.testing.tiny_target import HIDDEN, VOCAB, captured_sample, save_target, tiny_target

PART = 16  # tokens that each sample says twice


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> TargetHead:
    """With heads that have room for a search; the usual tiny ones have 4 numbers for it."""
    return TargetHead.load(save_target(tiny_target(head_dim=32), tmp_path_factory.mktemp("target")))


def _repeated(head: TargetHead, seed: int, between: int = 0) -> dict[str, torch.Tensor]:
    """A sample that ends as it begins, of a target that says what the text says.

    A token's state tells that token and the one before. `between`: other tokens, before the repetition.
    """
    generator = torch.Generator().manual_seed(seed)
    part = torch.randint(3, VOCAB, (PART,), generator=generator)
    ids = torch.cat((part, torch.randint(3, VOCAB, (between,), generator=generator), part, part[:1]))
    tokens = direction(head.embed_tokens[ids].float())
    noise = torch.randn(ids.numel() - 1, HIDDEN, generator=generator)
    loss_mask = torch.ones(ids.numel(), dtype=torch.uint8)
    loss_mask[:2] = 0
    return {
        "input_ids": ids.to(torch.int32),
        "loss_mask": loss_mask,
        "aux_hidden_states": torch.cat((tokens[:-1], tokens[:-1].roll(1, 0), noise), dim=-1),
        "last_hidden_states": 3.0 * direction(head.lm_head[ids[2:]].float()),
    }


@pytest.fixture(scope="module")
def samples(head: TargetHead) -> list[dict[str, torch.Tensor]]:
    return [_repeated(head, seed) for seed in range(64)]


def _draft(head: TargetHead, samples: list[dict[str, torch.Tensor]], **choices: Any) -> Eagle3Draft:
    return Eagle3Method({"draft_vocab_size": VOCAB, **choices}).build(head, samples, seed=0)


def _weights(draft: Eagle3Draft, sample: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """[N, R, R]: of every head and row."""
    heads = range(draft.midlayer.self_attn.heads)
    with torch.no_grad():
        rows = induction._read(draft, sample)
        rows = replace(rows, learning=torch.arange(rows.inputs.shape[0]))
        return torch.cat(list(induction._weights(draft, rows, heads)), dim=1)


def test_the_second_head_of_every_group_finds_what_came_next(
    head: TargetHead, samples: list[dict[str, torch.Tensor]]
) -> None:
    """On samples that it has not seen. Row i of the second half has its like at row i + 1 - PART."""
    draft = _draft(head, samples)
    rows = torch.arange(PART + 2, 2 * PART - 1)
    seen = [_weights(draft, _repeated(head, seed)) for seed in range(100, 110)]
    taken = torch.stack([weights[:, rows, rows + 1 - PART].mean(-1) for weights in seen]).mean(0)
    of_itself = torch.stack([weights[:, rows, rows].mean(-1) for weights in seen]).mean(0)
    assert taken.shape == (4,)  # two groups of two
    assert all(taken[1::2] > 0.6)
    assert all(taken[0::2] < 0.1)
    assert all(of_itself[0::2] > 0.9)
    assert all(of_itself[1::2] < 0.1)


def test_the_search_does_not_mind_the_distance(
    head: TargetHead, samples: list[dict[str, torch.Tensor]]
) -> None:
    """With 200 other tokens between a text and its repetition, the heads find it among 216 rows."""
    draft = _draft(head, samples)
    rows, apart = torch.arange(PART + 202, 2 * PART + 199), PART + 199
    seen = [_weights(draft, _repeated(head, seed, between=200)) for seed in range(100, 104)]
    taken = torch.stack([weights[1::2, rows, rows - apart].mean() for weights in seen])
    assert float(taken.mean()) > 0.15


def test_a_scaled_rotation_does_not_change_the_scores(
    samples: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """Yarn multiplies queries and keys by a factor; the heads allow for it."""
    folder = save_target(tiny_target(head_dim=32), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 32.0, "original_max_position_embeddings": 256}
    (folder / "config.json").write_text(json.dumps({**config, "rope_parameters": yarn}))
    scaled = TargetHead.load(folder)
    draft = _draft(scaled, samples)
    assert draft.midlayer.self_attn.rope.factor > 1.3
    inputs = induction._read(draft, _repeated(scaled, 100)).inputs
    attention, positions = draft.midlayer.self_attn, torch.arange(inputs.shape[0])[None]
    with torch.no_grad():
        queries = attention.query(inputs[None], positions)[0, 0]
        keys = attention.key_value(inputs[None], positions)[0][0, 0]
    scores = (queries * keys).sum(-1) * attention.head_dim**-0.5
    assert 13.0 < float(scores.mean()) < 19.0


def test_an_untrained_draft_with_a_search_is_better_where_text_repeats_itself(
    head: TargetHead, samples: list[dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Than one of which every head that has a purpose reads its own row."""
    method = Eagle3Method({"draft_vocab_size": VOCAB, "ttt_steps": 1})
    unseen = method.collate([_repeated(head, seed) for seed in range(100, 110)], torch.device("cpu"))
    searching = float(_draft(head, samples, ttt_steps=1)(unseen).loss_sum.detach())
    plan = induction._plan

    def without(attention: Attention) -> induction._Plan:
        return replace(plan(attention), kinds=(induction.OWN, None) * attention.kv_heads)

    monkeypatch.setattr(induction, "_plan", without)
    assert searching < 0.8 * float(_draft(head, samples, ttt_steps=1)(unseen).loss_sum.detach())


def test_the_same_samples_give_the_same_bits(
    head: TargetHead, samples: list[dict[str, torch.Tensor]]
) -> None:
    """A start that is repeated after a crash must not change the run."""
    first, second = (_draft(head, samples).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_window_hides_what_lies_before_it(head: TargetHead, samples: list[dict[str, torch.Tensor]]) -> None:
    """As it will in training and in the server."""
    weights = _weights(_draft(head, samples, sliding_window=17), samples[0])
    rows = torch.arange(weights.shape[1])
    back = rows[:, None] - rows
    assert float(weights[:, (back < 0) | (back >= 17)].abs().max()) == 0.0
    assert torch.allclose(weights.sum(-1), torch.ones(weights.shape[:2]))


def test_of_a_long_sample_the_last_rows_are_read(
    head: TargetHead, samples: list[dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory of the start is bounded, however long a sample is; its answer is at its end."""
    draft = _draft(head, samples)
    whole = induction._read(draft, samples[0])
    monkeypatch.setattr(induction, "_ROWS_MAX", 10)
    last = induction._read(draft, samples[0])
    assert torch.equal(last.inputs, whole.inputs[-10:])
    assert torch.equal(last.learning + 2 * PART - 10, whole.learning[whole.learning >= 2 * PART - 10])
    assert torch.equal(last.missing, whole.missing[-last.learning.numel() :])


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 1), (1, 1), (8, 8)])
@pytest.mark.parametrize("length", [2, 3, 20])
def test_few_rows_and_any_grouping_of_heads_give_small_weights(
    heads: int, kv_heads: int, length: int, tmp_path: Path
) -> None:
    """Each head with keys of its own, all with the same, and one alone; from samples that say hardly
    anything. What correlates by chance, or not at all, is not blown up."""
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 16}
    model = LlamaForCausalLM(LlamaConfig(**{**tiny_target().config.to_dict(), **sizes}))
    few = [captured_sample(model, length, 1, seed) for seed in range(2)]
    draft = _draft(TargetHead.load(save_target(model, tmp_path)), few)
    assert max(float(weight.detach().abs().max()) for weight in draft.parameters()) < 50.0
