"""The unrolled EAGLE-3 step against a plain forward and backward of the same modules.

    python -m benchmarks.training_step [--quick]

A draft for a target of SmolLM2-135M's sizes (random weights and states, bfloat16 autocast) takes steps of 8
samples of 60 to 250 tokens, a third of each prompt. `plain` runs the same linear layers on the same
numbers of rows, nothing of the unrolled bookkeeping: fc, keys and values once for all tokens; then for each of K
depths the layer on the anchors with ordinary causal attention over as many rows, norm, lm_head, and
F.cross_entropy to one hard label instead of the target's distribution. Tokens are those of the samples.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
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
    size, length = batch.input_ids.shape
    positions = torch.arange(length).expand(size, length)
    fused = draft.fc(batch.aux_hidden_states)
    inputs = layer.inputs(draft.embed(batch.input_ids), fused)
    keys, values = attention.key_value(inputs, positions)
    rows = torch.arange(size).unsqueeze(1)
    feature, inputs = fused[rows, batch.anchors], inputs[rows, batch.anchors]
    width = batch.anchors.shape[1]
    loss = fused.new_zeros((), dtype=torch.float32)
    for step in range(depth):
        if step:
            inputs = layer.inputs(draft.embed(batch.input_ids[:, :width]), feature)
            attention.key_value(inputs, batch.anchors)
        query = attention.query(inputs, batch.anchors)
        part = slice(length - width, None)
        mixed = F.scaled_dot_product_attention(
            query, keys[:, :, part], values[:, :, part], is_causal=True, enable_gqa=True
        )
        feature = layer.finish(feature, mixed)
        logits = draft.logits(feature[batch.anchor_valid])
        labels = torch.zeros(logits.shape[0], dtype=torch.int64)
        loss = loss + F.cross_entropy(logits.float(), labels, reduction="sum")
    return loss


def seconds_of(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def speed(rounds: int) -> list[Row]:
    method, draft = draft_of(DEPTH)
    ours: list[float] = []
    plain: list[float] = []
    padding: list[float] = []
    for seed in range(rounds + 1):
        samples = samples_of(seed)
        tokens = sum(int(sample["input_ids"].numel()) for sample in samples)
        parts = micro_batches(samples, MICRO_BATCH)
        batches = [method.collate(part, CPU) for part in parts]

        def step(loss: Callable[[Any], torch.Tensor], given: list[Any]) -> None:
            draft.zero_grad(set_to_none=True)
            for one in given:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    value = loss(one)
                value.backward()

        taken = (
            seconds_of(
                lambda: step(lambda part: method.loss(draft, method.collate(part, CPU)).loss_sum, parts)
            ),  # noqa: B023
            seconds_of(lambda: step(lambda batch: plain_loss(draft, batch, DEPTH), batches)),  # noqa: B023
        )
        if seed:
            ours.append(tokens / taken[0])
            plain.append(tokens / taken[1])
            padding.append(1 - tokens / sum(batch.input_ids.numel() for batch in batches))
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
            "share of padding in micro-batches of like length",
            statistics.median(padding),
            "",
            note=f"{MICRO_BATCH} of {SAMPLES} samples of 60 to 250 tokens",
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
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            with torch.autocast("cpu", dtype=torch.bfloat16):
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
