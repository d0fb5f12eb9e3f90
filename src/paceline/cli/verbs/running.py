"""A run: train, its roles alone, its end, and several runs on the same features."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from paceline.cli.options import COMPARE_OPTIONS, Run, RunFile, takes
from paceline.cli.verbs.verb import advises, group

verbs = group()
On = Annotated[
    str | None,
    typer.Option(
        "--on",
        metavar="ADDRESS",
        help="A Ray cluster, whose nodes the run is placed on: ray://HOST:10001, HOST:6379, auto, or local.",
    ),
]


@verbs.command()
@advises
def train(run_file: RunFile, on: On = None) -> None:
    """Start both roles, watch them to the end, then evaluate. Continues a run that was stopped."""
    if on is not None:
        from paceline.cli.train_on import train_on_cluster

        train_on_cluster(run_file, on)
        return
    from paceline.cli.train import train_run

    train_run(run_file)


@verbs.command()
@advises
def produce(
    run: Run,
    join: Annotated[
        bool, typer.Option("--join", help="Add a producer to a run that is going on; it may end at any time.")
    ] = False,
) -> None:
    """Run a producer alone, in the foreground."""
    from paceline.cli.foreground import become_producer

    become_producer(run, joins=join)


@verbs.command()
@advises
def consume(run_file: RunFile) -> None:
    """Run the consumer alone, in the foreground."""
    from paceline.cli.foreground import become_consumer

    become_consumer(run_file)


@verbs.command()
@advises
def stop(
    run: Run,
    now: Annotated[
        bool, typer.Option("--now", help="End the processes at once; what is durable stays.")
    ] = False,
    on: On = None,
) -> None:
    """Stop a run in good order, and wait for it.

    Its processes on this host, or in the Ray cluster, reach their next safe point and write a checkpoint.
    """
    if on is not None:
        from paceline.cli.train_on import stop_on_cluster

        stop_on_cluster(run, on, at_once=now)
        return
    from paceline.cli.stop import stop_run

    stop_run(run, at_once=now)


@verbs.command()
@advises
def engine(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The engine: vllm or sglang.")],
    run: Run,
) -> None:
    """Print the command that starts the engine's server for a run.

    The run file names that server: engine: {name: NAME, url: ...}
    """
    from paceline.cli.foreground import print_engine_command

    print_engine_command(name, run)


@verbs.command()
@advises
@takes(COMPARE_OPTIONS)
def compare(
    run_file: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="A run file to train; or a run's directory to show.", readable=False
        ),
    ],
    variants: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="VARIANT",
            help="A run file, or overrides of method and training; or another run's directory.",
            readable=False,
        ),
    ] = None,
    **given: Any,
) -> None:
    """Train methods on the same features, or show runs side by side.

    Given a run file, it trains and measures several methods or settings. The target answers once, and its
    features are kept. The run file is the first variant, and gives all of them target, data and evaluation.

    Given runs' directories, finished or live, it shows the settings that differ, curves, acceptance with
    intervals, and cost.
    """
    from paceline.cli import compare as comparison

    comparison.compare(run_file, variants or [], **given)


@verbs.command()
@advises
@takes(COMPARE_OPTIONS)
def sweep(
    run_file: RunFile,
    settings: Annotated[
        list[str],
        typer.Option("--set", metavar="KEY=VALUE,...", help="A setting and the values to try; repeatable."),
    ],
    metric: Annotated[str, typer.Option(help="The measure that the table is sorted by.")] = "acceptance",
    **given: Any,
) -> None:
    """Compare every combination of some settings' values."""
    from paceline.cli import compare as comparison

    comparison.sweep(run_file, settings, metric, **given)
