"""The `paceline` command: its verbs with their options. This process loads no torch.

A verb imports what it does when it is called, so that `paceline --help` is there at once. Every error becomes
one readable message on stderr and an exit code. Only --debug shows a traceback.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from paceline import __version__
from paceline.cli.advice import INTERRUPTED, advises
from paceline.cli.before_a_run import BEFORE_A_RUN
from paceline.cli.options import COMPARE_OPTIONS, DATA_OPTIONS, HOST, Run, RunFile, takes
from paceline.errors import DEBUG_VARIABLE, ConfigError
from paceline.terminal import open_standard_streams

app = typer.Typer(
    invoke_without_command=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # half of the time of --help would be spent on importing what draws boxes
)
data_app = typer.Typer(help="Look at what a run would read.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app, name="data")
ledger_app = typer.Typer(help="Move a run's ledger.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(ledger_app, name="ledger")


def main() -> None:
    """The command's entry point."""
    open_standard_streams()
    code = 1
    try:
        code = app(standalone_mode=False) or 0
    except typer.Abort:
        code = INTERRUPTED
    except Exception as error:
        # The command was used wrongly. The class of typer's error is private; its message and code are not.
        if not hasattr(error, "format_message"):
            raise
        from paceline.cli.plain import say_error

        used_wrongly = ConfigError(error.format_message(), next="paceline --help")
        say_error(used_wrongly)
        code = used_wrongly.exit_code
    sys.exit(code)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"paceline {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[  # noqa: ARG001 (its callback shows it)
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Train draft models for speculative decoding, online: producers capture, consumers train."""
    if debug:
        os.environ[DEBUG_VARIABLE] = "1"
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
@advises
def demo(
    folder: Annotated[
        Path, typer.Argument(metavar="[DIR]", help="A folder of its own.", readable=False)
    ] = Path("paceline-demo"),
) -> None:
    """Show in a minute that a kill loses nothing, on a tiny target.

    It needs no network, no GPU and no file of yours. Two runs of the same prompts; in the second one the
    consumer is killed. Both end in the same weights, and the checker says that nothing was lost.
    """
    from paceline.cli.demo import demonstrate

    demonstrate(folder)


for verb in BEFORE_A_RUN:
    app.command()(verb)


@app.command()
@advises
def train(run_file: RunFile) -> None:
    """Start both roles, watch them to the end, then evaluate. Continues a run that was stopped."""
    from paceline.cli.train import train_run

    train_run(run_file)


@app.command()
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


@app.command()
@advises
def consume(run_file: RunFile) -> None:
    """Run the consumer alone, in the foreground."""
    from paceline.cli.foreground import become_consumer

    become_consumer(run_file)


@app.command()
@advises
def status(
    run: Run,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts; see docs/status.md.")] = False,
) -> None:
    """Show what a run has done and what it is doing."""
    from paceline.cli.status import show_status

    show_status(run, as_json=as_json)


@app.command()
@advises
def watch(
    run: Run,
    every: Annotated[
        float | None, typer.Option(help="Seconds between two looks; 1, or 15 if not at a terminal.", min=0.1)
    ] = None,
) -> None:
    """Show a run as it flows, from before its start to its end.

    Lines, if the output is no terminal. Ctrl-C ends the view, not the run.
    """
    from paceline.cli.watch import watch_run

    watch_run(run, every)


@app.command()
@advises
def stop(
    run: Run,
    now: Annotated[bool, typer.Option("--now", help="Without a safe point; what is durable stays.")] = False,
) -> None:
    """Stop a run in good order, and wait for it.

    Its processes on this host reach their next safe point and write a checkpoint.
    """
    from paceline.cli.stop import stop_run

    stop_run(run, at_once=now)


@app.command()
@advises
def runs(
    base: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where to look.", readable=False)] = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="For scripts; see docs/status.md.")] = False,
) -> None:
    """List the runs below a folder: state, progress, memory, disk."""
    from paceline.cli.runs import show_runs

    show_runs(base, as_json=as_json)


@app.command()
@advises
def metrics(
    run: Run,
    port: Annotated[
        int | None, typer.Option(help="Serve them on this port; 0: a free one.", min=0, max=65535)
    ] = None,
    host: Annotated[str, typer.Option(help="The address to serve them on.")] = HOST,
) -> None:
    """Print a run's metrics in the OpenMetrics format, or serve them.

    With --port at /metrics until Ctrl-C, on the loopback address unless --host says otherwise.
    """
    from paceline.cli import metrics as metering

    if port is None:
        metering.print_metrics(run)
    else:
        metering.serve_metrics(run, host, port)


@app.command()
@advises
def track(
    run: Run,
    to: Annotated[
        list[str] | None, typer.Option(help="tensorboard, wandb, mlflow or trackio; repeatable.")
    ] = None,
    project: Annotated[str | None, typer.Option(help="What the run is filed under.")] = None,
) -> None:
    """Send a run's curves to trackers, until the run ends.

    Without --to those of the run file (tracking: {to: [...]}), to which `train` sends them anyway. Started
    again, also after a crash, it continues the same run there; no step comes twice.
    """
    from paceline.cli.track import track_run

    track_run(run, to or [], project)


@app.command()
@advises
def engine(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The engine: vllm or sglang.")],
    run: Run,
) -> None:
    """Print the command that starts the engine's server for a run.

    The run file then has: engine: {name: NAME, url: ...}
    """
    from paceline.cli.foreground import print_engine_command

    print_engine_command(name, run)


@app.command()
@advises
def evaluate(
    run: Run,
    suite: Annotated[
        list[str] | None, typer.Option(help="heldout, humaneval or a file of prompts; repeatable.")
    ] = None,
    temperature: Annotated[list[str] | None, typer.Option(help="0 (the default), or 0,1.")] = None,
    max_prompts: Annotated[int | None, typer.Option(help="Of each suite.", min=1)] = None,
    step: Annotated[int | None, typer.Option(help="A kept checkpoint's step; the newest.", min=1)] = None,
    report: Annotated[
        Path | None, typer.Option("--json", help="The report; evaluation-suites.json of the run.")
    ] = None,
) -> None:
    """Measure a checkpoint by lossless decoding, beside prompt lookup.

    Acceptance length and speed-up, with intervals.

    Without options: the newest checkpoint on the run's held-out prompts, as at the end of training.
    """
    from paceline.cli.measure import measure_as_asked

    measure_as_asked(run, suite or [], temperature or [], max_prompts, step, report)


@app.command()
@advises
@takes(COMPARE_OPTIONS)
def compare(
    run_file: RunFile,
    variants: Annotated[
        list[Path] | None,
        typer.Argument(metavar="VARIANT.yaml", help="Overrides of method and training; or a run file."),
    ] = None,
    **given: Any,
) -> None:
    """Train several methods on the same features, and measure each.

    Or several settings. The target answers once, and its features are kept. The run file is
    the first variant, and gives target, data and evaluation to all.
    """
    from paceline.cli import compare as comparison

    comparison.compare(run_file, variants or [], **given)


@app.command()
@advises
@takes(COMPARE_OPTIONS)
def sweep(
    run_file: RunFile,
    settings: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE,...", help="A setting's values; repeatable.")
    ],
    metric: Annotated[str, typer.Option(help="What the table is sorted by.")] = "acceptance",
    **given: Any,
) -> None:
    """Compare every combination of some settings' values."""
    from paceline.cli import compare as comparison

    comparison.sweep(run_file, settings, metric, **given)


