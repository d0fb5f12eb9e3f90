"""The training step of a draft against a plain forward and backward of the same modules.

    python -m benchmarks.training_step [--quick]

Sizes are those of SmolLM2-135M, weights and states random, samples of 60 to 250 tokens. Ours is what the
trainer runs: micro-batches, `collate`, `loss`, `backward`, in bfloat16 autocast. The limit calls the same
modules as often on the same number of real rows, none of it padding: fc, norms, keys and values for every
token; queries, attention output, MLP and lm_head for K passes over the rows that can be drafted from.
Nothing is unrolled: each pass takes the output of the pass before, attention is stock
`scaled_dot_product_attention` sample by sample over the target's keys alone, and the loss is stock
`cross_entropy` with the token that follows as label: no distribution of the target, no metrics.

Bytes kept for backward are what the C library has handed out more of after the loss than before it:
autograd's own hooks would not see what a recomputed step holds. Autocast's bfloat16 copies of the weights
are among them, once, whatever the depth; so is the gradient of the logits, for each depth. Bytes and
speed are measured a second time with the method's `recompute`.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch.nn import functional as F  # noqa: N812  (the name PyTorch's own documents use)

from benchmarks.rows import Row, against, row
from paceline.methods.eagle3.method import Eagle3Method
from paceline.methods.eagle3.model import Eagle3Draft
from paceline.target.head import TargetHead
from paceline.target.layout import HeadLayout
from paceline.training.determinism import compute_deterministically

Sample = Mapping[str, torch.Tensor]

# SmolLM2-135M's config.json
CONFIG = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100_000.0,
    "vocab_size": 49_152,
}
DEPTH, DEPTHS = 4, (1, 3, 5, 7)
MICRO_BATCH = 8
CPU = torch.device("cpu")


def target_head() -> TargetHead:
    generator = torch.Generator().manual_seed(0)
    shape = (int(CONFIG["vocab_size"]), int(CONFIG["hidden_size"]))
    embedding = torch.randn(shape, generator=generator).mul_(0.1).bfloat16()
    gain = torch.ones(shape[1], dtype=torch.bfloat16)
    layout = HeadLayout(eps=float(CONFIG["rms_norm_eps"]))
    return TargetHead(CONFIG, embedding, gain, embedding, layout=layout)


def spread_samples(count: int) -> list[Sample]:
    """`count` samples of 60 to 250 tokens, a quarter to a half of them prompt."""
    generator = torch.Generator().manual_seed(1)
    vocab, hidden, samples = int(CONFIG["vocab_size"]), int(CONFIG["hidden_size"]), []
    for _ in range(count):
        tokens = int(torch.randint(60, 251, (), generator=generator))
        prompt = int(torch.randint(tokens // 4, tokens // 2, (), generator=generator))
        states = torch.randn(tokens, 4 * hidden, generator=generator).bfloat16()
        samples.append(
            {
                "input_ids": torch.randint(vocab, (tokens + 1,), generator=generator).int(),
                "loss_mask": (torch.arange(tokens + 1) >= prompt).to(torch.uint8),
                "aux_hidden_states": states[:, : 3 * hidden].contiguous(),
                "last_hidden_states": states[prompt - 1 :, 3 * hidden :].contiguous(),
            }
        )
    return samples


def new_draft(depth: int, recompute: bool = False) -> tuple[Eagle3Method, Eagle3Draft]:
    method = Eagle3Method({"ttt_steps": depth, "init": "random", "recompute": recompute})
    return method, method.build(target_head(), spread_samples(1), seed=0)


def micro_batches(samples: Sequence[Sample]) -> list[Sequence[Sample]]:
    return [samples[start : start + MICRO_BATCH] for start in range(0, len(samples), MICRO_BATCH)]


def ours(method: Eagle3Method, draft: Eagle3Draft, samples: Sequence[Sample]) -> None:
    for micro_batch in micro_batches(samples):
        batch = method.collate(micro_batch, CPU)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = draft(batch).loss_sum
        loss.backward()


def plain(draft: Eagle3Draft, samples: Sequence[Sample]) -> None:
    for micro_batch in micro_batches(samples):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = _plain_loss(draft, micro_batch, DEPTH)
        loss.backward()


def _plain_loss(draft: Eagle3Draft, samples: Sequence[Sample], depth: int) -> torch.Tensor:
    layer, attention = draft.midlayer, draft.midlayer.self_attn
    lengths = [len(sample["input_ids"]) - 1 for sample in samples]
    starts = [int(sample["loss_mask"].argmax()) - 1 for sample in samples]  # the first row that predicts
    positions = torch.cat([torch.arange(length) for length in lengths])
    queried = torch.cat([torch.arange(n) >= first for n, first in zip(lengths, starts, strict=True)])
    # The last row has no successor in the batch.
    queried[torch.tensor(lengths).cumsum(0) - 1] = False
    ids = torch.cat([sample["input_ids"][:-1] for sample in samples])
    fused = draft.fc(torch.cat([sample["aux_hidden_states"] for sample in samples]).float())
    inputs = layer.inputs(draft.embed(ids.roll(-1)), fused)
    keys, values = attention.key_value(inputs[None], positions[None])
    key_parts, value_parts = keys.split(lengths, 2), values.split(lengths, 2)
    per_sample = [n - 1 - first for n, first in zip(lengths, starts, strict=True)]
    masks = [
        torch.arange(n) <= torch.arange(first, n - 1)[:, None]
        for n, first in zip(lengths, starts, strict=True)
    ]
    feature, inputs = fused[queried], inputs[queried]
    labels = ids.roll(-2)[queried].long() % draft.config.draft_vocab_size
    loss = feature.new_zeros((), dtype=torch.float32)
    for step in range(depth):
        if step:
            inputs = layer.inputs(draft.embed(labels), feature)
            attention.key_value(inputs[None], positions[None, queried])
        query = attention.query(inputs[None], positions[None, queried])
        mixed = [
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
            for q, k, v, mask in zip(query.split(per_sample, 2), key_parts, value_parts, masks, strict=True)
        ]
        feature = layer.finish(feature[None], torch.cat(mixed, 2))[0]
        # As many rows as ours: a pass deeper in predicts one token less of each sample.
        counts = torch.cat([torch.arange(n) < n - step for n in per_sample])
        loss = loss + F.cross_entropy(draft.logits(feature[counts]), labels[counts], reduction="sum")
    return loss


def speed(quick: bool, recompute: bool) -> Row:
    """Pairs, so that what else the machine does hits both."""
    method, draft = new_draft(DEPTH, recompute)
    samples = spread_samples(16 if quick else 32)
    tokens = sum(len(sample["input_ids"]) - 1 for sample in samples)

    def rate(work: Callable[[], None]) -> float:
        start = time.perf_counter()
        work()
        took = time.perf_counter() - start
        draft.zero_grad(set_to_none=True)
        return tokens / took

    pairs = []
    for turn in range(4 if quick else 10):
        pair = rate(lambda: ours(method, draft, samples)), rate(lambda: plain(draft, samples))
        if turn:  # the first touches fresh memory
            pairs.append(pair)
    return against(
        "training step, recomputing" if recompute else "training step",
        [pair[0] for pair in pairs],
        [pair[1] for pair in pairs],
        "tokens/s",
        limit_name="forward+backward of the same modules",
        goal=None if recompute else 0.9,
        note=f"depth {DEPTH}, draft vocabulary {draft.config.draft_vocab_size}, one process",
    )


class _Mallinfo(ctypes.Structure):
    """glibc's `struct mallinfo2`, malloc.h."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")),
    ]


