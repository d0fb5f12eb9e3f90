"""What a training step on one long sample takes of memory, a token: at 8,192 tokens against 2,048.

    python -m benchmarks.long_samples [--quick]

Each step runs in a process of its own, whose largest resident set is read before and after, and a step on
256 tokens comes before it: a draft of a tiny random target, the batch, loss and gradients. Blocks are drafted
after every token of the sample. A buffer that grows with the square of the length would make the ratio up to
4; without one it is near 1, but for what the C library cannot use again.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import torch

from benchmarks.rows import Row, row
from paceline.methods.table import METHODS
from paceline.testing.synthetic import HIDDEN, VOCAB, synthetic_head

FIRST, SHORT, LONG, PROMPT = 256, 2048, 8192, 64
SETTINGS = {
    "eagle3": {"draft_vocab_size": 32},
    "dflash": {"layers": 1, "target_states": 3, "anchors_max": LONG, "init": "random"},
}


def sample_of(tokens: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return {
        "input_ids": torch.randint(VOCAB, (tokens + 1,), generator=generator).int(),
        "loss_mask": (torch.arange(tokens + 1) >= PROMPT).to(torch.uint8),
        "aux_hidden_states": torch.randn(tokens, 3 * HIDDEN, generator=generator),
        "last_hidden_states": torch.randn(tokens + 1 - PROMPT, HIDDEN, generator=generator),
    }


def step_bytes(name: str, tokens: int) -> int:
    """That a step on `tokens` tokens takes beyond those of one on FIRST tokens, in this process."""
    method = METHODS.find(name).parse({"name": name, **SETTINGS[name]}).build()  # type: ignore[attr-defined]
    draft = method.build(synthetic_head(), [sample_of(FIRST)], 0)
    grown = []
    for length in (FIRST, tokens):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        draft(method.collate([sample_of(length)], torch.device("cpu"), 1)).loss_sum.backward()
        grown.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    return grown[-1] * 1024


def measured(name: str, tokens: int) -> float:
    """Bytes a further token, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.long_samples", name, str(tokens)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / (tokens - FIRST)


def run(quick: bool) -> list[Row]:  # noqa: ARG001 (it is quick)
    rows = []
    for name in SETTINGS:
        short, long = measured(name, SHORT), measured(name, LONG)
        what = f"{name}: bytes a token of a training step on one sample of {LONG:,} tokens"
        limit = f"bytes a token at {SHORT:,}"
        rows.append(row(what, long, "B", limit=short, limit_name=limit, ratio=long / short, note="flat: 1"))
    return rows


if __name__ == "__main__":
    if sys.argv[1:] in ([], ["--quick"]):
        print(json.dumps(run(bool(sys.argv[1:])), indent=1))
    else:
        print(step_bytes(sys.argv[1], int(sys.argv[2])))
