"""What the ledger refuses, in words: one message for every store."""

from __future__ import annotations

from collections.abc import Sequence

from paceline.errors import FencedError, IllegalTransitionError
from paceline.ledger.store import Fence


def fenced(fence: Fence, current: int) -> FencedError:
    return FencedError(
        f"This {fence.role} holds epoch {fence.epoch}, but epoch {current} has taken over.",
        why="A newer process does this work now; nothing was written.",
        next="stop this process; `paceline status RUN` shows who holds the role.",
    )


def behind_head(step: int, head: int) -> IllegalTransitionError:
    return IllegalTransitionError(
        f"A checkpoint at step {step} cannot follow the head at step {head}.",
        why="Checkpoints of a run form a chain of growing steps.",
        next="resume from the head checkpoint: run the same command again.",
    )


def head_is_kept(step: int) -> IllegalTransitionError:
    return IllegalTransitionError(
        f"The checkpoint at step {step} is the head and cannot be forgotten.",
        why="The run would resume from nothing.",
        next="record a newer checkpoint first.",
    )


def not_covered(sample_ids: Sequence[str]) -> IllegalTransitionError:
    return IllegalTransitionError(
        f"{len(sample_ids)} samples are not covered by a durable checkpoint yet (first: {sample_ids[0]}).",
        why="Their features would be needed again after a crash.",
        next="release them after record_checkpoint has named a step that covers them.",
    )