@app.command()
@advises
def export(
    run: Run,
    directory: Annotated[
        Path | None,
        typer.Argument(metavar="[DIR]", help="Where to; for several formats, a folder each.", readable=False),
    ] = None,
    to: Annotated[list[str] | None, typer.Option(help="vllm, sglang, speculators or hf; repeatable.")] = None,
    step: Annotated[int | None, typer.Option(help="A kept checkpoint's step; the best.", min=1)] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16 (the default) or fp32.")] = None,
    target_name: Annotated[str | None, typer.Option(help="The target's hub id or path for servers.")] = None,
) -> None:
    """Write a checkpoint's draft as folders for inference servers.

    Each is checked by the rules of its server.
    """
    from paceline.cli.export import export_as_asked

    export_as_asked(run, to or [], directory, step, dtype, target_name)


@app.command()
@advises
def serve(
    run: Run,
    server: Annotated[str | None, typer.Option(help="vllm or sglang; that of the newest export.")] = None,
    folder: Annotated[Path | None, typer.Option(help="An exported folder; the newest.")] = None,
    host: Annotated[str, typer.Option(help="The address that the server listens on.")] = HOST,
    start: Annotated[bool, typer.Option("--run", help="Run the command instead of printing it.")] = False,
) -> None:
    """Print the command that serves the target with its draft."""
    from paceline.cli.export import serve_run, serving_command
    from paceline.cli.named_run import directory_of
    from paceline.cli.plain import out

    serve_run(out, serving_command(directory_of(run), server, folder, host), run=start)


