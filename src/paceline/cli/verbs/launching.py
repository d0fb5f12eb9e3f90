"""A run on a cluster: a batch script for Slurm, manifests for Kubernetes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from paceline.cli.options import LAUNCH_OPTIONS, RunFile, takes
from paceline.cli.verbs.verb import advises, group

verbs = group()
launch = group("Write what starts a run on a cluster.")
verbs.add_typer(launch, name="launch")


@launch.command("slurm")
@advises
@takes(LAUNCH_OPTIONS)
def launch_slurm(
    run_file: RunFile,
    time: Annotated[
        str, typer.Option(help="Each job's time limit; shortly before it, the job is queued again.")
    ] = "24:00:00",
    setup: Annotated[
        Path | None,
        typer.Option(help="A shell file that each job reads: modules, secrets.", readable=False),
    ] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(help="A further option of sbatch, as --sbatch=--partition=gpu; repeatable."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the script there.", readable=False)
    ] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Queue the jobs, too.")] = False,
    **given: Any,
) -> None:
    """Print a batch script that trains a run; an array of jobs adds producers to it.

    docs/clusters.md has the rest.
    """
    from paceline.cli.launch import on_slurm
    from paceline.launch.fleet import Fleet

    on_slurm(
        Fleet.of(run_file, **given), time=time, setup=setup, options=sbatch or [], to=output, submit=submit
    )


@launch.command("kubernetes")
@advises
@takes(LAUNCH_OPTIONS)
def launch_kubernetes(
    run_file: RunFile,
    image: Annotated[str, typer.Option(help="The container image that has Paceline.")],
    volume: Annotated[
        list[str] | None, typer.Option(help="CLAIM=/PATH, mounted in every pod; repeatable.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the manifests there.", readable=False)
    ] = None,
    **given: Any,
) -> None:
    """Print manifests of a run: jobs that train and capture, and the ledger's server.

    docs/clusters.md has the rest.
    """
    from paceline.cli.launch import on_kubernetes
    from paceline.launch.fleet import Fleet

    on_kubernetes(Fleet.of(run_file, **given), image=image, volumes=volume or [], to=output)
