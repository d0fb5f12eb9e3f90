"""Joins the adapters into a producer and a consumer over one ledger.

The CLI's roles, the in-process loop and a user's own script all build their parts here.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from paceline.capture.backpressure import Backpressure, Watermarks, check_feasible
from paceline.capture.encoding import Encoding
from paceline.capture.neighbours import Neighbours
from paceline.capture.producer import Producer
from paceline.capture.settings import CaptureSettings
from paceline.capture.sizing import collected_at_most, reserved_sample_bytes
from paceline.data.answers import AnswerFiles
from paceline.data.source import PromptList, PromptSource
from paceline.engines.engine import TargetEngine
from paceline.errors import ConfigError, PacelineError
from paceline.features.store import FeatureStore
from paceline.ledger.consumer_session import ConsumerSession
from paceline.ledger.ledger import Ledger
from paceline.ledger.producer_session import WORKER, ProducerSession
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.loader.loader import StepLoader
from paceline.loader.settings import LoaderSettings
from paceline.methods.method import DraftMethod
from paceline.roles.narrowing import Narrowing
from paceline.target.head import TargetHead
from paceline.target.version import TargetVersion
from paceline.training.checkpoint import CheckpointFolder
from paceline.training.group import Group
from paceline.training.settings import TrainerSettings
from paceline.training.torch_learner import TorchLearner
from paceline.training.trainer import ConsumerSide, Trainer, take_over
from paceline.types import PromptTask

Report = Callable[..., None]


def no_report(event: str, **fields: Any) -> None:
    """Discard the event."""


class DriveProducer(Protocol):
    """`Producer.run`, or what calls it. `max_rounds`: turns of its loop, not rounds of the data."""

    def __call__(
        self, max_rounds: int | None = None, should_stop: Callable[[], bool] | None = None
    ) -> int: ...


def resolve_ledger(metadata_store: Ledger | None, metadata_db_path: str | os.PathLike[str] | None) -> Ledger:
    """The given ledger; else SQLite at the given path; else a ledger private to this process."""
    if metadata_store is not None and metadata_db_path is not None:
        raise ConfigError(
            "Both metadata_store and metadata_db_path were given.",
            why="Producer and consumer must share exactly one store.",
            next="pass one of the two.",
        )
    if metadata_db_path is not None:
        return SQLiteLedger(metadata_db_path)
    return metadata_store or SQLiteLedger()


def build_disagg_online_producer(
    *,
    run_id: str,
    engine: TargetEngine,
    feature_store: FeatureStore,
    prompts: PromptSource | Sequence[PromptTask | Mapping[str, Any] | str],
    capture: CaptureSettings,
    window_size: int = 64,
    step_tokens: int | None = None,
    budget_samples: int | None = None,
    answers_folder: Path | None = None,
    answers_writer: str = "",
    metadata_store: Ledger | None = None,
    metadata_db_path: str | os.PathLike[str] | None = None,
    attempt_max: int = 3,
    worker: str = WORKER,
    timeout_s: float | None = None,
    about: Mapping[str, Any] | None = None,
    report: Report = no_report,
) -> tuple[Producer, DriveProducer]:
    """The producer and the function that drives it.

    `prompts`, in run order: a source that is read by ordinal, or a list of tasks, mappings or plain texts
    (see `PromptList`). `window_size`: how many samples the consumer must collect before it can go on (its
    batch, or the samples that choose its draft vocabulary); the start-up check uses it to prove that the
    budget cannot deadlock. `step_tokens`: `training.tokens_per_step`; the samples of a step come to that.
    `budget_samples`: the most samples that may be resident (None: only bytes are limited). `answers_folder`:
    where the tokens of answers are kept; an engine that does not repeat its bits needs it.
    `answers_writer`: this process's name in that folder, if other hosts write into it, too.
    `worker`: this producer's name, which no other live producer of the run has. `timeout_s`: a producer of
    the run without a sign of life for so long is taken for dead by the others; None: there are no others.
    `about`: what people should know of this producer.
    Give both roles the same durable store: `metadata_store`, or `metadata_db_path` for SQLite; without
    either the store is private to this process. Raises ConfigError if the budget is too small.
    """
    ledger = resolve_ledger(metadata_store, metadata_db_path)
    session = ProducerSession(ledger, run_id, worker, attempt_max=attempt_max)
    source = PromptList(prompts) if isinstance(prompts, Sequence) else prompts
    longest = capture.max_prompt_tokens or _longest_prompt(source, engine, capture)
    sample_bytes = reserved_sample_bytes(
        capture, engine.facts.hidden_size, longest_prompt=longest, has_chats=source.has_chats
    )
    budget = feature_store.usage().budget_bytes
    window = collected_at_most(
        window_size, sample_bytes, capture.features, engine.facts.hidden_size, step_tokens=step_tokens
    )
    check_feasible(
        budget_bytes=budget,
        sample_bytes=sample_bytes,
        group_size=capture.group_size,
        window_size=window.samples,
        budget_samples=budget_samples,
        window_bytes=window.num_bytes,
    )
    marks = Watermarks(
        budget_bytes=budget,
        group_bytes=capture.group_size * sample_bytes,
        budget_samples=budget_samples,
        group_samples=capture.group_size,
        window_samples=window.samples,
        window_bytes=window.num_bytes,
    )
    backpressure = Backpressure(feature_store, session, marks, report=report)
    if answers_folder is None and not engine.facts.repeats_bits:
        raise _nowhere_to_keep_answers()
    answers = None if answers_folder is None else AnswerFiles(answers_folder, answers_writer)
    producer = Producer(
        session,
        Narrowing(engine),
        feature_store,
        source,
        capture,
        backpressure,
        answers=answers,
        report=report,
    )
    if timeout_s is not None:
        producer.meet(
            Neighbours(
                session,
                timeout_s=timeout_s,
                group_size=capture.group_size,
                groups_ahead=marks.groups_ahead,
                about=about,
                report=report,
            )
        )
    return producer, producer.run


def _nowhere_to_keep_answers() -> ConfigError:
    return ConfigError(
        "This engine does not repeat its bits, and it has no folder for its answers.",
        why="A sample that is captured again could have another answer than the one that was trained.",
        next="pass answers_folder=...",
    )


def _longest_prompt(source: PromptSource, engine: TargetEngine, capture: CaptureSettings) -> int:
    """The most tokens of any prompt. Without a limit, every prompt is encoded once before the start."""
    if source.size is None or source.has_chats:
        raise ConfigError(
            "A source of chats, or one without an end, needs a limit on the length of its prompts.",
            why="The bytes reserved for a sample follow from it.",
            next="set max_prompt_tokens in CaptureSettings.",
        )
    encoded = Encoding(engine, capture).group(0, source.read(0, source.size))
    return max((len(prompt.token_ids) for prompt in encoded), default=1)


@dataclass(frozen=True)
class ConsumerParts:
    """What the consumer trains, and where its checkpoints lie."""

    method: DraftMethod
    head: TargetHead
    checkpoint_folder: Path
    settings: TrainerSettings
    block_size: int = 64
    target: TargetVersion | None = None  # of the samples that may be trained; None: of any
    starts: Sequence[int] = (0,)  # see LoaderSettings
    size: int | None = None  # the same


def build_disagg_online_consumer(
    *,
    run_id: str,
    feature_store: FeatureStore,
    parts: ConsumerParts,
    metadata_store: Ledger | None = None,
    metadata_db_path: str | os.PathLike[str] | None = None,
    resume: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    idle_timeout_s: float | None = None,
    group: Group | None = None,
    about: Mapping[str, Any] | None = None,
    executor: Executor | None = None,
    report: Report = no_report,
) -> tuple[Trainer, StepLoader]:
    """The trainer and its loader; `trainer.fit(loader)` trains to the end of the stream.

    `resume=True` goes on from the newest valid checkpoint: samples that it covers are released and not
    read again; all others are trained. It needs a durable store (else ConfigError, a ValueError).
    `resume=False` is refused if the store has a checkpoint, because its samples would be trained twice.
    `group`: the ranks that train together, of which this process is rank 0 (None: it trains alone); `about`:
    what the others are told first. They wait in `training.ranks.Follower`; `trainer.ranks.end()` ends them.
    `executor` (two threads are enough; the caller shuts it down) writes checkpoints and reads the next
    step's features while training goes on; None: training waits for both.
    """
    ledger = resolve_ledger(metadata_store, metadata_db_path)
    if resume and not ledger.durable:
        raise ConfigError(
            "resume=True needs a durable metadata store; this one is private to the process.",
            why="An in-process store has no history to resume from.",
            next="pass metadata_db_path=... (or metadata_store=SQLiteMetadataStore(path)).",
        )
    session = ConsumerSession(ledger, run_id)
    if not resume and session.checkpoints():
        raise ConfigError(
            f"The store of run {run_id!r} already has a checkpoint at step {session.checkpoints()[-1].step}.",
            why="Starting over would train its samples a second time.",
            next="pass resume=True, or use a new store for a new run.",
        )

    training = parts.settings.training
    parts.method.check_target(parts.head)
    return take_over(
        ConsumerSide(
            session,
            feature_store,
            CheckpointFolder(parts.checkpoint_folder, run_id),
            TorchLearner(parts.method, parts.head, parts.settings, group),
            group,
            about or {},
        ),
        parts.settings,
        LoaderSettings(
            training.batch_size,
            training.passes,
            parts.block_size,
            parts.starts,
            idle_timeout_s,
            target=parts.target,
            tokens_per_step=training.tokens_per_step,
            size=parts.size,
        ),
        executor=executor,
        should_stop=should_stop,
        report=report,
    )


class _Fits(Protocol):
    def fit(self, loader: Any) -> int: ...


class _Closes(Protocol):
    def close(self) -> None: ...


def run_disagg_online(
    *,
    trainer: _Fits,
    loader: Any,
    drive_producer: DriveProducer,
    channel: _Closes | None = None,
    producer_max_rounds: int | None = None,
    join_timeout_s: float = 300.0,
) -> int:
    """Run both roles in one process: the producer on a thread, `trainer.fit(loader)` on the caller's.

    Either may end first. If the producer does, the trainer drains the stream and returns. If the trainer
    does, done or failed, the producer is asked to stop. If the producer fails, the loader (or the channel,
    if the loader cannot be interrupted) ends the stream, the trainer trains what was committed, and the
    producer's error is raised, chained to the trainer's if that failed too. Returns the last step.

    `producer_max_rounds`: after so many turns of its loop the producer stops; None: at the stream's end.
    """
    _refuse_two_private_stores(trainer, drive_producer)
    if hasattr(loader, "rearm"):
        loader.rearm()
    stop = threading.Event()
    failure: list[BaseException] = []
    end_stream = getattr(loader, "interrupt", None) or (channel.close if channel else lambda: None)

    def produce() -> None:
        try:
            drive_producer(producer_max_rounds, should_stop=stop.is_set)
        except BaseException as error:  # noqa: BLE001 (raised again on the caller's thread)
            failure.append(error)
        finally:
            end_stream()

    thread = threading.Thread(target=produce, name="paceline-producer", daemon=True)
    thread.start()
    trainer_error: BaseException | None = None
    step = 0
    try:
        step = trainer.fit(loader)
    except BaseException as error:  # noqa: BLE001 (raised again below, chained)
        trainer_error = error
    stop.set()
    thread.join(timeout=join_timeout_s)
    if thread.is_alive():
        raise PacelineError(
            f"The producer did not stop within {join_timeout_s:g} s after the trainer ended.",
            why="It may still be capturing; everything committed and checkpointed is safe.",
            next="end this process, then run the same command again.",
        ) from trainer_error
    if failure:
        raise failure[0] from trainer_error
    if trainer_error is not None:
        raise trainer_error
    return step


def _refuse_two_private_stores(trainer: object, drive_producer: object) -> None:
    """Raise ConfigError if both roles were built without a store: each has a private one."""
    producer = getattr(drive_producer, "__self__", None)
    stores = [getattr(getattr(side, "session", None), "ledger", None) for side in (trainer, producer)]
    if None not in stores and stores[0] is not stores[1] and not any(s.durable for s in stores if s):
        raise ConfigError(
            "Producer and trainer each have a private in-process metadata store.",
            why="The committed log is the stream: the trainer would wait for samples it never sees.",
            next="pass one InMemoryMetadataStore() to both builders, or one metadata_db_path.",
        )
