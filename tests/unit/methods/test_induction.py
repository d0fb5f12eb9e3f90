"""The first weights of EAGLE-3's attention: heads that find what came next where the text stood before."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from paceline.methods.eagle3 import induction
from paceline.methods.eagle3.method import Eagle3Method
from paceline.methods.eagle3.model import Eagle3Draft
from paceline.target.head import TargetHead
from paceline.testing.tiny_target import HIDDEN, VOCAB, captured_sample, save_target, tiny_target

PART = 16  # tokens that each sample says twice


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> TargetHead:
    """With heads that have room for a search; the usual tiny ones have 4 numbers for it."""
    return TargetHead.load(save_target(tiny_target(head_dim=32), tmp_path_factory.mktemp("target")))


def _repeated(head: TargetHead, seed: int) -> dict[str, torch.Tensor]:
    """A sample whose second half says its first half again, of a target that says what the text says.

    A token's state tells that token and the one before.
    """
    generator = torch.Generator().manual_seed(seed)
    part = torch.randint(3, VOCAB, (PART,), generator=generator)
    ids = torch.cat((part, part, part[:1]))
    tokens = induction.direction(head.embed_tokens[ids].float())
    noise = torch.randn(2 * PART, HIDDEN, generator=generator)
    loss_mask = torch.ones(2 * PART + 1, dtype=torch.uint8)
    loss_mask[:2] = 0
    return {
        "input_ids": ids.to(torch.int32),
        "loss_mask": loss_mask,
        "aux_hidden_states": torch.cat((tokens[:-1], tokens[:-1].roll(1, 0), noise), dim=-1),
        "last_hidden_states": 3.0 * induction.direction(head.lm_head[ids[2:]].float()),
    }


@pytest.fixture(scope="module")
def samples(head: TargetHead) -> list[dict[str, torch.Tensor]]:
    return [_repeated(head, seed) for seed in range(64)]


def _draft(head: TargetHead, samples: list[dict[str, torch.Tensor]], **choices: Any) -> Eagle3Draft:
    return Eagle3Method({"draft_vocab_size": VOCAB, **choices}).build(head, samples, seed=0)


def _weights(draft: Eagle3Draft, sample: Mapping[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        inputs = induction._read(draft, sample).inputs
        return torch.cat([weights for _, weights in induction._weights(draft, inputs)], dim=1)


def test_a_head_of_each_group_finds_what_came_next(
    head: TargetHead, samples: list[dict[str, torch.Tensor]]
) -> None:
    """On samples that it has not seen. Row i of the second half has its like at row i + 1 - PART."""
    draft = _draft(head, samples)
    rows = torch.arange(PART + 1, 2 * PART - 1)
    taken = torch.stack(
        [
            _weights(draft, _repeated(head, seed))[:, rows, rows + 1 - PART].mean(-1)
            for seed in range(100, 110)
        ]
    ).mean(0)
    own, searching, *_ = taken
    even = float((1.0 / (rows + 1)).mean())
    assert searching > 4 * even
    assert own < 2 * even


def test_a_head_of_each_group_reads_its_own_row(
    head: TargetHead, samples: list[dict[str, torch.Tensor]]
) -> None:
    """That row's embedding is the newest token's."""
    diagonal = _weights(_draft(head, samples), _repeated(head, 100)).diagonal(dim1=1, dim2=2).mean(-1)
    assert diagonal[0] > 0.9
    assert diagonal[1] < 0.5


def test_an_untrained_draft_is_better_where_text_repeats_itself(
    head: TargetHead, samples: list[dict[str, torch.Tensor]]
) -> None:
    """Its loss is lower with the heads that copy than with their outputs taken away."""
    draft = _draft(head, samples, ttt_steps=1)
    method = Eagle3Method({"draft_vocab_size": VOCAB, "ttt_steps": 1})
    unseen = method.collate([_repeated(head, seed) for seed in range(100, 110)], torch.device("cpu"))
    with_heads = float(draft(unseen).loss_sum.detach())
    attention = draft.midlayer.self_attn
    group, d = attention.heads // attention.kv_heads, attention.head_dim
    with torch.no_grad():
        for number in range(attention.heads):
            if number % group == 1:
                attention.o_proj.weight[:, number * d : (number + 1) * d] = 0.0
    assert with_heads < float(draft(unseen).loss_sum.detach())


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


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 1), (1, 1)])
def test_any_grouping_of_heads_gives_finite_weights(heads: int, kv_heads: int, tmp_path: Path) -> None:
    """Each head with keys of its own, all with the same, and one alone."""
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 8}
    model = LlamaForCausalLM(LlamaConfig(**{**tiny_target().config.to_dict(), **sizes}))
    few = [captured_sample(model, 20, 2, seed) for seed in range(4)]
    draft = _draft(TargetHead.load(save_target(model, tmp_path)), few)
    assert all(bool(weight.isfinite().all()) for weight in draft.parameters())
    assert float(draft.midlayer.self_attn.o_proj.weight.detach().abs().max()) > 0.0