@app.command()
@advises
def fsck(run: Run) -> None:
    """Check that a run has kept its guarantee. Changes nothing.

    The checker shares no code with the trainer. Exit code 9: the promise is broken.
    """
    from paceline.cli.fsck import fsck_directory
    from paceline.cli.named_run import directory_of
    from paceline.cli.plain import out

    raise typer.Exit(fsck_directory(out, directory_of(run)))


@app.command()
@advises
def clean(
    base: Annotated[
        Path, typer.Argument(metavar="[DIR]", help="Where feature folders lie.", readable=False)
    ] = Path("/dev/shm"),  # noqa: S108 (the default of features.directory)
    yes: Annotated[bool, typer.Option("--yes", help="Free them; without it, only list them.")] = False,
) -> None:
    """List feature folders that no run needs, or free them."""
    from paceline.cli.clean import clean_folder
    from paceline.cli.plain import out

    clean_folder(out, base, free=yes)


@app.command()
@advises
def inspect(
    run: Run,
    step: Annotated[int | None, typer.Option(help="Show the samples of this step.")] = None,
    sample: Annotated[str | None, typer.Option(help="Show what became of this sample or prompt.")] = None,
) -> None:
    """Show what was trained, what failed or is quarantined, and why."""
    from paceline.cli.inspect_run import inspect_run

    inspect_run(run, step, sample)


@ledger_app.command("copy")
@advises
def copy_ledger(
    run: Run,
    to: Annotated[str, typer.Argument(metavar="TO", help="sqlite, or a server's address: redis://...")],
) -> None:
    """Copy a stopped run's ledger to another store, compare the copy, and make it the run's ledger."""
    from paceline.cli.ledger import copy_run_ledger
    from paceline.cli.named_run import directory_of
    from paceline.cli.plain import out

    copy_run_ledger(out, directory_of(run), to)


@data_app.command("check")
@advises
@takes(DATA_OPTIONS)
def check_data(
    path: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="A run file, or a file or folder of samples.", readable=False),
    ],
    measure: Annotated[bool, typer.Option("--measure", help="Load the target and time it.")] = False,
    **given: Any,
) -> None:
    """Show what a file is taken for, what in it cannot be used, and what the target sees of it.

    Of a run file, as that run would: with its sources, target, answers and limits.
    """
    from paceline.cli.data import check
    from paceline.cli.plain import out

    check(
        out, path, {name: value for name, value in given.items() if value not in (None, [])}, measure=measure
    )


@data_app.command("export")
@advises
def export_data(
    run: Run,
    to: Annotated[Path | None, typer.Option(help="The file; answers.jsonl in the run's directory.")] = None,
) -> None:
    """Write a run's kept answers as JSON lines that a run can read."""
    from paceline.cli.answers import export_answers

    export_answers(run, to)


if __name__ == "__main__":
    main()
