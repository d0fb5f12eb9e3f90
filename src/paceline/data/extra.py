"""The libraries of the optional extra `data`, which read compressed files and tables."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from paceline.errors import ConfigError


@contextmanager
def needs_extra(library: str, source: Path | str) -> Iterator[None]:
    """Turn a failed import into a ConfigError that says how to install the library."""
    try:
        yield
    except ImportError as error:
        raise ConfigError(
            f"{source} is read with the library {library}, which cannot be imported ({error}).",
            why="Compressed files and tables need libraries that a plain installation leaves out.",
            next="pip install 'paceline[data]'",
        ) from error
