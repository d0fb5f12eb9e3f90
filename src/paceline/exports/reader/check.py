"""The self-check of an export: a folder, read by every rule of its servers, drafts as its trainer does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError

from paceline.exports.reader.forward import chain_logits
from paceline.exports.reader.reading import Draft, read_draft
from paceline.exports.reader.replay import Chain, Replay, ServedTarget, Verdict
from paceline.exports.reader.rules import RULES

ERROR_MAX = 1e-5  # relative, of the logits of one guess


def check_folder(folder: Path, server: str, target: ServedTarget, replays: Sequence[Replay]) -> Verdict:
    """Read the folder by the rules of `server` (a key of RULES), and replay the dumped rows."""
    problems: list[str] = []
    guesses, error = 0, 0.0
    for rules in RULES[server]:
        try:
            draft = read_draft(folder, rules, target)
        except (ValueError, KeyError, TypeError, OSError, SafetensorError) as found:
            problems.append(f"{rules.reader}: {_told(found)}")
            continue
        seen = {layer for replay in replays for layer in replay.states}
        if not set(draft.layers) <= seen:
            problems.append(
                f"{rules.reader}: it reads the layers {draft.layers}, far from those of the draft"
            )
            continue
        compared, worst, wrong = _replayed(draft, replays)
        guesses, error = guesses + compared, max(error, worst)
        if wrong or worst > ERROR_MAX:
            problems.append(
                f"{rules.reader}: of {compared} guesses {wrong} are others than the trainer's, and the "
                f"relative error of the logits is up to {worst:.2g} (it reads the layers {draft.layers})"
            )
    return Verdict(tuple(problems), guesses, error)


def _told(error: Exception) -> str:
    return f"the field {error} is missing" if isinstance(error, KeyError) else str(error)


def _replayed(draft: Draft, replays: Sequence[Replay]) -> tuple[int, float, int]:
    """(guesses compared, largest relative error, other guesses)."""
    compared, worst, wrong = 0, 0.0, 0
    with torch.inference_mode():
        for replay in replays:
            for chain in replay.chains:
                logits = chain_logits(draft, replay, chain.rows, chain.guesses)
                compared += len(chain.guesses)
                worst = max(worst, _error(logits, chain))
                wrong += int((draft.target_ids[logits.argmax(-1)] != torch.tensor(chain.guesses)).sum())
    return compared, worst, wrong


def _error(logits: torch.Tensor, chain: Chain) -> float:
    if logits.shape != chain.logits.shape or not bool(torch.isfinite(logits).all()):
        return float("inf")
    wanted = chain.logits.double()
    return float(((logits.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())
