"""`hits` and `chain` of the training loss against greedy decoding by brute force."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from paceline.methods.eagle3.batch import Eagle3Batch, Unrolling, collate
from paceline.methods.eagle3.decode import Eagle3Decoder
from paceline.methods.eagle3.method import Eagle3Method
from paceline.methods.eagle3.model import Eagle3Draft
from paceline.target.head import TargetHead
from paceline.testing.tiny_target import captured_sample, save_target, tiny_target

STEPS = 4
PROMPTS = [(1, 5, 9), (1, 7, 7, 30, 12), (4,), (1, 44, 3, 2, 50, 6)]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_target()


@pytest.fixture(scope="module")
def greedy(model: LlamaForCausalLM) -> list[dict[str, torch.Tensor]]:
    """The target's own greedy answers: of each, the last token was written but never processed."""
    samples = []
    for prompt in PROMPTS:
        tokens = model.generate(
            torch.tensor([prompt]), max_new_tokens=30, min_new_tokens=30, do_sample=False, eos_token_id=None
        )[0]
        samples.append(captured_sample(model, len(tokens) - 1, len(prompt), 0, tokens))
    return samples


@pytest.fixture(scope="module")
def draft(
    model: LlamaForCausalLM, greedy: list[dict[str, torch.Tensor]], tmp_path_factory: pytest.TempPathFactory
) -> Eagle3Draft:
    """Half trained on the answers, with a vocabulary that lacks many tokens of them."""
    head = TargetHead.load(save_target(model, Path(tmp_path_factory.mktemp("target"))))
    method = Eagle3Method({"draft_vocab_size": 40, "ttt_steps": STEPS, "init": "random"})
    # The vocabulary is chosen from other text.
    draft = method.build(head, [captured_sample(model, 60, 1, seed) for seed in range(4)], seed=1)
    batch = method.collate(greedy, torch.device("cpu"))
    optimizer = torch.optim.AdamW(draft.parameters(), lr=5e-3)
    for _ in range(60):
        sums = draft(batch)
        optimizer.zero_grad()
        (sums.loss_sum / sums.num_tokens).backward()
        optimizer.step()
    return draft


def _accepted(
    draft: Eagle3Draft, model: LlamaForCausalLM, sample: dict[str, torch.Tensor], anchor: int
) -> int:
    """How many tokens a decoder that has the sample's tokens up to `anchor` + 1 drafts and keeps."""
    tokens = sample["input_ids"].long()
    length = int(sample["aux_hidden_states"].shape[0])
    decoder = Eagle3Decoder(draft, torch.float32)
    decoder.start(length + STEPS + 1)
    aux, following = sample["aux_hidden_states"][: anchor + 1], tokens[1 : anchor + 2]
    guesses, _ = decoder.propose(aux, following, STEPS, lambda logits: (int(logits.argmax()), None))
    kept = 0
    text = tokens[: anchor + 2]
    for guess in guesses:
        if text.numel() > length:  # the target's state there was never captured
            break
        with torch.no_grad():
            wanted = int(model(text[None]).logits[0, -1].argmax())
        if guess != wanted:
            break
        kept, text = kept + 1, torch.cat((text, torch.tensor([wanted])))
    return kept


def test_the_estimate_is_what_greedy_decoding_accepts(
    draft: Eagle3Draft, model: LlamaForCausalLM, greedy: list[dict[str, torch.Tensor]]
) -> None:
    """From every token of greedy answers the chain is as long as decoding really keeps."""
    metrics = draft(collate(greedy, Unrolling(STEPS, 1.0, judged_share=1))).metrics
    accepted = [
        _accepted(draft, model, sample, anchor)
        for sample in greedy
        for anchor in collate([sample], Unrolling(STEPS, 1.0)).anchors.tolist()
        # The first answer token comes from the prefill: nothing is drafted before it.
        if sample["loss_mask"][anchor + 1]
    ]
    assert int(metrics["judged_0"]) == len(accepted)
    assert len(set(accepted)) > 2, "the draft is too good or too bad for the test to mean anything"
    assert int(metrics["hits_0"]) == sum(kept > 0 for kept in accepted)
    assert int(metrics["chain"]) == sum(accepted)


def test_a_hit_is_the_targets_choice_not_the_token_that_was_drawn(
    draft: Eagle3Draft, model: LlamaForCausalLM
) -> None:
    """In text that the target did not choose, hits follow its argmax over the whole vocabulary."""
    sample = captured_sample(model, 40, 3, seed=8)  # random tokens, like a very hot draw
    batch = collate([sample], Unrolling(1, 1.0, judged_share=1))
    outputs: list[torch.Tensor] = []
    handle = draft.lm_head.register_forward_hook(lambda _m, _i, output: outputs.append(output))
    metrics = draft(batch).metrics
    handle.remove()
    guesses = draft.target_ids()[outputs[0].argmax(-1)][1:]
    with torch.no_grad():
        choices = model(sample["input_ids"][:-1].long()[None]).logits[0].argmax(-1)[batch.anchors + 1][1:]
    missing = ~draft.t2d[choices]
    assert missing.any()
    assert not missing.all()
    assert int(metrics["hits_0"]) == int((guesses == choices).sum())


def _judged(batch: Eagle3Batch) -> list[int]:
    return batch.anchors[batch.judged].tolist()


def test_one_anchor_in_sixteen_is_judged_the_same_ones_in_any_batch(model: LlamaForCausalLM) -> None:
    """Each sample has its own judged stretch, at least one anchor, and packing does not move it."""
    samples = [captured_sample(model, length, 4, length) for length in (9, 60, 200)]
    packed = collate(samples, Unrolling(STEPS, 0.8))
    widths = [length - 4 for length in (9, 60, 200)]
    assert len(_judged(packed)) == sum(-(-(width - 1) // 16) for width in widths)
    alone, start = [], 0
    for sample in samples:
        alone += [start + row for row in _judged(collate([sample], Unrolling(STEPS, 0.8)))]
        start += int(sample["aux_hidden_states"].shape[0])
    assert _judged(packed) == alone


def test_every_anchor_is_judged_where_nothing_is_trained(
    greedy: list[dict[str, torch.Tensor]],
) -> None:
    """A measurement on held-out answers must not depend on which anchors were picked."""
    method = Eagle3Method({"draft_vocab_size": 40, "ttt_steps": STEPS})
    with torch.no_grad():
        batch = method.collate(greedy, torch.device("cpu"))
    assert _judged(batch) == _judged(collate(greedy, Unrolling(STEPS, 0.8, judged_share=1)))
    trained = method.collate(greedy, torch.device("cpu"))
    assert _judged(trained) == _judged(collate(greedy, Unrolling(STEPS, 0.8)))
    assert len(_judged(trained)) * 8 < len(_judged(batch))
