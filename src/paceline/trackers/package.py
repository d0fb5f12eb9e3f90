"""Importing a tracker's package, and turning its errors into ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from paceline.errors import ConfigError, PacelineError


def imported(package: str, tracker: str) -> Any:
    """The package. Raises ConfigError if it is not installed."""
    try:
        return import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"The tracker {tracker} needs the package {package} ({error}).",
            why="Only TensorBoard's files are written without one.",
            next=f"pip install 'paceline[{tracker}]', or: paceline track RUN --to tensorboard",
        ) from error


@contextmanager
def reaching(tracker: str, what: str) -> Iterator[None]:
    """Turn any error of a package into a PacelineError: it may raise what it likes."""
    try:
        yield
    except Exception as error:
        raise PacelineError(
            f"{tracker} could not {what} ({type(error).__name__}: {error}).",
            why="The run is not touched, and its points stay in its events.",
            next=f"check {tracker}'s settings and connection, then run the same command again: it goes on "
            "after the last point.",
        ) from error
