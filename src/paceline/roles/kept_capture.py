"""Captures the features of a comparison by the product's own producer, into a folder that is kept.

A killed capture goes on. A sample whose file is gone or damaged is captured again, with its whole group, so
to the same bits.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import torch

from paceline.capture.encoding import EncodedPrompt, Encoding
from paceline.capture.settings import CaptureSettings
from paceline.capture.sizing import largest_sample_bytes, payload_bytes
from paceline.durable_files import make_folder, replace_file
from paceline.engines.engine import TargetEngine
from paceline.engines.settings import EngineRun
from paceline.errors import ConfigError, FeatureMissingError, StoreError
from paceline.evaluation.heldout import HeldOut
from paceline.ledger.settings import SqliteSection
from paceline.roles.binding import bind_date
from paceline.roles.comparison import digest_of
from paceline.roles.feature_folder import EngineFolder
from paceline.roles.held_out import TemplateOnly
from paceline.roles.kept_features import FEATURES, IDENTITY, Asked, KeptFeatures, find_kept
from paceline.roles.plan import RunPlan
from paceline.roles.target_binding import refuse_foreign_answers
from paceline.roles.wire import build_disagg_online_producer
from paceline.target.facts import TargetFacts
from paceline.target.tokenizer import PromptEncoder
from paceline.target.version import TargetVersion
from paceline.telemetry import EventLog
from paceline.training.replay import KeptSample
from paceline.types import Feature

HEADER_BYTES = 4096  # of a file, at most
TRIES = 4  # captures: of what is missing, then of samples whose files are damaged


def capture_kept(directory: Path, asked: Asked, events: EventLog) -> tuple[KeptFeatures, list[KeptSample]]:
    """Find the features, or capture what is missing of them.

    Raises ConfigError if no prompt gives a sample, StoreError if the disk has no room.
    """
    refuse_foreign_answers(asked.plan.config, TargetVersion.of(asked.plan.config.target.model))
    kept = find_kept(directory, asked)
    samples = None if kept is None else _whole(kept, events)
    for _ in range(TRIES):
        if samples is None:
            kept = _capture(directory, asked, kept, events)
            samples = _whole(kept, events)
    if kept is None or samples is None:
        raise StoreError(
            f"{directory} does not keep what is written to it: after {TRIES} captures samples are damaged.",
            why="Training on other samples would compare variants on different data.",
            next="check that disk, or choose another (--directory DIR).",
        )
    if not samples:
        raise ConfigError(
            "None of the prompts gave a sample.",
            why="There is nothing to compare variants on.",
            next="paceline data check RUN.yaml says what is wrong with the prompts.",
        )
    _capture_held_out(kept, asked, events)
    return kept, samples


def _whole(kept: KeptFeatures, events: EventLog) -> list[KeptSample] | None:
    """The samples; None if some are still to be captured, or to be captured again."""
    if not kept.is_complete:
        return None
    try:
        return kept.samples()
    except FeatureMissingError as error:
        events.write("note", message=error.what)
        return None


def _capture(directory: Path, asked: Asked, kept: KeptFeatures | None, events: EventLog) -> KeptFeatures:
    """Run the producer to its end."""
    config = asked.plan.config
    if kept is None:
        names = [feature.name for feature in asked.needed(asked.head.facts)]
        folder = directory / f"features-{digest_of([asked.identity(), names])}"
        shutil.rmtree(folder, ignore_errors=True)  # it has no identity, so nothing of it is used
        make_folder(folder)
    else:
        folder = kept.folder
    ledger = SqliteSection(durability=config.ledger.durability).open(folder, config.run.name)

    def wanted(facts: TargetFacts) -> tuple[Feature, ...]:
        return asked.needed(facts) if kept is None else kept.features

    with closing(ledger), _engine(asked.plan, folder, bind_date(ledger), wanted, events) as engine:
        settings = _settings(asked, tuple(wanted(engine.facts)))
        most, largest = _bytes_at_most(asked, engine, settings)
        told = {"identity": asked.identity(), "dtype": engine.facts.dtype}
        if kept is None:
            features = {feature.name: feature.rows for feature in settings.features}
            replace_file(folder / IDENTITY, json.dumps({**told, FEATURES: features}, indent=1).encode())
        opened = KeptFeatures(folder, most + 4 * settings.group_size * largest)
        _refuse_no_room(folder, most, opened.store.usage().resident_bytes, events)
        _, drive = build_disagg_online_producer(
            run_id=config.run.name,
            engine=engine,
            feature_store=opened.store,
            prompts=asked.source,
            capture=settings,
            window_size=1,
            answers_folder=folder / "answers",
            metadata_store=ledger,
            attempt_max=config.capture.attempt_max,
            report=events.write,
        )
        drive()
        _keep_held_out(opened, asked, asked.held_out(engine), engine)
    return KeptFeatures(folder)


@contextmanager
def _engine(
    plan: RunPlan,
    folder: Path,
    date: str,
    features: Callable[[TargetFacts], Sequence[Feature]],
    events: EventLog,
) -> Iterator[TargetEngine]:
    """The run's engine, which has passed its probe."""
    config, place = plan.config, EngineFolder(plan.config)
    torch.set_num_threads(config.machine.producer_threads)
    run = EngineRun(features=features, directory=folder, files=place.take, date=date, report=events.write)
    with closing(place), closing(config.engine.build(config.target, run)) as engine:
        engine.probe()
        yield engine


