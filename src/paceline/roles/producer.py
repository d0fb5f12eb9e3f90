"""The producer process: `python -m paceline.roles.producer RUN.yaml`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

from paceline.capture.settings import CaptureSettings
from paceline.errors import StoreError
from paceline.ledger.facts import COMPLETED_STEP
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.roles.binding import bind_date, bind_run
from paceline.roles.feature_folder import take_folder
from paceline.roles.held_out import look_at_held_out
from paceline.roles.plan import RunPlan, window_size
from paceline.roles.process import run_role
from paceline.roles.target_binding import TARGET_NUMERICS, bind_numerics, bind_target, refuse_changed
from paceline.roles.wire import build_disagg_online_producer
from paceline.telemetry import EventLog


def produce(plan: RunPlan, events: EventLog, should_stop: Callable[[], bool]) -> None:
    """Capture every prompt whose sample is not committed, or is lost; then end."""
    config = plan.config
    torch.set_num_threads(config.machine.producer_threads)
    ledger = SQLiteLedger(config.ledger_path, durability=config.ledger.durability)
    stretches = bind_run(plan, ledger, role="producer")
    if ledger.facts().get(COMPLETED_STEP) is not None:
        return
    folder = take_folder(config, ledger)
    target = bind_target(ledger, config, "producer")
    engine = config.engine.build(config.target, date=bind_date(ledger))
    engine.probe()
    refuse_changed(config, target, engine.facts)
    numerics = {"dtype": engine.facts.dtype, "device": engine.facts.device}
    bind_numerics(ledger, config, "producer", TARGET_NUMERICS, numerics)
    events.write("engine_ready", dtype=engine.facts.dtype, model_version=engine.facts.model_version)
    if not plan.evaluation_obstacle and not ledger.snapshot().committed:
        facts = engine.facts
        if note := look_at_held_out(config, engine.encode, facts.vocab_size, facts.max_positions):
            events.write("note", message=note)
    features = config.features.build(folder, owner=True)
    _, drive_producer = build_disagg_online_producer(
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
        budget_samples=config.features.budget_samples,
        answers_folder=config.run.directory / "answers",
        metadata_store=ledger,
        attempt_max=config.capture.attempt_max,
        report=events.write,
    )

    def training_is_over() -> bool:
        return should_stop() or ledger.facts().get(COMPLETED_STEP) is not None

    try:
        drive_producer(should_stop=training_is_over)
    except StoreError:
        # The consumer reached its last step and has freed the memory that this producer uses.
        if ledger.facts().get(COMPLETED_STEP) is None:
            raise
    if ledger.facts().get(COMPLETED_STEP) is not None:
        features.destroy()  # this producer may have created it again after the consumer freed it
    features.close()
    ledger.close()


if __name__ == "__main__":
    sys.exit(run_role("producer", Path(sys.argv[1]), produce))
