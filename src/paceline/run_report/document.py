"""RunReport: what a run was, what it measured, what was checked and what it cost, as one document.

The report's page and an export's model card are drawn from it, and `paceline report RUN --json` prints it.
Fields are added, never renamed and never given another meaning while SCHEMA stays the same.
"""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Struct

SCHEMA = 1
Interval = tuple[float, float] | None


class MeasuredWay(Struct, frozen=True, kw_only=True):
    """A way of guessing. Intervals are 95 % over prompts; null with fewer than two."""

    name: Annotated[str, Meta(description="`draft`, or `prompt lookup, no draft`")]
    guesses: Annotated[str, Meta(description="`chain of 3`, `tree of 7`")]
    acceptance_length: Annotated[float, Meta(description="1 + accepted / cycles")]
    acceptance_length_interval: Interval = None
    emitted_per_cycle: Annotated[float, Meta(description="without what was accepted beyond an answer's end")]
    acceptance_rate: Annotated[
        tuple[float, ...], Meta(description="by depth: the share of cycles that kept a guess there")
    ]
    speed_up: Annotated[float | None, Meta(description="over plain decoding; null without it beside")] = None
    speed_up_interval: Interval = None


class MeasuredCheckpoint(Struct, frozen=True, kw_only=True):
    """A checkpoint measured on held-out prompts by lossless decoding."""

    step: int
    prompts: int
    prompts_file: Annotated[str, Meta(description="its name, without the folder")]
    max_new_tokens: Annotated[int | None, Meta(description="of an answer, at most")] = None
    dtype: str
    device: str
    identical: Annotated[
        int | None, Meta(description="answers equal to plain decoding, token for token; null without it")
    ] = None
    conditions: Annotated[
        str, Meta(description="digest of all but the draft that the figures depend on; empty if not known")
    ] = ""
    ways: Annotated[tuple[MeasuredWay, ...], Meta(description="the chain first")]


class Rule(Struct, frozen=True, kw_only=True):
    name: str
    promise: str
    errors: tuple[str, ...] = ()


class Check(Struct, frozen=True, kw_only=True):
    """The verdict of `paceline fsck`."""

    sound: Annotated[bool | None, Meta(description="null if it could not be checked")]
    why: Annotated[str, Meta(description="why it could not be checked; else empty")] = ""
    looked_at: dict[str, int] = {}
    rules: tuple[Rule, ...] = ()


class RoleCost(Struct, frozen=True, kw_only=True):
    """As far back as the events go that the run keeps."""

    role: str
    starts: int
    killed: int
    seconds: Annotated[float, Meta(description="that its processes lived, all of them together")]


class RunReport(Struct, frozen=True, kw_only=True):
    """What `paceline report RUN --json` prints: a run's figures, which its page and an export's card show."""

    schema: Annotated[int, Meta(description="the version of this document")] = SCHEMA
    version: Annotated[str, Meta(description="of Paceline, that wrote it")]
    time: Annotated[float, Meta(description="when the run was read, in seconds since 1970 UTC")]
    run: str
    directory: str
    state: Annotated[str, Meta(description="as in the status")]
    error: str = ""
    steps: int
    planned_steps: int | None = None
    loss: float | None = None
    losses: Annotated[
        tuple[tuple[int, float], ...], Meta(description="step and loss; means of neighbours if they are many")
    ] = ()
    restarts: int
    samples: Annotated[
        dict[str, int],
        Meta(description="`committed`, `trained`, `provisional`, `quarantined`, and `failed` prompts"),
    ]
    left_out: Annotated[dict[str, str], Meta(description="why, of at most 100 prompts and 100 samples")] = {}
    checkpoint: Annotated[str, Meta(description="the newest one's name and manifest's digest; else empty")]
    plans: Annotated[str, Meta(description="the hash of all plans up to it")]
    measured: Annotated[tuple[MeasuredCheckpoint, ...], Meta(description="by step")] = ()
    best_step: Annotated[int | None, Meta(description="of the best measured draft that is kept")] = None
    check: Check
    cost: tuple[RoleCost, ...] = ()
    seconds: Annotated[float | None, Meta(description="from the first event to the last")] = None
    settings: dict[str, Any] = {}

    def measured_at(self, step: int) -> MeasuredCheckpoint | None:
        return next((one for one in self.measured if one.step == step), None)
