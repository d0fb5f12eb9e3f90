"""The verbs before a run: they write its file, and tell what it takes, how fast it is here and what lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from paceline.cli.advice import advises
from paceline.cli.options import INIT_OPTIONS, RunFile, takes


@advises
@takes(INIT_OPTIONS)
def init(
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The run file to write; run.yaml.", readable=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
    **given: Any,
) -> None:
    """Write a run file for your target and data; asks at a terminal.

    Without --heldout some prompts of the data are set aside to measure the draft on, in files of their own.
    """
    from paceline.cli.init import init as begin

    begin({**given, "output": output, "overwrite": overwrite})


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
    as_json: Annotated[
        bool, typer.Option("--json", help="As JSON; docs/first-hour.md has the fields.")
    ] = False,
) -> None:
    """Show what a run will take, and what does not fit. Starts nothing.

    Devices, memory, disk and hours. The target's configuration and tokenizer are enough; no weights are read
    or fetched.
    """
    from paceline.cli import plan as planning

    planning.plan(run_file, gpu, target_config, as_json=as_json)


@advises
def bench(
    run_file: RunFile,
    seconds: Annotated[
        float, typer.Option(help="For capture, store and training together.", min=1.0, max=3600.0)
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


@advises
def doctor(
    run_file: Annotated[
        Path | None, typer.Argument(metavar="[RUN.yaml]", help="A run to look at, too.", readable=False)
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Load the target, and prove its captured states.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="As JSON; docs/first-hour.md has the fields.")
    ] = False,
) -> None:
    """Look whether this machine, and a run, have what they need.

    Python, torch, GPUs, ledger, memory, disk, ports or the engine's server; each finding with its mend.
    """
    from paceline.cli.doctor import examine_and_tell

    examine_and_tell(run_file, probe=probe, as_json=as_json)


BEFORE_A_RUN = (init, plan, bench, doctor)
