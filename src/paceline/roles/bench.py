"""Measures how fast a run's roles are here, and keeps the figures for `paceline plan`. No torch."""

from __future__ import annotations

import socket
from datetime import UTC, datetime
from pathlib import Path

from paceline.config.run import RunConfig
from paceline.durable_files import replace_file
from paceline.roles.machine import this_machine
from paceline.roles.question import ask
from paceline.roles.rates import BENCH, Bench, named
from paceline.section import Section
from paceline.target.hub import local_target
from paceline.target.shape import read_shape


class BenchRequest(Section):
    """`seconds`: for capture, store and training together; loading the target comes on top."""

    run_file: str
    seconds: float


class Measured(Section):
    """`start_s`: until the engine was ready. `samples`: that were captured. The rates: see `CostsSection`."""

    dtype: str
    start_s: float
    samples: int
    capture_tokens_per_s: float
    train_tokens_per_s: float
    store_mib_per_s: float


def measure_run(run_file: Path, config: RunConfig, seconds: float) -> tuple[Bench, Measured, Path]:
    """The figures, and the file in the run's directory that now has them. Raises the measurement's error."""
    target = local_target(config.target)  # that process does not use the network
    request = BenchRequest(run_file=str(run_file.absolute()), seconds=seconds)
    told = ask("paceline.roles.bencher", request.model_dump_json(), "measurement")
    found = Measured.model_validate_json(told)
    machine = this_machine()
    gpus = f", {len(machine.gpus)} x {machine.gpus[0].name}" if machine.gpus else ""
    kept = Bench(
        date=datetime.now(UTC).date().isoformat(),
        machine=f"{socket.gethostname()}, {machine.processors} processors{gpus}",
        target=named(read_shape(target.model)),
        method=config.method.name,
        dtype=found.dtype,
        capture_tokens_per_s=found.capture_tokens_per_s,
        train_tokens_per_s=found.train_tokens_per_s,
        store_mib_per_s=found.store_mib_per_s,
    )
    config.run.directory.mkdir(parents=True, exist_ok=True)
    path = config.run.directory / BENCH
    replace_file(path, (kept.model_dump_json(indent=1) + "\n").encode())
    return kept, found, path
