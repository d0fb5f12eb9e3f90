"""`paceline train --on` and `paceline stop --on`: a run on a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path

import typer

from paceline.cli.plain import out, say, stdout
from paceline.placement.driver import stop_on, train_on


def train_on_cluster(run_file: Path, address: str) -> None:
    """Raises typer.Exit with the exit code of the run's command, PacelineError."""
    with _without_rays_output():
        code = train_on(run_file, address, partial(say, out))
    if code:
        raise typer.Exit(code)


def stop_on_cluster(run_file: Path, address: str, *, at_once: bool) -> None:
    """Raises PacelineError."""
    with _without_rays_output():
        stop_on(run_file, address, partial(say, out), at_once=at_once)


@contextmanager
def _without_rays_output() -> Iterator[None]:
    """Where a node dies, Ray prints pages of its log; what it means for the run is told anyway."""
    stdout.replace()
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        yield
