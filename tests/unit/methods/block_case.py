"""Block drafts of a tiny target, samples of it, and what a decoder guesses in a sample."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from paceline.methods.dflash.decode import DFlashDecoder
from paceline.methods.dflash.method import DFlashMethod
from paceline.methods.dflash.model import DFlashDraft
from paceline.methods.table import METHODS
from paceline.target.head import TargetHead
from paceline.testing.tiny_target import captured_sample, save_target, tiny_target

Sample = dict[str, torch.Tensor]
HEADS: dict[str, dict[str, Any]] = {
    "dflash": {},
    "dspark": {"markov_rank": 6},
    "domino": {"gru_hidden_dim": 12, "emb_dim": 5},
    "dflash2": {"selector_rank": 6, "selector_top_k": 5, "conv_group_size": 8, "conv_kernel_size": 3},
}
SIZES = {"block_size": 4, "layers": 2, "target_states": 3}


@cache
def head() -> TargetHead:
    with tempfile.TemporaryDirectory() as folder:
        return TargetHead.load(save_target(tiny_target(), Path(folder) / "target"))


@cache
def samples() -> tuple[Sample, ...]:
    """Answers of several lengths, one of a single token, and a chat of two answers."""
    sizes = [(9, 4), (14, 6), (6, 6), (11, 2)]
    made = [
        captured_sample(tiny_target(), length, prompt, seed) for seed, (length, prompt) in enumerate(sizes)
    ]
    chat = captured_sample(tiny_target(), 16, 0, seed=7)
    chat["loss_mask"][0:4] = 0
    chat["loss_mask"][8:11] = 0
    rows = chat["loss_mask"][1:].bool()
    full = captured_sample(tiny_target(), 16, 0, seed=7)["last_hidden_states"]
    return (*made, {**chat, "last_hidden_states": full[rows]})


def method_of(name: str, **knobs: Any) -> DFlashMethod:
    section = METHODS.find(name).parse({**SIZES, **HEADS[name], **knobs})
    method: DFlashMethod = section.build()
    return method


def draft_of(method: DFlashMethod) -> DFlashDraft:
    """No weight may hide a mistake by being zero or one."""
    draft = method.build(head(), [], seed=3)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for weight in draft.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.2)
    return draft


@dataclass(frozen=True)
class Decoded:
    """float64: logits [D, V] that a guess is chosen by, the backbone's own [D, V], states [D, H]."""

    logits: torch.Tensor
    base: torch.Tensor
    hidden: torch.Tensor


def decoded(draft: DFlashDraft, sample: Sample, place: int) -> Decoded:
    """What a decoder has after the token at `place`, if each guess is the sample's own token."""
    tokens = sample["input_ids"].long()
    decoder = DFlashDecoder(draft, torch.float32)
    decoder.start(len(tokens))
    seen: list[torch.Tensor] = []
    blocks: list[tuple[torch.Tensor, torch.Tensor]] = []
    block = decoder._block

    def keeping(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        blocks.append(block(*inputs))
        return blocks[-1]

    def choose(logits: torch.Tensor) -> tuple[int, None]:
        seen.append(logits.double())
        return int(tokens[min(place + len(seen), len(tokens) - 1)]), None

    decoder._block = keeping  # type: ignore[method-assign]
    aux = sample["aux_hidden_states"]
    half = place // 2
    if half:  # a decoder reads the rows in several cycles
        decoder.propose(aux[:half], tokens[1 : half + 1], 1, lambda logits: (0, None))
    decoder.propose(aux[half:place], tokens[half + 1 : place + 1], draft.config.depths, choose)
    hidden, base = (part.double() for part in blocks[-1])
    return Decoded(torch.stack(seen), base, hidden)
