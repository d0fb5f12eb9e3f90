"""What a person does before a run: see what is promised, write a run file, look at machine and data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from paceline.cli.options import DATA_OPTIONS, INIT_OPTIONS, Run, RunFile, takes
from paceline.cli.verbs.verb import advises, group

verbs = group()
data = group("Look at what a run would read.")
verbs.add_typer(data, name="data")


@verbs.command()
@advises
def demo(
    folder: Annotated[
        Path, typer.Argument(metavar="[DIR]", help="A folder for the demo alone.", readable=False)
    ] = Path("paceline-demo"),
) -> None:
    """Show in a minute that a kill loses nothing, on a tiny target.

    It needs no network, no GPU and no file of yours. It trains two runs of the same prompts, and kills the
    consumer of the second one. Both end in the same weights, and the checker says that nothing was lost.
    """
    from paceline.cli.demo import demonstrate

    demonstrate(folder)


@verbs.command()
@advises
@takes(INIT_OPTIONS)
def init(
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The run file to write (default: run.yaml).", readable=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
    **given: Any,
) -> None:
    """Write a run file for your target and data.

    At a terminal it asks for what is not given. Without --heldout it sets some prompts of the data aside, to
    measure the draft on, and writes both parts into files of their own.
    """
    from paceline.cli.init import init as begin

    begin({**given, "output": output, "overwrite": overwrite})


@verbs.command()
@advises
def plan(
    run_file: RunFile,
    gpu: Annotated[
        str | None, typer.Option(help="Plan for a machine with such GPUs, e.g. H200, not for this one.")
    ] = None,
    target_config: Annotated[
        Path | None,
        typer.Option(help="A folder with the target's config.json and tokenizer.", readable=False),
    ] = None,
    hosts: Annotated[
        Path | None, typer.Option(help="Plan for the hosts of this file (docs/at-scale.md).", readable=False)
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="As JSON; docs/first-hour.md has the fields.")
    ] = False,
) -> None:
    """Show what a run will take, and what does not fit. Starts nothing.

    Devices, memory, disk and hours. The target's configuration and tokenizer are enough; no weights are read
    or fetched.
    """
    if hosts is not None:
        from paceline.cli.hosts_plan import plan_hosts

        plan_hosts(run_file, hosts, target_config, as_json=as_json)
        return
    from paceline.cli import plan as planning

    planning.plan(run_file, gpu, target_config, as_json=as_json)


@verbs.command()
@advises
def bench(
    run_file: RunFile,
    seconds: Annotated[
        float,
        typer.Option(
            help="How many seconds capture, store and training may take together.", min=1.0, max=3600.0
        ),
    ] = 120.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="As JSON; docs/first-hour.md has the fields.")
    ] = False,
) -> None:
    """Time a run's engine, store and training step here.

    The figures lie in the run's directory, and `paceline plan` reads them. The run itself is not touched.
    """
    from paceline.cli.bench import bench as measure

    measure(run_file, seconds, as_json=as_json)


@verbs.command()
@advises
def doctor(
    run: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RUN]", help="Check this run, too: its run file, or its directory.", readable=False
        ),
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Load the target, and prove its captured states.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="As JSON; docs/first-hour.md has the fields.")
    ] = False,
) -> None:
    """Check whether this machine, and a run, have what they need.

    It checks Python, torch, GPUs, ledger, memory, disk, ports and the engine's server, and prints each
    finding with its mend.
    """
    from paceline.cli.doctor import examine_and_tell

    examine_and_tell(run, probe=probe, as_json=as_json)


@data.command("check")
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
    """Show how a file of samples is read: its format, what cannot be used, what the target sees.

    Given a run file, it shows what that run would read, with its sources, target, answers and limits.
    """
    from paceline.cli.data import check
    from paceline.cli.plain import out

    check(
        out, path, {name: value for name, value in given.items() if value not in (None, [])}, measure=measure
    )


@data.command("export")
@advises
def export_data(
    run: Run,
    to: Annotated[
        Path | None, typer.Option(help="The file to write (default: answers.jsonl in the run's directory).")
    ] = None,
) -> None:
    """Write a run's kept answers as JSON lines that a run can read."""
    from paceline.cli.answers import export_answers

    export_answers(run, to)
