"""A producer process: `python -m paceline.roles.producer RUN.yaml [WORKER]`; `--join`: under a free name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import torch

from paceline.capture.producer import Producer
from paceline.capture.settings import CaptureSettings
from paceline.config.run import RunConfig
from paceline.data.source import Stretch
from paceline.engines.engine import TargetEngine
from paceline.engines.settings import EngineRun
from paceline.errors import ServerUnavailableError, StoreError
from paceline.features.store import FeatureStore
from paceline.ledger.facts import COMPLETED_STEP
from paceline.ledger.ledger import Ledger
from paceline.ledger.locks import RoleLock
from paceline.ledger.producer_session import WORKER
from paceline.roles.binding import bind_date, bind_run
from paceline.roles.feature_folder import EngineFolder, refuse_lost_place, take_folder
from paceline.roles.feature_place import answers_place
from paceline.roles.held_out import look_at_held_out
from paceline.roles.plan import RunPlan, window_size
from paceline.roles.process import run_role
from paceline.roles.target_binding import bind_engine, bind_target, refuse_changed, refuse_foreign_answers
from paceline.roles.target_probe import bind_probe
from paceline.roles.wire import build_disagg_online_producer
from paceline.roles.workers import JOIN, PRODUCER, KeptName, about_this_process, join, role_of, worker_of
from paceline.telemetry import EventLog


def produce(
    plan: RunPlan,
    events: EventLog,
    should_stop: Callable[[], bool],
    worker: str = WORKER,
    *,
    joins: bool = False,
) -> None:
    """Capture every prompt whose sample is not committed, or is lost; then end.

    `joins`: the run was begun by others, maybe in another folder.
    """
    config, role = plan.config, role_of(worker)
    torch.set_num_threads(config.machine.producer_threads)
    ledger = config.open_ledger(joins=joins)
    stretches = bind_run(plan, ledger, role=role)
    if ledger.facts().get(COMPLETED_STEP) is not None:
        return
    folder = take_folder(
        config,
        ledger,
        lambda message: events.write("note", message=message),
        should_stop,
        joins=joins,
    )
    target = bind_target(ledger, config, role)
    refuse_foreign_answers(config, target)
    place = EngineFolder(config)
    run = EngineRun(
        features=config.method.build().features,
        directory=config.run.directory if worker == WORKER else config.run.directory / role,
        files=place.take,
        date=bind_date(ledger),
        should_stop=should_stop,
        report=events.write,
    )
    with (
        KeptName(ledger, worker, config.machine.producer_timeout_s) as kept_name,
        closing(place),
        closing(config.engine.build(config.target, run)) as engine,
    ):
        try:
            engine.probe()
            refuse_changed(config, target, engine.facts)
            bind_engine(ledger, config, engine.facts, role)
            bind_probe(ledger, config, engine, events, role=role)
            facts = engine.facts
            events.write("engine_ready", dtype=facts.dtype, model_version=facts.model_version)
            if not ledger.snapshot().committed:
                _note_held_out(plan, engine, events)
            refuse_lost_place(config, ledger, folder)
            answers = answers_place(config, folder, worker, repeats_bits=facts.repeats_bits)
            # After an error, too: a thread of a store that is in a call when Python ends aborts the process.
            with closing(config.features.build(folder, owner=True, writer=int(worker))) as features:
                producer = _producer(plan, stretches, ledger, features, engine, events, worker, answers)
                kept_name.end()
                stays = config.features.ends_with_producers
                _capture_all(ledger, features, producer, should_stop, stays=stays)
        except ServerUnavailableError:
            if not should_stop():  # the stop ended the wait for the server
                raise
    ledger.close()


def _note_held_out(plan: RunPlan, engine: TargetEngine, events: EventLog) -> None:
    facts = engine.facts
    if plan.evaluation_obstacle:
        return
    if note := look_at_held_out(plan.config, engine, facts.vocab_size, facts.max_positions):
        events.write("note", message=note)


def _producer(
    plan: RunPlan,
    stretches: Sequence[Stretch],
    ledger: Ledger,
    features: FeatureStore,
    engine: TargetEngine,
    events: EventLog,
    worker: str,
    answers: tuple[Path, str],
) -> Producer:
    config = plan.config
    return build_disagg_online_producer(
        run_id=config.run.name,
        engine=engine,
        feature_store=features,
        prompts=plan.source(stretches),
        capture=CaptureSettings.of(
            config.capture,
            config.data,
            seed=config.run.seed,
            strategy=config.method.name,
            features=config.method.build().features(engine.facts),
        ),
        window_size=window_size(config),
        step_tokens=config.training.tokens_per_step,
        budget_samples=config.features.budget_samples,
        answers_folder=answers[0],
        answers_writer=answers[1],
        metadata_store=ledger,
        attempt_max=config.capture.attempt_max,
        worker=worker,
        timeout_s=config.machine.producer_timeout_s,
        about=about_this_process(config.run.directory),
        report=events.write,
    )[0]


def _capture_all(
    ledger: Ledger,
    features: FeatureStore,
    producer: Producer,
    should_stop: Callable[[], bool],
    *,
    stays: bool,
) -> None:
    """`stays`: this process holds what it has captured, so it waits until the run is complete."""

    def is_complete() -> bool:
        return ledger.facts().get(COMPLETED_STEP) is not None

    def is_over() -> bool:
        return should_stop() or is_complete()

    try:
        producer.run(should_stop=is_over)
        while stays and producer.stay(is_over):  # a sample was lost
            producer.run(should_stop=is_over)
    except StoreError:
        # The consumer reached its last step and has freed the memory that this producer uses.
        if not is_complete():
            raise
    if is_complete():
        features.destroy()  # this producer may have created it again after the consumer freed it


class Place:
    """The worker that this process is: the given one, or a free one that it takes with its lock."""

    def __init__(self, worker: str | None) -> None:
        self.worker = worker
        self._joins = worker is None

    def take(self, config: RunConfig) -> RoleLock:
        if not self._joins:
            assert self.worker is not None, "it was given"
            return RoleLock(config.run.directory, role_of(self.worker))
        lock = join(config)
        self.worker = worker_of(lock.role)
        return lock

    def produce(self, plan: RunPlan, events: EventLog, should_stop: Callable[[], bool]) -> None:
        assert self.worker is not None, "it was taken"
        produce(plan, events, should_stop, self.worker, joins=self._joins)


def main(run_file: str, worker: str = WORKER) -> int:
    place = Place(None if worker == JOIN else worker)
    role = PRODUCER if place.worker is None else role_of(place.worker)
    return run_role(role, Path(run_file), place.produce, take=place.take)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
