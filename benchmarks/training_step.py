"""The unrolled EAGLE-3 step against a plain forward and backward of the same modules.

    python -m benchmarks.training_step [--quick]

A draft for a target of SmolLM2-135M's sizes (random weights and states, bfloat16 autocast) takes steps of 8
samples of 60 to 250 tokens, a third of each prompt. `plain` runs the same linear layers on the same rows
and nothing of the unrolled bookkeeping: fc, keys and values once for all tokens; then for each of K depths
the layer on the anchors with torch's own causal attention over as many joined rows, norm, lm_head, and
F.cross_entropy to one hard label instead of the target's distribution. Tokens are those of the samples.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812  (the name PyTorch's own documents use)

from benchmarks.rows import Row, against, row
from paceline.methods.eagle3.loss import Eagle3Batch
from paceline.methods.eagle3.method import Eagle3Method
from paceline.methods.eagle3.model import Eagle3Draft
from paceline.methods.target_head import TargetHead
from paceline.training.step import micro_batches

HIDDEN, VOCAB, DRAFT_VOCAB = 576, 49_152, 8192
CONFIG = {
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "hidden_size": HIDDEN,
    "intermediate_size": 1536,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100_000.0,
}
SAMPLES, MICRO_BATCH, DEPTH = 8, 4, 4
CPU = torch.device("cpu")
Sample = dict[str, torch.Tensor]


def draft_of(depth: int) -> tuple[Eagle3Method, Eagle3Draft]:
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(VOCAB, HIDDEN, generator=draw).bfloat16()
    head = TargetHead(CONFIG, rows, torch.ones(HIDDEN), rows)
    method = Eagle3Method({"draft_vocab_size": DRAFT_VOCAB, "ttt_steps": depth, "init": "random"})
    return method, method.build_draft(head, seed=0)


def samples_of(seed: int) -> list[Sample]:
    draw = torch.Generator().manual_seed(seed)
    made = []
    for length in torch.randint(60, 251, (SAMPLES,), generator=draw).tolist():
        made.append(
            {
                "input_ids": torch.randint(0, VOCAB, (length,), generator=draw, dtype=torch.int32),
                "loss_mask": (torch.arange(length) >= length // 3).to(torch.uint8),
                "aux_hidden_states": torch.randn(length, 3 * HIDDEN, generator=draw).bfloat16(),
                "last_hidden_states": torch.randn(length, HIDDEN, generator=draw).bfloat16(),
            }
        )
    return made


def plain_loss(draft: Eagle3Draft, batch: Eagle3Batch, depth: int) -> torch.Tensor:
    """See the module's text."""
    layer, attention = draft.midlayer, draft.midlayer.self_attn
    fused = draft.fc(batch.aux_hidden_states).unsqueeze(0)
    inputs = layer.inputs(draft.embed(batch.next_ids).unsqueeze(0), fused)
    keys, values = attention.key_value(inputs, batch.positions.unsqueeze(0))
    feature, inputs = fused[:, batch.anchors], inputs[:, batch.anchors]
    number, at = batch.anchors.numel(), batch.positions[batch.anchors].unsqueeze(0)
    loss = fused.new_zeros((), dtype=torch.float32)
    for step in range(depth):
        if step:
            inputs = layer.inputs(draft.embed(batch.input_ids[batch.anchors]).unsqueeze(0), feature)
            attention.key_value(inputs, at)
        query = attention.query(inputs, at)
        mixed = F.scaled_dot_product_attention(
            query, keys[:, :, -number:], values[:, :, -number:], is_causal=True, enable_gqa=True
        )
        feature = layer.finish(feature, mixed)
        logits = draft.logits(feature[0])
        labels = torch.zeros(number, dtype=torch.int64)
        loss = loss + F.cross_entropy(logits.float(), labels, reduction="sum")
    return loss


def seconds_of(work: Callable[..., object], *arguments: Any) -> float:
    started = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - started


def step(draft: Eagle3Draft, parts: Sequence[Any], loss: Callable[[Any], torch.Tensor]) -> None:
    """Forward and backward of a whole step, without the optimizer."""
    draft.zero_grad(set_to_none=True)
    for part in parts:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(part)
        value.backward()  # type: ignore[no-untyped-call]


def loss_of(method: Eagle3Method, draft: Eagle3Draft, samples: Sequence[Sample]) -> torch.Tensor:
    return method.loss(draft, method.collate(samples, CPU)).loss_sum


def speed(rounds: int) -> list[Row]:
    method, draft = draft_of(DEPTH)
    ours, plain, padding = [], [], []
    for seed in range(rounds + 1):
        samples = samples_of(seed)
        lengths = sorted(int(sample["input_ids"].numel()) for sample in samples)
        parts = micro_batches(samples, MICRO_BATCH)
        batches = [method.collate(part, CPU) for part in parts]
        real = seconds_of(step, draft, parts, lambda part: loss_of(method, draft, part))
        bare = seconds_of(step, draft, batches, lambda batch: plain_loss(draft, batch, DEPTH))
        if seed:
            ours.append(sum(lengths) / real)
            plain.append(sum(lengths) / bare)
            padded = MICRO_BATCH * sum(lengths[MICRO_BATCH - 1 :: MICRO_BATCH])
            padding.append(1 - sum(lengths) / padded)
    return [
        against(
            f"training step, {DEPTH} depths, collate included",
            ours,
            plain,
            "tokens/s",
            limit_name="plain forward and backward of the same modules",
            goal=0.9,
        ),
        row(
            "padding that packing leaves out",
            statistics.median(padding),
            "",
            note=f"of all rows, {MICRO_BATCH} samples of like length padded to the longest",
        ),
    ]


def memory() -> list[Row]:
    """Bytes that the forward keeps for the backward, a token of the samples; every storage once."""
    rows = []
    samples = samples_of(0)[:MICRO_BATCH]
    tokens = sum(int(sample["input_ids"].numel()) for sample in samples)
    for depth in (1, 2, 4, 8):
        method, draft = draft_of(depth)
        own = {parameter.untyped_storage().data_ptr() for parameter in draft.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:  # noqa: B023
                kept[storage.data_ptr()] = storage.nbytes()  # noqa: B023
            return tensor

        batch = method.collate(samples, CPU)
        watched = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with watched, torch.autocast("cpu", dtype=torch.bfloat16):
            loss = method.loss(draft, batch).loss_sum
        name = "bytes kept for the backward, a token"
        rows.append(row(f"{name}, {depth} depths", sum(kept.values()) / tokens, "B", curve=name, x=depth))
        del loss
    return rows


def run(quick: bool) -> list[Row]:
    torch.set_num_threads(1)
    return speed(4 if quick else 20) + memory()


if __name__ == "__main__":
    print(json.dumps(run("--quick" in sys.argv), indent=1))
