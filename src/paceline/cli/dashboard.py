"""`paceline dashboard`: runs in a browser. Ctrl-C ends the view; the runs do not notice."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from paceline.cli.named_run import directory_of
from paceline.cli.plain import out, say
from paceline.errors import ConfigError
from paceline.monitoring.runs import run_folders
from paceline.regular_files import kind_of, read_regular

TOKEN_VARIABLE = "PACELINE_DASHBOARD_TOKEN"  # noqa: S105 (the name of a variable)
TOKEN_BYTES_MAX = 4096


def serve_dashboard(run: Path, host: str, port: int, token_file: Path | None) -> None:
    """Until Ctrl-C. `run`: a run file, a run's directory, or a directory of runs. Raises ConfigError."""
    token = _token(token_file)
    try:
        from paceline.dashboard.runs import Runs
        from paceline.dashboard.server import dashboard, listen, serve
    except ImportError as error:
        raise ConfigError(
            f"The dashboard needs packages that cannot be imported ({error}).",
            why="A plain installation of Paceline leaves its web server out.",
            next="pip install 'paceline[dashboard]'; or paceline watch RUN, in the terminal",
        ) from error
    base, find = _shown(run)
    with listen(host, port, token) as listening:
        at, number = listening.getsockname()[:2]
        say(out, f"dashboard of {run}: http://{f'[{at}]' if ':' in at else at}:{number}/")
        say(out, f"{'It asks for the token. ' if token else ''}Ctrl-C ends this, not the runs.")
        serve(dashboard(Runs(base, find), host, token), listening)


def _shown(run: Path) -> tuple[Path, Callable[[], Iterable[Path]]]:
    """What the runs are named in relation to, and how they are found."""
    directory = directory_of(run).absolute()
    if kind_of(run) == "folder":
        return directory, lambda: run_folders(directory)
    return directory.parent, lambda: [directory]


def _token(file: Path | None) -> str | None:
    if file is None:
        return os.environ.get(TOKEN_VARIABLE) or None
    try:
        return read_regular(file, TOKEN_BYTES_MAX).decode().strip()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The token cannot be read from {file} ({type(error).__name__}).",
            next="openssl rand -hex 32 > FILE makes one",
        ) from error
