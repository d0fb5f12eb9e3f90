"""`paceline produce`, `consume` and `engine`: this process becomes a role, or prints a server's command."""

from __future__ import annotations

import os
import sys
from contextlib import closing
from pathlib import Path

from paceline.cli.named_run import run_file_of
from paceline.cli.plain import err, say
from paceline.config.load import load_run_config
from paceline.config.run import RunConfig
from paceline.engines.table import ENGINES
from paceline.errors import ConfigError, LedgerMissingError
from paceline.ledger.facts import COMPLETED_STEP
from paceline.roles.plan import role_environment
from paceline.roles.workers import CONSUMER, JOIN, PRODUCER
from paceline.target.hub import local_target


def become_producer(run: Path, *, joins: bool) -> None:
    run_file = run_file_of(run)
    if joins and _is_complete(load_run_config(run_file)):  # what starts producers again is then done
        say(err, "The run is complete: it needs no further producer.")
        return
    _become(PRODUCER, run_file, *([JOIN] if joins else []))


def become_consumer(run_file: Path) -> None:
    _become(CONSUMER, run_file)


def print_engine_command(name: str, run: Path) -> None:
    """Of the engine's server for the run. Raises ConfigError if it is not the run's engine."""
    run_file = run_file_of(run)
    config = load_run_config(run_file)
    _refuse_another_engine(name, run, config)
    local_target(config.target)  # that process does not use the network
    command = [sys.executable, "-m", "paceline.roles.server_command", str(run_file)]
    os.execve(sys.executable, command, {**os.environ, **role_environment(1)})  # noqa: S606 (our own module)


def _is_complete(config: RunConfig) -> bool:
    try:
        with closing(config.view_ledger()) as view:
            return view.facts().get(COMPLETED_STEP) is not None
    except LedgerMissingError:  # it has not begun, as the role will say
        return False


def _become(role: str, run_file: Path, *arguments: str) -> None:
    config = load_run_config(run_file)
    local_target(config.target)  # the role's process does not use the network
    machine = config.machine
    threads = machine.producer_threads if role == PRODUCER else machine.consumer_threads
    environment = {**os.environ, **role_environment(threads)}
    # The role replaces this process, so that it receives signals and sets the exit code.
    command = [sys.executable, "-m", f"paceline.roles.{role}", str(run_file), *arguments]
    os.execve(sys.executable, command, environment)  # noqa: S606 (our own module, no shell)


def _refuse_another_engine(name: str, run: Path, config: RunConfig) -> None:
    """Raise ConfigError unless `name` is the engine of the run, and has a server."""
    if "url" not in ENGINES.find(name).model_fields:
        raise ConfigError(
            f"The engine {name} has no server of its own.",
            why="It starts and ends with the run.",
            next=f"paceline train {run}, or name an engine with a server: vllm or sglang.",
        )
    if config.engine.name != name:
        raise ConfigError(
            f"The engine of {run} is {config.engine.name}, not {name}.",
            why="The command follows from the run's target, its method and its engine section.",
            next=f"set engine: {{name: {name}, url: http://127.0.0.1:8000}} in the run file.",
        )
