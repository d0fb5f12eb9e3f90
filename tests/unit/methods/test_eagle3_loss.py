"""The unrolled training loss against a slow reference that decodes like inference does."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from paceline.methods.eagle3.batch import Eagle3Batch, Unrolling, collate
from paceline.methods.eagle3.method import Eagle3Method
from paceline.methods.eagle3.model import Eagle3Draft
from paceline.methods.targets import counted_rows
from paceline.target.facts import TargetFacts
from paceline.target.head import TargetHead
from paceline.testing.tiny_target import VOCAB, captured_sample, save_target, tiny_target
from paceline.types import Rows

STEPS, DECAY = 3, 0.8
UNROLLING = Unrolling(STEPS, DECAY)


@pytest.fixture(scope="module")
def target() -> LlamaForCausalLM:
    return tiny_target()


@pytest.fixture(scope="module")
def method() -> Eagle3Method:
    return Eagle3Method({"draft_vocab_size": 24, "ttt_steps": STEPS, "step_decay": DECAY, "init": "target"})


@pytest.fixture(scope="module")
def head(target: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> TargetHead:
    return TargetHead.load(save_target(target, Path(tmp_path_factory.mktemp("target"))))


@pytest.fixture
def draft(method: Eagle3Method, head: TargetHead, samples: list[dict[str, torch.Tensor]]) -> Eagle3Draft:
    draft = method.build(head, samples, seed=3)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in draft.parameters():  # no weight may hide a mistake by being zero or one
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return draft


@pytest.fixture(scope="module")
def samples(target: LlamaForCausalLM) -> list[dict[str, torch.Tensor]]:
    sizes = [(9, 4), (14, 6), (6, 5), (11, 2)]
    return [captured_sample(target, length, prompt, seed) for seed, (length, prompt) in enumerate(sizes)]


def _attend_all(draft: Eagle3Draft, inputs: torch.Tensor, feature: torch.Tensor) -> torch.Tensor:
    """Output [H] of the decoder layer for the last of `inputs` [L, 2H], plain causal attention."""
    attention, length = draft.midlayer.self_attn, inputs.shape[0]
    positions = torch.arange(length).unsqueeze(0)
    keys, values = attention.key_value(inputs[None], positions)
    query = attention.query(inputs[None], positions)[:, :, -1:]
    groups = attention.heads // attention.kv_heads
    keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    mixed = torch.nn.functional.scaled_dot_product_attention(query, keys, values)
    return draft.midlayer.finish(feature[None, None], mixed)[0, 0]


def _reference_loss(
    draft: Eagle3Draft, target: LlamaForCausalLM, sample: dict[str, torch.Tensor]
) -> torch.Tensor:
    """For every anchor, draft STEPS tokens one by one with the growing sequence and no cache."""
    tokens, length = sample["input_ids"].long(), sample["input_ids"].numel() - 1
    in_answer = sample["loss_mask"].tolist()  # of tokens 0..T
    place = counted_rows(sample["loss_mask"]).cumsum(0) - 1  # of a counted row among the last states
    fused = draft.fc(sample["aux_hidden_states"])
    total = torch.zeros(())
    for anchor in range(length - 1):
        if not in_answer[anchor + 2]:
            continue
        features = [*fused[: anchor + 1]]
        for step in range(STEPS):
            row = anchor + step  # the row that is fed now; it predicts token row + 2
            if row + 2 > length or not in_answer[row + 2]:
                break
            inputs = torch.stack(
                [draft.midlayer.inputs(draft.embed(tokens[j + 1]), features[j]) for j in range(row + 1)]
            )
            output = _attend_all(draft, inputs, features[row])
            logits = draft.logits(output)
            with torch.no_grad():
                normed = target.model.norm(sample["last_hidden_states"][place[row + 1]])
                wanted = target.lm_head(normed)[draft.target_ids()].softmax(-1)
            total = total + DECAY**step * -(wanted * logits.log_softmax(-1)).sum()
            features.append(output)
    return total


def test_training_time_test_equals_decoding_one_token_at_a_time(
    draft: Eagle3Draft, target: LlamaForCausalLM, samples: list[dict[str, torch.Tensor]]
) -> None:
    """The unrolled loss and its gradients are those of drafting autoregressively from every anchor."""
    loss = draft(collate(samples, UNROLLING)).loss_sum
    loss.backward()
    got = {
        name: parameter.grad.clone()
        for name, parameter in draft.named_parameters()
        if parameter.grad is not None
    }
    draft.zero_grad()
    expected = torch.stack([_reference_loss(draft, target, sample) for sample in samples]).sum()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for name, parameter in draft.named_parameters():
        torch.testing.assert_close(
            got[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_prompts_need_no_last_states(target: LlamaForCausalLM, method: Eagle3Method) -> None:
    """Of the last state there is a row for every token that is a target, the first one included."""
    sizes = [(9, 4), (7, 1), (5, 5)]
    rows = [captured_sample(target, *size, 5)["last_hidden_states"].shape[0] for size in sizes]
    assert rows == [6, 7, 1]
    facts = TargetFacts(32, 8, VOCAB, "float32", (2,), "model", "tokenizer")
    kept = {feature.name: feature.rows for feature in method.features(facts)}
    assert kept["last_hidden_states"] == Rows.PREDICTED
    assert kept["aux_hidden_states"] == Rows.ALL


def test_a_chat_of_several_turns_counts_its_answers_alone(
    draft: Eagle3Draft, target: LlamaForCausalLM
) -> None:
    """Loss and gradients are those of drafting in every answer; a last token that is none is not counted."""
    sample = captured_sample(target, 16, 4, 0)
    mask = torch.zeros(17, dtype=torch.uint8)
    mask[[3, 4, 5, 6, 10, 11, 12]] = 1
    states = sample["last_hidden_states"][mask[4:].bool()]  # the first of its rows predicts token 4
    first = captured_sample(target, 16, 3, 0)["last_hidden_states"][:1]  # that one predicts token 3
    chat = {**sample, "loss_mask": mask, "last_hidden_states": torch.cat([first, states])}
    sums = draft(collate([chat], UNROLLING))
    expected = _reference_loss(draft, target, chat)
    torch.testing.assert_close(sums.loss_sum, expected, rtol=1e-5, atol=1e-5)
    assert sums.num_tokens == 7
    parameters = list(draft.parameters())
    got, wanted = (torch.autograd.grad(loss, parameters) for loss in (sums.loss_sum, expected))
    for left, right in zip(got, wanted, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def test_packed_samples_do_not_see_each_other(
    draft: Eagle3Draft, samples: list[dict[str, torch.Tensor]]
) -> None:
    """A sample's loss and gradients are the same whichever neighbours it is packed with."""
    first, second = samples[:2]
    strange = {**second, "aux_hidden_states": second["aux_hidden_states"] * 3.0 + 1.0}

    def alone_by_difference(neighbour: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        both = draft(collate([first, neighbour, first], UNROLLING)).loss_sum
        other = draft(collate([neighbour], UNROLLING)).loss_sum
        return [both - other, *torch.autograd.grad(both - other, list(draft.parameters()))]

    for left, right in zip(alone_by_difference(second), alone_by_difference(strange), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("lengths", [(3, 40, 7), (25, 25), (64, 5, 5, 33, 12)])
def test_packed_samples_train_like_samples_one_by_one(
    draft: Eagle3Draft, target: LlamaForCausalLM, lengths: tuple[int, ...]
) -> None:
    """Loss and gradients of packed samples are the sums of each sample's own, whatever their lengths."""
    spread = [captured_sample(target, n, 1 + n // 3, seed) for seed, n in enumerate(lengths)]
    packed = draft(collate(spread, UNROLLING))
    single = [draft(collate([sample], UNROLLING)) for sample in spread]
    total = torch.stack([part.loss_sum for part in single]).sum()
    torch.testing.assert_close(packed.loss_sum, total, rtol=1e-5, atol=1e-5)
    parameters = list(draft.parameters())
    got, expected = (torch.autograd.grad(loss, parameters) for loss in (packed.loss_sum, total))
    for left, right in zip(got, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4)


def test_same_batch_gives_the_same_bits(draft: Eagle3Draft, samples: list[dict[str, torch.Tensor]]) -> None:
    """Loss and every gradient, under bfloat16 autocast as the trainer runs."""

    def once() -> list[torch.Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = draft(collate(samples, UNROLLING)).loss_sum
        return [loss.detach(), *torch.autograd.grad(loss, list(draft.parameters()))]

    assert all(torch.equal(left, right) for left, right in zip(once(), once(), strict=True))


def _kept_bytes(draft: Eagle3Draft, batch: Eagle3Batch) -> int:
    """Bytes of the storages that autograd keeps between forward and backward."""
    storages: dict[int, torch.UntypedStorage] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        draft(batch)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("autocast", [True, False])
def test_recomputing_gives_the_same_bits(
    draft: Eagle3Draft, samples: list[dict[str, torch.Tensor]], autocast: bool
) -> None:
    """Loss and every gradient are those of the step that keeps its layers."""

    def once(recompute: bool) -> list[torch.Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            draft.recompute = recompute
            loss = draft(collate(samples, UNROLLING)).loss_sum
        return [loss.detach(), *torch.autograd.grad(loss, list(draft.parameters()))]

    assert all(torch.equal(left, right) for left, right in zip(once(True), once(False), strict=True))


def test_recomputing_keeps_nearly_as_much_for_every_depth(
    draft: Eagle3Draft, samples: list[dict[str, torch.Tensor]]
) -> None:
    """A step more keeps a quarter of what it keeps otherwise, or less.

    The hooks do not see what a recomputed step starts from: its feature, and one key and value of its own.
    """
    more = []
    for draft.recompute in (False, True):
        few, many = (_kept_bytes(draft, collate(samples, Unrolling(steps, DECAY))) for steps in (2, 6))
        more.append(many - few)
    plain, again = more
    assert 0 < 4 * again < plain


def test_loss_counts_only_predictions_inside_the_answer(
    draft: Eagle3Draft, samples: list[dict[str, torch.Tensor]]
) -> None:
    """Step k of a sample counts every answer token that lies k + 2 or more after the first token."""
    sums = draft(collate(samples[1:2], UNROLLING))
    # 14 processed tokens, 6 of them prompt: tokens 6..14 are the answer, the last one not in the batch.
    assert sums.num_tokens == 9
    assert [sums.metrics[f"count_{k}"] for k in range(STEPS)] == [9, 8, 7]


def test_micro_batches_add_up_to_the_full_batch(
    draft: Eagle3Draft, samples: list[dict[str, torch.Tensor]]
) -> None:
    """Loss, gradients, token count and metrics of micro-batches sum to those of one batch."""
    whole = draft(collate(samples, UNROLLING))
    whole.loss_sum.backward()
    expected = {name: p.grad.clone() for name, p in draft.named_parameters() if p.grad is not None}
    draft.zero_grad()
    parts = [draft(collate(samples[a:b], UNROLLING)) for a, b in ((0, 1), (1, 4))]
    for part in parts:
        part.loss_sum.backward()
    torch.testing.assert_close(sum(p.loss_sum for p in parts), whole.loss_sum, rtol=1e-5, atol=1e-5)
    assert sum(p.num_tokens for p in parts) == whole.num_tokens
    for name, parameter in draft.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)
    for key, value in whole.metrics.items():
        assert float(sum(p.metrics[key] for p in parts)) == pytest.approx(float(value), rel=1e-5)


def test_sample_without_a_prediction_gives_zero_loss(draft: Eagle3Draft, target: LlamaForCausalLM) -> None:
    """A one-token answer leaves nothing to draft, and its loss still runs backward."""
    sums = draft(collate([captured_sample(target, 1, 1, 0)], UNROLLING))
    sums.loss_sum.backward()
    assert sums.num_tokens == 0
    assert float(sums.loss_sum.detach()) == 0.0


def test_chain_metric_counts_leading_hits_only(
    draft: Eagle3Draft, method: Eagle3Method, samples: list[dict[str, torch.Tensor]]
) -> None:
    """The estimated acceptance length never exceeds what the first step's accuracy allows."""
    sums = draft(collate(samples, dataclasses.replace(UNROLLING, judged_share=1)))
    metrics = {name: float(value) for name, value in sums.metrics.items()}
    means = method.mean_metrics(metrics)
    first = metrics["hits_0"]
    assert first <= metrics["chain"] <= STEPS * first
    assert means["acceptance_length_estimate"] == 1.0 + metrics["chain"] / metrics["judged_0"]


def test_every_tensor_of_the_loss_is_made_where_the_batch_lies(
    draft: Eagle3Draft, samples: list[dict[str, torch.Tensor]]
) -> None:
    """A tensor made without a device would land on the wrong one, and mixing devices is an error."""
    batch = collate(samples, UNROLLING).to(torch.device("cpu"))
    with torch.device("meta"):  # whatever names no device lies elsewhere
        assert torch.zeros(()).is_meta
        sums = draft(batch)
        sums.loss_sum.backward()
    assert all(not value.is_meta for value in [sums.loss_sum, *sums.metrics.values()])
    assert all(p.grad is not None and not p.grad.is_meta for p in draft.midlayer.parameters())
