"""The first weights in closed form: what the first layer attends to, and that its guesses are better than
noise."""

from __future__ import annotations

import math

import pytest
import torch
from block_case import HEADS, head, method_of, samples

from paceline.methods.dflash.attention import KeyValue
from paceline.methods.dflash.model import DFlashDraft, Layer
from paceline.precision import CPU
from paceline.testing.tiny_target import captured_sample, tiny_target


def weights_of_the_first_layer(draft: DFlashDraft, rows: int) -> torch.Tensor:
    """float32 [N, B, rows + B]: what every place of a block after `rows` rows attends to."""
    sample = captured_sample(tiny_target(), rows + 4, 2, seed=11)
    seen: list[torch.Tensor] = []

    def attend(query: torch.Tensor, context: KeyValue, own: KeyValue) -> torch.Tensor:
        keys = torch.cat((context[0], own[0]), dim=2)[0].repeat_interleave(2, 0)
        seen.append((query[0] @ keys.mT / math.sqrt(8)).softmax(-1))
        return query

    with torch.no_grad():
        context = draft.context(sample["aux_hidden_states"][:rows], torch.arange(rows))
        draft.places(sample["input_ids"][rows : rows + 1].long(), torch.tensor([rows]), context, attend)
    return seen[0]


def test_the_first_layer_looks_at_the_anchor_and_at_the_nearest_row() -> None:
    """By construction, for texts of any length. The even heads of the tiny target look at rows."""
    draft = method_of("dflash").build(head(), samples(), seed=3)
    for rows in (5, 40):
        weights = weights_of_the_first_layer(draft, rows)
        of_rows, of_anchor = weights[0::2, 1:, :rows], weights[1::2, 1:, rows]
        assert of_anchor.min() > 0.9
        assert of_rows.sum(-1).min() > 0.9
        assert (of_rows.argmax(-1) == rows - 1).all()


@pytest.mark.parametrize("name", HEADS)
def test_a_regressed_draft_guesses_better_than_noise(name: str) -> None:
    """Its first loss is the lower one, on samples that it was not made from."""
    losses = []
    others = [captured_sample(tiny_target(), 24, 4, seed) for seed in range(20, 26)]
    for init in ("regression", "random"):
        method = method_of(name, init=init)
        draft = method.build(head(), [*samples(), *others[:4]], seed=3)
        sums = draft(method.collate(others[4:], CPU))
        losses.append(float(sums.metrics["loss_0"].detach()))
    assert losses[0] < 0.9 * losses[1]


def test_later_layers_begin_without_effect() -> None:
    """A draft of two layers guesses at first as one of one layer does."""
    results = []
    for layers in (1, 2):
        method = method_of("dflash", layers=layers)
        draft = method.build(head(), samples(), seed=3)
        results.append(draft(method.collate(samples(), CPU)).loss_sum.detach())
        assert all(isinstance(layer, Layer) for layer in draft.layers)
    torch.testing.assert_close(results[0], results[1])


def test_samples_without_an_anchor_leave_the_weights_random() -> None:
    """A run whose first samples are prompts alone has nothing to regress on."""
    nothing = {**samples()[0], "loss_mask": torch.zeros_like(samples()[0]["loss_mask"])}
    nothing["last_hidden_states"] = nothing["last_hidden_states"][:0]
    draft = method_of("dflash").build(head(), [nothing], seed=3)
    other = method_of("dflash", init="random").build(head(), [nothing], seed=3)
    assert all(torch.equal(one, two) for one, two in zip(draft.parameters(), other.parameters(), strict=True))
