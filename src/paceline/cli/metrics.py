"""`paceline metrics`: a run's metrics, once or for a scraper."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from paceline.cli.named_run import directory_if_any, directory_of
from paceline.cli.plain import out, say
from paceline.monitoring.endpoint import MetricsServer
from paceline.monitoring.looking import RunLooks
from paceline.monitoring.metrics import exposition
from paceline.monitoring.status import read_status
from paceline.roles.snapshot import making_sense


def print_metrics(run: Path) -> None:
    """Once. Raises ConfigError if there is no run, LedgerError."""
    directory = directory_of(run)
    with making_sense(directory):
        out.file.write(exposition(read_status(directory), str(run)))


def serve_metrics(run: Path, host: str, port: int) -> None:
    """Until Ctrl-C; the run may begin, end and begin again meanwhile. Raises ConfigError."""
    directory_if_any(run)  # a run file that is none is an error, and waiting would not mend it
    looks = RunLooks(partial(directory_if_any, run))

    def page() -> str:
        look = looks.look()
        return exposition(None if look.problem else look.status, run.name)

    with MetricsServer(host, port, page) as server:
        say(out, f"metrics of {run}: {server.url} (Ctrl-C ends this, not the run)")
        server.serve_forever()
