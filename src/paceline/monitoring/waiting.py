"""Which side of a run waits for the other, as a sentence with advice."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from paceline.monitoring.schema import Process, Waiting

MUCH = 0.15  # a share that is worth advice


def waiting_of(
    consumer: Process, producers: Sequence[Process], stalls: float | None, *, all_captured: bool
) -> Waiting:
    """`stalls`: the share that training waited for checkpoints. There is advice only for a live consumer."""
    lacks = consumer.waiting_share
    shares = [process.waiting_share for process in producers if process.waiting_share is not None]
    full = sum(shares) / len(shares) if shares else None
    known = Waiting(consumer_share=lacks, producer_share=full, checkpoint_share=stalls)
    if lacks is None or consumer.state != "live":
        return known
    idle = max((one.idle_share or 0.0 for one in producers), default=0.0)
    if min(lacks, idle) >= MUCH and not all_captured:
        limits, words = "turn", _turn(lacks)
    else:
        limits, words = _verdict(lacks, full or 0.0, stalls or 0.0, all_captured=all_captured)
    return replace(known, limits=limits, words=words)


def _turn(lacks: float) -> str:
    """Prompts are trained in their order, so a slow or dead producer holds the others up."""
    return (
        f"the trainer waits {percent(lacks)} of the time for samples, and producers wait for their turn: one "
        "of them is slow, or died and is taken over after machine.producer_timeout_s"
    )


def _verdict(lacks: float, full: float, stalls: float, *, all_captured: bool) -> tuple[str, str]:
    trainer, capture = f"the trainer waits {percent(lacks)} of the time for samples", percent(full)
    if all_captured:
        return "training", "everything is captured: the rest is training"
    if lacks >= MUCH and full >= MUCH:
        return "room", (
            f"{trainer}, and capture {capture} for room, which a checkpoint frees: raise features.budget_mib "
            "or lower checkpoint.interval_steps"
        )
    if lacks >= MUCH:
        return "capture", f"{trainer}: add a producer (paceline produce RUN --join)"
    if stalls >= MUCH:
        told = f"training stands still {percent(stalls)} of the time for checkpoints"
        return "checkpoints", f"{told}: raise checkpoint.interval_steps"
    if full >= MUCH:
        return "training", f"capture waits {capture} of the time for room: training takes the time"
    return (
        "nothing",
        f"both sides are busy: the trainer waits {percent(lacks)} of the time, capture {capture}",
    )


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"
