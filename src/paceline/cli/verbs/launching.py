"""A run on a cluster: a batch script for Slurm, manifests for Kubernetes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paceline.cli.options import RunFile
from paceline.cli.verbs.verb import advises, group

verbs = group()
launch = group("Write what starts a run on a cluster.")
verbs.add_typer(launch, name="launch")

Hosts = Annotated[int, typer.Option(help="Hosts that train, each machine.trainers ranks.", min=1, max=4096)]
Producers = Annotated[
    int, typer.Option(help="Producers that join, each on its own, besides the first host's.", min=0, max=4096)
]
Gpus = Annotated[
    int | None, typer.Option(help="GPUs of each host that trains; as the run file names.", min=0, max=64)
]
Memory = Annotated[int, typer.Option(help="Of each host, besides /dev/shm.", min=1, max=65536)]


@launch.command("slurm")
@advises
def launch_slurm(
    run_file: RunFile,
    hosts: Hosts = 1,
    producers: Producers = 0,
    gpus: Gpus = None,
    memory_gib: Memory = 16,
    time: Annotated[str, typer.Option(help="Each job's limit; it is queued again before.")] = "24:00:00",
    setup: Annotated[
        Path | None,
        typer.Option(help="A shell file that each job reads: modules, secrets.", readable=False),
    ] = None,
    sbatch: Annotated[
        list[str] | None, typer.Option(help="A further option, as --sbatch=--partition=gpu; repeatable.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the script there.", readable=False)
    ] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Queue the jobs, too.")] = False,
) -> None:
    """Print a batch script that trains a run, and that further producers join as an array of jobs.

    docs/clusters.md has the rest.
    """
    from paceline.cli.launch import on_slurm
    from paceline.launch.fleet import Fleet

    fleet = Fleet.of(run_file, hosts=hosts, producers=producers, gpus=gpus, memory_gib=memory_gib)
    on_slurm(fleet, time=time, setup=setup, options=sbatch or [], to=output, submit=submit)


@launch.command("kubernetes")
@advises
def launch_kubernetes(
    run_file: RunFile,
    image: Annotated[str, typer.Option(help="The container image that has Paceline.")],
    volume: Annotated[
        list[str] | None, typer.Option(help="CLAIM=/PATH, mounted in every pod; repeatable.")
    ] = None,
    hosts: Hosts = 1,
    producers: Producers = 0,
    gpus: Gpus = None,
    memory_gib: Memory = 16,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the manifests there.", readable=False)
    ] = None,
) -> None:
    """Print manifests of a run: jobs that train and capture, and the ledger's server.

    docs/clusters.md has the rest.
    """
    from paceline.cli.launch import on_kubernetes
    from paceline.launch.fleet import Fleet

    fleet = Fleet.of(run_file, hosts=hosts, producers=producers, gpus=gpus, memory_gib=memory_gib)
    on_kubernetes(fleet, image=image, volumes=volume or [], to=output)