def _allocated() -> int:
    """Bytes in use, in arenas and in mappings of their own."""
    mallinfo = ctypes.CDLL("libc.so.6").mallinfo2
    mallinfo.restype = _Mallinfo
    info = mallinfo()
    return int(info.uordblks + info.hblkhd)


def kept(depth: int, samples: Sequence[Sample], recompute: bool = False) -> Row:
    """Bytes that the graph of one micro-batch holds between forward and backward, per token."""
    method, draft = new_draft(depth, recompute)
    batch = method.collate(samples, CPU)
    for _ in range(2):  # the first makes what libraries keep for ever
        draft.zero_grad(set_to_none=True)
        before = _allocated()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = draft(batch).loss_sum
        held = _allocated() - before
        loss.backward()
    tokens = sum(len(sample["input_ids"]) - 1 for sample in samples)
    how = ", recomputing" if recompute else ""
    return row(
        f"bytes kept for backward, depth {depth}{how}",
        held / tokens / 1024,
        "KiB/token",
        curve=f"bytes kept for backward by depth{how}",
        x=depth,
    )


def run(quick: bool) -> list[Row]:
    compute_deterministically(threads=1)  # as the consumer does, with the recipe's thread
    like = micro_batches(spread_samples(16))[1]
    ways = False, True
    return [
        *(speed(quick, recompute) for recompute in ways),
        *(kept(depth, like, recompute) for recompute in ways for depth in DEPTHS),
    ]


if __name__ == "__main__":
    print(json.dumps(run("--quick" in sys.argv), indent=1))
