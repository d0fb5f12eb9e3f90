"""The `paceline` command: one verb a command, no torch in this process.

Every PacelineError becomes one readable message on stderr and the error's exit code.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, ParamSpec

import typer
from rich.console import Console

from paceline.cli.fsck import accept_pages_of, fsck_directory
from paceline.cli.inspect_run import inspect_all, inspect_sample, inspect_step
from paceline.cli.plain import plain, say
from paceline.cli.progress import Progress, describe, evaluation_lines, final_line
from paceline.config.load import load_run_config, recorded_config
from paceline.config.run import RunConfig
from paceline.errors import ConfigError, PacelineError
from paceline.roles.plan import plan_run, role_environment
from paceline.roles.snapshot import open_run, take_snapshot
from paceline.roles.supervisor import Supervisor

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train draft models for speculative decoding, online: producers capture, consumers train.",
)
out, err = Console(), Console(stderr=True)

RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run file.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="The run file, or the run's directory.")]
P = ParamSpec("P")


def advises(command: Callable[P, None]) -> Callable[P, None]:
    """Print a PacelineError as what, why and next; exit with its code."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except PacelineError as error:
            err.print(plain("error", "bold red"), plain(error.what), soft_wrap=True)
            if error.why:
                err.print(plain(" why ", "bold"), plain(error.why), soft_wrap=True)
            if error.next:
                err.print(plain("next ", "bold"), plain(error.next), soft_wrap=True)
            raise typer.Exit(error.exit_code) from error

    return run


@app.command()
@advises
def train(run_file: RunFile) -> None:
    """Start both roles, watch them to the end, then evaluate. Goes on where an earlier start stopped."""
    plan = plan_run(load_run_config(run_file))
    for note in plan.notes:
        say(out, note)
    with Progress(out, plan) as progress:
        completed = Supervisor(run_file, plan, show=progress.show).run()
    if not completed:
        say(out, f"Stopped; nothing is lost. Go on with: paceline train {run_file}")
        raise typer.Exit(130)
    _evaluate(run_file)
    _print_evaluation(plan.config)


@app.command()
@advises
def produce(run_file: RunFile) -> None:
    """Run the producer alone, in the foreground."""
    _run_role("producer", run_file)


@app.command()
@advises
def consume(run_file: RunFile) -> None:
    """Run the consumer alone, in the foreground."""
    _run_role("consumer", run_file)


@app.command()
@advises
def status(run: Run) -> None:
    """Show what a run has done and what it is doing."""
    directory = _directory(run)
    store = open_run(directory)
    describe(out, take_snapshot(directory, store))
    store.close()


@app.command()
@advises
def evaluate(run: Run) -> None:
    """Measure acceptance length and speed-up of the newest checkpoint by lossless decoding."""
    run_file = _existing(run)
    if run.is_dir():
        run_file = run / "evaluated-run.yaml"
        store = open_run(run)
        run_file.write_text(recorded_config(store.facts().get("config", {}), run))
        store.close()
    _evaluate(run_file)
    _print_evaluation(load_run_config(run_file))


@app.command()
@advises
def fsck(
    run: Run,
    accept_pages: Annotated[
        bool, typer.Option(help="First take pages that another program wrote into the ledger as they are.")
    ] = False,
) -> None:
    """Check, independently of the code that wrote it, that a run has kept its promise. Changes nothing."""
    directory = _directory(run)
    if not (directory / "ledger.db").exists():
        open_run(directory)  # says what to do
    features = None if run.is_dir() else load_run_config(run).feature_folder
    if accept_pages:
        accept_pages_of(out, directory)
    raise typer.Exit(fsck_directory(out, directory, features))


@app.command()
@advises
def inspect(
    run: Run,
    step: Annotated[int | None, typer.Option(help="Which samples trained this step.")] = None,
    sample: Annotated[str | None, typer.Option(help="What became of this sample or prompt.")] = None,
) -> None:
    """Tell from the ledger alone what was trained, and what was set aside and why."""
    store = open_run(_directory(run))
    if step is not None:
        inspect_step(out, store, step)
    if sample is not None:
        inspect_sample(out, store, sample)
    if step is None and sample is None:
        inspect_all(out, store)
    store.close()


def _evaluate(run_file: Path) -> None:
    say(out, "measuring on held-out prompts, by lossless decoding ...")
    code = _role_process("evaluator", run_file, len(os.sched_getaffinity(0)))
    if code:
        raise typer.Exit(code)


def _run_role(role: str, run_file: Path) -> None:
    machine = load_run_config(run_file).machine
    threads = machine.producer_threads if role == "producer" else machine.consumer_threads
    environment = {**os.environ, **role_environment(threads)}
    # The role takes this process over, so that signals and the exit code are its own.
    command = [sys.executable, "-m", f"paceline.roles.{role}", str(run_file)]
    os.execve(sys.executable, command, environment)  # noqa: S606 (our own module, no shell)


def _role_process(role: str, run_file: Path, threads: int) -> int:
    command = [sys.executable, "-m", f"paceline.roles.{role}", str(run_file)]
    return subprocess.run(command, env={**os.environ, **role_environment(threads)}, check=False).returncode


def _print_evaluation(config: RunConfig) -> None:
    store = open_run(config.run.directory)
    snapshot = take_snapshot(config.run.directory, store)
    say(out, evaluation_lines(snapshot))
    say(out, final_line(snapshot))
    store.close()


def _directory(run: Path) -> Path:
    return run if _existing(run).is_dir() else load_run_config(run).run.directory


def _existing(run: Path) -> Path:
    if not run.exists():
        raise ConfigError(
            f"There is no {run}, neither a run's directory nor a run file.",
            why="A run is named by either; its directory exists from its first start on.",
            next="check the path, or paceline train RUN.yaml",
        )
    return run


if __name__ == "__main__":
    app()
