"""`paceline launch`: prints, writes or submits what starts a run on a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from paceline.cli.plain import err, out, say
from paceline.durable_files import replace_file
from paceline.launch import kubernetes, slurm
from paceline.launch.fleet import Fleet


def on_slurm(
    fleet: Fleet, *, time: str, setup: Path | None, options: Sequence[str], to: Path | None, submit: bool
) -> None:
    """Raises ConfigError, PacelineError."""
    text = slurm.script(fleet, time=time, setup=setup, options=options)
    _note(fleet)
    if to is not None:
        replace_file(to, text.encode())
    if submit:
        for number, what in zip(slurm.submit(fleet, text), ("trains", "captures"), strict=False):
            say(out, f"job {number} {what}; to end it: scancel {number}")
    elif to is None:
        out.file.write(text)
    else:
        say(out, f"Written: {to}; its first lines say how it is submitted")


def on_kubernetes(fleet: Fleet, *, image: str, volumes: Sequence[str], to: Path | None) -> None:
    """Raises ConfigError."""
    found = kubernetes.manifests(fleet, image=image, volumes=kubernetes.volumes_of(volumes))
    text = kubernetes.text_of(fleet, found)
    _note(fleet)
    if to is None:
        out.file.write(text)
    else:
        replace_file(to, text.encode())
        say(out, f"Written: {to}; its first lines say what to type")


def _note(fleet: Fleet) -> None:
    for note in fleet.notes():
        say(err, f"note: {note}")
