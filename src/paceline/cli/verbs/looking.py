"""Looks at runs, and measures their drafts. None of them changes a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paceline.cli.options import HOST, Run
from paceline.cli.verbs.verb import advises, group

verbs = group()


@verbs.command()
@advises
def status(
    run: Run,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts; see docs/status.md.")] = False,
) -> None:
    """Show what a run has done and what it is doing."""
    from paceline.cli.status import show_status

    show_status(run, as_json=as_json)


@verbs.command()
@advises
def watch(
    run: Run,
    every: Annotated[
        float | None,
        typer.Option(help="Seconds between two looks (default: 1 at a terminal, else 15).", min=0.1),
    ] = None,
) -> None:
    """Show a run as it flows, from before its start to its end.

    It prints lines if the output is no terminal. Ctrl-C ends the view, not the run.
    """
    from paceline.cli.watch import watch_run

    watch_run(run, every)


@verbs.command()
@advises
def dashboard(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN|DIR", help="A run, as elsewhere, or a folder of runs.", readable=False),
    ],
    port: Annotated[
        int, typer.Option(help="The port to serve it on; 0: a free one.", min=0, max=65535)
    ] = 8000,
    host: Annotated[
        str, typer.Option(help="The address to serve it on; one that other machines reach needs a token.")
    ] = HOST,
    token_file: Annotated[
        Path | None,
        typer.Option(
            help="A file with the token that browsers must give (default: PACELINE_DASHBOARD_TOKEN).",
            readable=False,
        ),
    ] = None,
) -> None:
    """Show runs in a browser: flow, curves, timeline, lineage.

    It needs paceline[dashboard]. Ctrl-C ends the view, not the runs.
    """
    from paceline.cli.dashboard import serve_dashboard

    serve_dashboard(run, host, port, token_file)


@verbs.command()
@advises
def report(
    run: Run,
    to: Annotated[
        Path | None,
        typer.Option(help="The file to write (default: report.html in the run's directory).", readable=False),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report for scripts instead; see docs/status.md.")
    ] = False,
) -> None:
    """Write a run as one HTML file.

    It shows the settings, curves, acceptance with intervals, the guarantee's check, lineage, some held-out
    answers and cost.
    """
    from paceline.cli.report import write_report

    write_report(run, to, as_json=as_json)


@verbs.command()
@advises
def runs(
    base: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where to look.", readable=False)] = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="For scripts; see docs/status.md.")] = False,
) -> None:
    """List the runs below a folder: state, progress, memory, disk."""
    from paceline.cli.runs import show_runs

    show_runs(base, as_json=as_json)


@verbs.command()
@advises
def inspect(
    run: Run,
    step: Annotated[int | None, typer.Option(help="Show the samples of this step.")] = None,
    sample: Annotated[str | None, typer.Option(help="Show what became of this sample or prompt.")] = None,
) -> None:
    """Show what was trained, what failed or is quarantined, and why."""
    from paceline.cli.inspect_run import inspect_run

    inspect_run(run, step, sample)


@verbs.command()
@advises
def fsck(run: Run) -> None:
    """Check that a run has kept its guarantee. Changes nothing.

    The checker shares no code with the trainer. Exit code 9: the promise is broken.
    """
    from paceline.cli.fsck import fsck_directory
    from paceline.cli.named_run import directory_of, features_of
    from paceline.cli.plain import out

    raise typer.Exit(fsck_directory(out, directory_of(run), features_of(run)))


@verbs.command()
@advises
def evaluate(
    run: Run,
    suite: Annotated[
        list[str] | None, typer.Option(help="heldout, humaneval or a file of prompts; repeatable.")
    ] = None,
    temperature: Annotated[list[str] | None, typer.Option(help="0 (the default), or 0,1.")] = None,
    max_prompts: Annotated[
        int | None, typer.Option(help="Measure at most N prompts of each suite.", min=1)
    ] = None,
    step: Annotated[
        int | None, typer.Option(help="The step of a kept checkpoint (default: the newest).", min=1)
    ] = None,
    sample: Annotated[
        list[str] | None,
        typer.Option(help="A training sample: mark the tokens that the draft guesses; repeatable."),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option("--json", help="The report to write (default: evaluation-suites.json of the run)."),
    ] = None,
) -> None:
    """Measure a draft by lossless decoding, beside prompt lookup.

    It prints acceptance length and speed-up, with intervals.

    Without options: the newest checkpoint on the run's held-out prompts, as at the end of training.
    """
    from paceline.cli.measure import mark_as_asked, measure_as_asked

    if sample:
        mark_as_asked(run, sample, step, (suite, temperature, max_prompts, report))
        return
    measure_as_asked(run, suite or [], temperature or [], max_prompts, step, report)


@verbs.command()
@advises
def metrics(
    run: Run,
    port: Annotated[
        int | None, typer.Option(help="Serve them on this port; 0: a free one.", min=0, max=65535)
    ] = None,
    host: Annotated[str, typer.Option(help="The address to serve them on.")] = HOST,
) -> None:
    """Print a run's metrics in the OpenMetrics format, or serve them.

    With --port it serves them at /metrics until Ctrl-C, on the loopback address unless --host says otherwise.
    """
    from paceline.cli import metrics as metering

    if port is None:
        metering.print_metrics(run)
    else:
        metering.serve_metrics(run, host, port)


@verbs.command()
@advises
def track(
    run: Run,
    to: Annotated[
        list[str] | None, typer.Option(help="tensorboard, wandb, mlflow or trackio; repeatable.")
    ] = None,
    project: Annotated[
        str | None, typer.Option(help="The tracker's project to which the run belongs.")
    ] = None,
) -> None:
    """Send a run's curves to trackers, until the run ends.

    Without --to it sends them to the trackers of the run file (tracking: {to: [...]}), as `train` does
    anyway. Started again, also after a crash, it continues the same run there; no step comes twice.
    """
    from paceline.cli.track import track_run

    track_run(run, to or [], project)