def _settings(asked: Asked, features: tuple[Feature, ...]) -> CaptureSettings:
    config = asked.plan.config
    return CaptureSettings.of(
        config.capture, config.data, seed=config.run.seed, strategy="comparison", features=features
    )


def _bytes_at_most(asked: Asked, engine: TargetEngine, settings: CaptureSettings) -> tuple[int, int]:
    """How many bytes all samples take at most, and the producer's reservation for one."""
    answer = settings.max_answer_tokens
    longest = (settings.max_prompt_tokens or 0) + answer
    hidden, source, encoding = engine.facts.hidden_size, asked.source, Encoding(engine, settings)

    def most_tokens(prompt: EncodedPrompt) -> int:
        if prompt.chat is not None:
            return longest
        return len(prompt.token_ids) + (0 if prompt.is_whole else answer)

    total, size = 0, settings.group_size
    for first in range(0, source.size or 0, size):
        for prompt in encoding.group(first, source.read(first, size)):
            tokens = 0 if prompt.broken else most_tokens(prompt)
            own = payload_bytes(settings.features, hidden, num_tokens=tokens, num_targets=tokens)
            total += own + HEADER_BYTES
    largest = largest_sample_bytes(settings.features, hidden, num_tokens=longest, num_targets=longest)
    return total, largest


def _refuse_no_room(folder: Path, most: int, there: int, events: EventLog) -> None:
    needed, free = max(0, most - there), shutil.disk_usage(folder).free
    message = f"the features take at most {most / 1e6:,.0f} MB in {folder}, {there / 1e6:,.0f} MB lie there"
    events.write("note", message=f"{message}, {free / 1e6:,.0f} MB are free")
    if needed > free:
        raise ConfigError(
            f"The features may take {needed / 1e6:,.0f} MB more, and {folder} has {free / 1e6:,.0f} MB.",
            why="All samples are kept, so that every variant trains on the same ones. Nothing was captured.",
            next="compare on fewer prompts (--prompts N), or choose another disk (--directory DIR).",
        )


def _capture_held_out(kept: KeptFeatures, asked: Asked, events: EventLog) -> None:
    """Keep the features of the target's answers to other held-out prompts than those of the capture."""
    config = asked.plan.config
    encoder = PromptEncoder.of(config.target, date=kept.date)
    held_out = asked.held_out(TemplateOnly(encoder, config.target.model))
    if held_out.asked and kept.held_out(held_out, config.evaluation.max_new_tokens) is None:
        with _engine(asked.plan, kept.folder, kept.date or "", lambda _: kept.features, events) as engine:
            _keep_held_out(kept, asked, held_out, engine)


def _keep_held_out(kept: KeptFeatures, asked: Asked, held_out: HeldOut, engine: TargetEngine) -> None:
    config = asked.plan.config
    kept.keep_held_out(held_out, config.evaluation.max_new_tokens, engine, config.capture.group_size)
