"""RunStatus: what a run has done and is doing, as one document. `paceline status --json` prints it.

docs/status.md is written from these descriptions. Fields are added, never renamed and never given another
meaning; a change that would break a reader raises SCHEMA.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

SCHEMA = 1
LISTED_MAX = 100  # prompts and samples that are named with their reasons


class Process(Struct, frozen=True, kw_only=True):
    """One process of the run: a producer, the consumer; while they are live, its other ranks, supervisor and
    evaluator."""

    role: Annotated[
        str, Meta(description="`producer`, `producer-1`, `consumer`, `consumer-1`, `evaluator`, ...")
    ]
    state: Annotated[
        str, Meta(description="`live`, `ended`, or `elsewhere`: told of itself from another host")
    ]
    pid: Annotated[int | None, Meta(description="its id on its host; null if it has ended or is unknown")] = (
        None
    )
    host: Annotated[str, Meta(description="its host, if that is another one; else empty")] = ""
    doing: Annotated[str, Meta(description="what it does now, in words")] = ""
    starts: Annotated[int, Meta(description="how often the role was taken, restarts included")] = 0
    waited_seconds: Annotated[
        float,
        Meta(
            description="waited for the other side since its last start: a producer for room, the consumer "
            "for samples"
        ),
    ] = 0.0
    waiting_share: Annotated[
        float | None,
        Meta(description="the share of `window_seconds` that it waited so; null if not measured"),
    ] = None
    idle_share: Annotated[
        float | None,
        Meta(
            description="a producer: the share that it waited for its turn, because others hold the next "
            "prompts"
        ),
    ] = None
    window_seconds: Annotated[float, Meta(description="the newest seconds that shares and rates tell of")] = (
        0.0
    )
    samples_per_second: Annotated[float | None, Meta(description="captured, or trained; null if none")] = None
    tokens_per_second: Annotated[float | None, Meta(description="a producer: tokens captured a second")] = (
        None
    )


class Prompts(Struct, frozen=True, kw_only=True):
    pending: Annotated[int, Meta(description="registered and not leased")]
    leased: Annotated[int, Meta(description="being captured")]
    done: Annotated[int, Meta(description="captured")]
    failed: Annotated[int, Meta(description="never to be captured; `failed_prompts` has the reasons")]
    planned: Annotated[
        int | None, Meta(description="of the whole run, all rounds; null if only its sources tell")
    ] = None


class Samples(Struct, frozen=True, kw_only=True):
    committed: Annotated[int, Meta(description="captured and recorded, ever")]
    trained: Annotated[int, Meta(description="trained, durably or not")]
    provisional: Annotated[int, Meta(description="trained, and not yet covered by a checkpoint")]
    waiting: Annotated[int, Meta(description="committed and not yet trained")]
    lost: Annotated[int, Meta(description="to be captured again")]
    quarantined: Annotated[
        int, Meta(description="never to be trained (again); `quarantined` has the reasons")
    ]


class Features(Struct, frozen=True, kw_only=True):
    samples: Annotated[int, Meta(description="resident in the feature store")]
    bytes: Annotated[int, Meta(description="resident in the feature store")]
    folder: Annotated[str, Meta(description="where the feature store is; empty before it is known")] = ""
    reserved_bytes: Annotated[int, Meta(description="promised to captures that go on")]
    budget_bytes: Annotated[int | None, Meta(description="features.budget_mib; null if not recorded")] = None
    transfer: Annotated[
        str, Meta(description="method.transfer: `exact`, or `float8`; empty if not recorded")
    ] = ""


class Step(Struct, frozen=True, kw_only=True):
    """The newest optimizer step that the consumer told of; its figures of training are provisional."""

    number: Annotated[int, Meta(description="of the newest step in the weights")]
    planned: Annotated[int | None, Meta(description="of the whole run; null if only its sources tell")] = None
    loss: float | None = None
    losses: Annotated[
        tuple[float, ...], Meta(description="of the newest steps, oldest first; a replayed step counts once")
    ] = ()
    acceptance_length: Annotated[
        float | None, Meta(description="estimated from the training data, a mean over the newest steps")
    ] = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens: Annotated[int | None, Meta(description="trained in it")] = None
    seconds: Annotated[float | None, Meta(description="of computing it")] = None
    wait_seconds: Annotated[float | None, Meta(description="of planning it and fetching its samples")] = None
    per_second: Annotated[float | None, Meta(description="steps a second; null if none in the window")] = None


class Checkpoint(Struct, frozen=True, kw_only=True):
    step: Annotated[int | None, Meta(description="of the head, the newest durable checkpoint; null if none")]
    kept: Annotated[tuple[int, ...], Meta(description="the steps of all recorded checkpoints")]
    seconds: Annotated[float | None, Meta(description="of writing it, beside training")] = None
    stall_seconds: Annotated[float | None, Meta(description="that training waited for it")] = None


class Measured(Struct, frozen=True, kw_only=True):
    """A point of the curve: a checkpoint measured on held-out prompts by lossless decoding."""

    step: int
    acceptance_length: Annotated[float, Meta(description="of the chain: 1 + accepted / cycles")]
    tree_acceptance_length: Annotated[float | None, Meta(description="of the tree, if one was measured")] = (
        None
    )


class Evaluation(Struct, frozen=True, kw_only=True):
    curve: Annotated[tuple[Measured, ...], Meta(description="by step, under the newest conditions")] = ()
    best: Annotated[Measured | None, Meta(description="the best of those whose draft is kept")] = None
    speed_up: Annotated[
        float | None, Meta(description="over plain decoding, of the last evaluation that measured both")
    ] = None


class Waiting(Struct, frozen=True, kw_only=True):
    """Which side waits for the other, of the newest seconds."""

    consumer_share: Annotated[float | None, Meta(description="the consumer waited for samples")] = None
    producer_share: Annotated[float | None, Meta(description="the producers waited for room, their mean")] = (
        None
    )
    checkpoint_share: Annotated[float | None, Meta(description="training waited for checkpoints")] = None
    limits: Annotated[
        str,
        Meta(
            description="what limits the run: `capture`, `turn`, `training`, `room`, `checkpoints`, "
            "`nothing`; empty if not known"
        ),
    ] = ""
    words: Annotated[str, Meta(description="the same as a sentence, with advice")] = ""


class RunStatus(Struct, frozen=True, kw_only=True):
    schema: Annotated[int, Meta(description="the version of this document")] = SCHEMA
    time: Annotated[float, Meta(description="when it was read, in seconds since 1970 UTC")]
    run: Annotated[str, Meta(description="run.name")]
    directory: Annotated[str, Meta(description="run.directory, absolute")]
    state: Annotated[
        str,
        Meta(
            description="`complete`; else `live`: a process of it is alive; `failed`: ended with `error`; "
            "`stopped`"
        ),
    ]
    error: Annotated[str, Meta(description="the error that the run ended with; empty if none")] = ""
    stopped_flat: Annotated[str, Meta(description="why training ended early; empty if it did not")] = ""
    ledger: Annotated[str, Meta(description="where the ledger is, if it is no file of the run's folder")] = ""
    waits_for: Annotated[str, Meta(description="the group that training waits for, and its producer")] = ""
    ranks: Annotated[
        str, Meta(description="how many ranks train since which step; empty if there was always one")
    ] = ""
    lsn: Annotated[int, Meta(description="the ledger's log number: it grows with every change")]
    restarts: Annotated[int, Meta(description="starts of all roles beyond their first")]
    seconds_left: Annotated[float | None, Meta(description="at the present rate; null if not known")] = None
    processes: tuple[Process, ...]
    waiting: Waiting
    prompts: Prompts
    samples: Samples
    features: Features
    step: Step
    checkpoint: Checkpoint
    evaluation: Evaluation
    failed_prompts: Annotated[
        dict[int, str], Meta(description=f"the reason of each by ordinal; at most {LISTED_MAX}")
    ]
    quarantined: Annotated[
        dict[str, str], Meta(description=f"the reason of each by sample id; at most {LISTED_MAX}")
    ]
    notes: Annotated[tuple[str, ...], Meta(description="what the processes want a person to know")] = ()
