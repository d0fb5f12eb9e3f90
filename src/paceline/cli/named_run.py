"""A run as a command line names it: by its run file, or by its directory."""

from __future__ import annotations

import os
from pathlib import Path

import yaml

from paceline.config.load import load_run_config, parse_run_config, recorded_config
from paceline.errors import ConfigError
from paceline.ledger.place import known
from paceline.regular_files import kind_of
from paceline.roles.snapshot import making_sense, open_run


def run_file_of(run: Path) -> Path:
    """The run file. Of a run's directory: a file in memory with the recorded settings, for this process and
    its children, until this process ends. Nothing is written into the directory.
    """
    if not _is_directory(run):
        return run
    with making_sense(run):
        recorded = dict(open_run(run).facts().get("config", {}))
        if recorded and (place := known(run)) is not None:  # the ledger may have moved since the first start
            recorded = {key: value for key, value in recorded.items() if not key.startswith("ledger.")}
            recorded |= {f"ledger.{key}": value for key, value in place.section.items()}
        text = recorded_config(recorded, run)
    _refuse_unreadable(text, run)
    return file_in_memory("the run's recorded settings", text.encode())


def file_in_memory(name: str, data: bytes) -> Path:
    """A file for this process and its children, until this process ends."""
    fd = os.memfd_create(name)
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(data)
    os.set_inheritable(fd, True)  # this process may become a role
    return Path(f"/proc/{os.getpid()}/fd/{fd}")


def _refuse_unreadable(text: str, run: Path) -> None:
    try:
        parse_run_config(yaml.safe_load(text), source=f"the run in {run}")
    except ConfigError as error:
        raise ConfigError(
            f"The settings that {run} has recorded are not those of this version: {error.what}",
            why="Another version of Paceline started the run. Nothing was changed.",
            next="name its run file instead, or use the version that started it.",
        ) from error


def directory_of(run: Path) -> Path:
    """The run's directory, read from the run file if `run` is one. Raises ConfigError."""
    return run if _is_directory(run) else load_run_config(run).run.directory


def features_of(run: Path) -> Path | None:
    """Where this host has the features, if `run` is a run file; None for a directory. Raises ConfigError."""
    return None if _is_directory(run) else load_run_config(run).features.directory


def directory_if_any(run: Path) -> Path | None:
    """The same; None if nothing is there yet. Raises ConfigError for a run file that is none, OSError."""
    return directory_of(run) if os.path.lexists(run) else None


def _is_directory(run: Path) -> bool:
    """Whether `run` is a directory. Raises ConfigError if nothing is there, OSError if that is unknown."""
    if not os.path.lexists(run):
        raise ConfigError(
            f"There is no {run}, neither a run's directory nor a run file.",
            why="A run is named by its run file, or by its directory, which exists from its first start on.",
            next="check the path, or paceline train RUN.yaml",
        )
    return kind_of(run) == "folder"
