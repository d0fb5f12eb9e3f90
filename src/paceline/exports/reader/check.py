"""The self-check of an export: a folder, read by every rule of its servers, drafts as its trainer does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError

from paceline.exports.reader.replay import Chain, Replay, ServedTarget, Verdict

ERROR_MAX = 1e-5  # relative, of the logits of one guess


class ReadDraft(Protocol):
    """A draft as a server has it in memory."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of blocks, in the order of the columns of `fc`."""

    @property
    def target_ids(self) -> torch.Tensor:
        """int64 [D]: the target's id of every draft token."""


@dataclass(frozen=True)
class Reader:
    """A server that loads a folder: `read` raises ValueError with the reason where it would fail or go wrong;
    `logits` float32 [n, D] of the n guesses after the first rows of a replay."""

    name: str
    read: Callable[[Path, ServedTarget], ReadDraft]
    logits: Callable[[Any, Replay, int, tuple[int, ...]], torch.Tensor]


def check_folder(
    folder: Path, readers: Sequence[Reader], target: ServedTarget, replays: Sequence[Replay]
) -> Verdict:
    """Read the folder by the rules of each of its servers, and replay the dumped rows."""
    problems: list[str] = []
    guesses, error = 0, 0.0
    for reader in readers:
        try:
            draft = reader.read(folder, target)
        except (ValueError, KeyError, TypeError, OSError, SafetensorError) as found:
            problems.append(f"{reader.name}: {_told(found)}")
            continue
        seen = {layer for replay in replays for layer in replay.states}
        if not set(draft.layers) <= seen:
            problems.append(f"{reader.name}: it reads the layers {draft.layers}, far from those of the draft")
            continue
        compared, worst, wrong = _replayed(reader, draft, replays)
        guesses, error = guesses + compared, max(error, worst)
        if wrong or worst > ERROR_MAX:
            problems.append(
                f"{reader.name}: of {compared} guesses {wrong} are others than the trainer's, and the "
                f"relative error of the logits is up to {worst:.2g} (it reads the layers {draft.layers})"
            )
    return Verdict(tuple(problems), guesses, error)


def _told(error: Exception) -> str:
    return f"the field {error} is missing" if isinstance(error, KeyError) else str(error)


def _replayed(reader: Reader, draft: ReadDraft, replays: Sequence[Replay]) -> tuple[int, float, int]:
    """(guesses compared, largest relative error, other guesses)."""
    compared, worst, wrong = 0, 0.0, 0
    with torch.inference_mode():
        for replay in replays:
            for chain in replay.chains:
                logits = reader.logits(draft, replay, chain.rows, chain.guesses)
                compared += len(chain.guesses)
                worst = max(worst, _error(logits, chain))
                found = draft.target_ids[logits.argmax(-1)].tolist()
                wrong += sum(one != other for one, other in zip_longest(found, chain.guesses))
    return compared, worst, wrong


def _error(logits: torch.Tensor, chain: Chain) -> float:
    """Infinite unless both leave out the same tokens, and all other logits are finite."""
    if logits.shape != chain.logits.shape:
        return float("inf")
    found, wanted, left_out = logits.double(), chain.logits.double(), torch.isneginf(chain.logits)
    if not torch.equal(torch.isneginf(logits), left_out):
        return float("inf")
    found, wanted = found.masked_fill(left_out, 0.0), wanted.masked_fill(left_out, 0.0)
    if not bool(torch.isfinite(found).all()):
        return float("inf")
    return float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())
