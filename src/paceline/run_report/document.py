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
    acceptance_length_interval: Annotated[Interval, Meta(description="of the length")] = None
    emitted_per_cycle: Annotated[float, Meta(description="without what was accepted beyond an answer's end")]
    acceptance_rate: Annotated[
        tuple[float, ...], Meta(description="by depth: the share of cycles that kept a guess there")
    ]
    speed_up: Annotated[float | None, Meta(description="over plain decoding; null without it beside")] = None
    speed_up_interval: Annotated[Interval, Meta(description="of the speed-up")] = None


class MeasuredCheckpoint(Struct, frozen=True, kw_only=True):
    """A checkpoint measured on held-out prompts by lossless decoding."""

    step: Annotated[int, Meta(description="of the checkpoint")]
    prompts: Annotated[int, Meta(description="that were decoded")]
    prompts_file: Annotated[str, Meta(description="its name, without the folder")]
    max_new_tokens: Annotated[int | None, Meta(description="of an answer, at most")] = None
    dtype: Annotated[str, Meta(description="in which draft and target computed")]
    device: Annotated[str, Meta(description="`cpu`, `cuda`, ...")]
    identical: Annotated[
        int | None, Meta(description="answers equal to plain decoding, token for token; null without it")
    ] = None
    conditions: Annotated[
        str, Meta(description="digest of all but the draft that the figures depend on; empty if not known")
    ] = ""
    ways: Annotated[tuple[MeasuredWay, ...], Meta(description="the chain first")]


class Rule(Struct, frozen=True, kw_only=True):
    """A rule of the checker."""

    name: Annotated[str, Meta(description="`C1`, ...")]
    promise: Annotated[str, Meta(description="what holds if there are no errors")]
    errors: Annotated[tuple[str, ...], Meta(description="what is wrong")] = ()


class Check(Struct, frozen=True, kw_only=True):
    """The verdict of `paceline fsck`."""

    sound: Annotated[bool | None, Meta(description="null if it could not be checked")]
    why: Annotated[str, Meta(description="why it could not be checked; else empty")] = ""
    looked_at: Annotated[dict[str, int], Meta(description="how much of what was checked")] = {}
    rules: Annotated[tuple[Rule, ...], Meta(description="all of them; empty if nothing was checked")] = ()
    notes: Annotated[
        int, Meta(description="how many notes `paceline fsck` has, such as what it did not look at")
    ] = 0


class RoleCost(Struct, frozen=True, kw_only=True):
    """As far back as the events go that the run keeps."""

    role: Annotated[str, Meta(description="as in the status")]
    starts: Annotated[int, Meta(description="of its processes")]
    killed: Annotated[int, Meta(description="of these: those that told of no end")]
    seconds: Annotated[float, Meta(description="that its processes lived, all of them together")]


class RunReport(Struct, frozen=True, kw_only=True):
    """What `paceline report RUN --json` prints: a run's figures, which its page and an export's card show."""

    schema: Annotated[int, Meta(description="the version of this document")] = SCHEMA
    version: Annotated[str, Meta(description="of Paceline, that wrote it")]
    time: Annotated[float, Meta(description="when the run was read, in seconds since 1970 UTC")]
    run: Annotated[str, Meta(description="run.name")]
    directory: Annotated[str, Meta(description="run.directory, absolute")]
    state: Annotated[str, Meta(description="as in the status")]
    error: Annotated[str, Meta(description="the error that the run ended with; empty if none")] = ""
    steps: Annotated[int, Meta(description="the newest step in the weights")]
    planned_steps: Annotated[int | None, Meta(description="of the whole run; null if not known")] = None
    loss: Annotated[float | None, Meta(description="of the newest step")] = None
    losses: Annotated[
        tuple[tuple[int, float], ...], Meta(description="step and loss; means of neighbours if they are many")
    ] = ()
    restarts: Annotated[int, Meta(description="starts of all roles beyond their first")]
    samples: Annotated[
        dict[str, int],
        Meta(description="`committed`, `trained`, `provisional`, `quarantined`, and `failed` prompts"),
    ]
    left_out: Annotated[dict[str, str], Meta(description="why, of at most 100 prompts and 100 samples")] = {}
    checkpoint: Annotated[str, Meta(description="the newest one's name and manifest's digest; else empty")]
    plans: Annotated[str, Meta(description="the hash of all plans up to it")]
    measured: Annotated[tuple[MeasuredCheckpoint, ...], Meta(description="by step")] = ()
    best_step: Annotated[int | None, Meta(description="of the best measured draft that is kept")] = None
    check: Annotated[Check, Meta(description="whether the guarantee was kept")]
    cost: Annotated[tuple[RoleCost, ...], Meta(description="of each role")] = ()
    seconds: Annotated[float | None, Meta(description="from the first event to the last")] = None
    settings: Annotated[dict[str, Any], Meta(description="as recorded at the first start, by key")] = {}

    def measured_at(self, step: int) -> MeasuredCheckpoint | None:
        return next((one for one in self.measured if one.step == step), None)
