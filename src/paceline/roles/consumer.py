"""The consumer process: `python -m paceline.roles.consumer RUN.yaml`; with several ranks, each of them.

Rank 0 is the run's consumer. The others train with it and use no ledger (trainer_rank.py).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from paceline.ledger.facts import COMPLETED_STEP, STOPPED_FLAT
from paceline.ledger.place import note
from paceline.precision import resolve_device
from paceline.roles.binding import bind_run
from paceline.roles.feature_folder import folder_of, refuse_other_place
from paceline.roles.plan import RunPlan
from paceline.roles.process import run_role
from paceline.roles.target_binding import DRAFT_NUMERICS, bind_numerics, bind_target
from paceline.roles.trainer_rank import alone, follow, joined, trainer_settings
from paceline.roles.trainers import place_in, role_of_rank
from paceline.roles.wire import ConsumerParts, build_disagg_online_consumer
from paceline.target.head import TargetHead
from paceline.telemetry import EventLog
from paceline.training.determinism import compute_deterministically
from paceline.training.link import Alone, Place
from paceline.training.ranks import dismiss


def consume(
    plan: RunPlan, events: EventLog, should_stop: Callable[[], bool], place: Place | None = None
) -> None:
    """Train from the newest valid checkpoint to the end of the stream. `place`: of rank 0 among several."""
    config = plan.config
    compute_deterministically(config.machine.consumer_threads)
    group = None if place is None else joined(config, place)
    if group is None and config.machine.trainers > 1:
        events.write("note", message=alone(config.machine.trainers))
    ledger = config.open_ledger(lambda message: events.write("note", message=message))
    stretches = bind_run(plan, ledger, role="consumer")
    features_at = folder_of(config, ledger)
    features = config.features.build(features_at, owner=False)
    if ledger.facts().get(COMPLETED_STEP) is not None:
        features.destroy()
        dismiss(group or Alone())
        return
    refuse_other_place(config, ledger)
    target = bind_target(ledger, config, "consumer")
    method, head = config.method.build(), TargetHead.load(config.target.model)
    method.check_target(head)
    totals, source = plan.num_steps(stretches), plan.source(stretches)
    settings = trainer_settings(config, totals, place)

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
                starts=source.starts,
                size=source.size,
            ),
            metadata_store=ledger,
            resume=True,
            should_stop=lambda: should_stop() or stops_early(),
            group=group,
            about={
                "features": features_at.name,
                "totals": totals,
                "checkpoints": str(config.checkpoint_folder.absolute()),
            },
            executor=executor,
            report=events.write,
        )
        trainer.session.note = partial(note, config.run.directory)
        step = trainer.fit(loader)
    trainer.ranks.end()
    everything_trained = loader.exhausted and ledger.snapshot().usage.waiting_samples == 0
    if everything_trained or step == config.training.max_steps or (step and stops_early()):
        trainer.session.set_facts({COMPLETED_STEP: step})
        features.destroy()
    ledger.close()
    if group is not None:
        group.leave()


def main(run_file: str) -> int:
    place = place_in(os.environ)
    rank = 0 if place is None else place.rank
    work = partial(follow if rank else consume, place=place)
    return run_role(role_of_rank(rank), Path(run_file), work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
