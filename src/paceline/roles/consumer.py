"""The consumer process: `python -m paceline.roles.consumer RUN.yaml`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from paceline.data.source import Stretch
from paceline.ledger.facts import COMPLETED_STEP, STOPPED_FLAT
from paceline.ledger.place import note
from paceline.precision import resolve_device, torch_dtype
from paceline.roles.binding import bind_run
from paceline.roles.feature_folder import folder_of, refuse_other_place
from paceline.roles.plan import RunPlan
from paceline.roles.process import run_role
from paceline.roles.target_binding import DRAFT_NUMERICS, bind_numerics, bind_target
from paceline.roles.wire import ConsumerParts, build_disagg_online_consumer
from paceline.target.head import TargetHead
from paceline.telemetry import EventLog
from paceline.training.determinism import compute_deterministically
from paceline.training.settings import TrainerSettings


def trainer_settings(plan: RunPlan, stretches: Sequence[Stretch]) -> TrainerSettings:
    config, training = plan.config, plan.config.training
    dtype = torch_dtype(config.method.dtype, resolve_device(training.device))
    *before, total_steps = plan.num_steps(stretches)
    return TrainerSettings(
        total_steps=total_steps,
        totals_before=tuple(before),
        first_samples=config.method.first_samples,
        training=training,
        checkpoint=config.checkpoint,
        seed=config.run.seed,
        autocast_dtype=torch.bfloat16 if dtype is torch.bfloat16 else None,
    )


def consume(plan: RunPlan, events: EventLog, should_stop: Callable[[], bool]) -> None:
    """Train from the newest valid checkpoint to the end of the stream."""
    config = plan.config
    compute_deterministically(config.machine.consumer_threads)
    ledger = config.open_ledger(lambda message: events.write("note", message=message))
    stretches = bind_run(plan, ledger, role="consumer")
    features = config.features.build(folder_of(config, ledger), owner=False)
    if ledger.facts().get(COMPLETED_STEP) is not None:
        features.destroy()
        return
    refuse_other_place(config, ledger)
    target = bind_target(ledger, config, "consumer")
    method, head = config.method.build(), TargetHead.load(config.target.model)
    method.check_target(head)
    settings = trainer_settings(plan, stretches)

    def stops_early() -> bool:
        return config.training.stop_when_flat is not None and ledger.facts().get(STOPPED_FLAT) is not None

    dtype = "float32" if settings.autocast_dtype is None else "bfloat16"
    numerics = {"dtype": dtype, "device": resolve_device(config.training.device).type}
    bind_numerics(ledger, config, "consumer", DRAFT_NUMERICS, numerics)
    # One thread writes checkpoints, the other reads the next step's features.
    with ThreadPoolExecutor(2, thread_name_prefix="paceline-consumer") as executor:
        trainer, loader = build_disagg_online_consumer(
            run_id=config.run.name,
            feature_store=features,
            parts=ConsumerParts(
                method=method,
                head=head,
                target=target,
                checkpoint_folder=config.checkpoint_folder,
                settings=settings,
                block_size=config.capture.group_size,
                starts=plan.source(stretches).starts,
            ),
            metadata_store=ledger,
            resume=True,
            should_stop=lambda: should_stop() or stops_early(),
            executor=executor,
            report=events.write,
        )
        trainer.session.note = partial(note, config.run.directory)
        step = trainer.fit(loader)
    everything_trained = loader.exhausted and ledger.snapshot().usage.waiting_samples == 0
    if everything_trained or step == config.training.max_steps or (step and stops_early()):
        trainer.session.set_facts({COMPLETED_STEP: step})
        features.destroy()
    ledger.close()


if __name__ == "__main__":
    sys.exit(run_role("consumer", Path(sys.argv[1]), consume))
