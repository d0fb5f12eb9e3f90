"""`paceline watch`: a run as it flows. Ctrl-C ends the view; the run does not notice."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

from rich.console import Console, RenderableType
from rich.live import Live

from paceline.cli.named_run import directory_if_any
from paceline.cli.plain import out, plain, say, stdout
from paceline.cli.screen import is_live, line, screen
from paceline.monitoring.looking import Look, RunLooks

LIVE_EVERY_S, LINES_EVERY_S, LOOK_EVERY_S = 1.0, 15.0, 2.0
HINT = "Ctrl-C ends this view; the run goes on."


def watch_run(run: Path, every: float | None) -> None:
    """`every`: seconds between two looks. Raises ConfigError for a run file that is none."""
    directory_if_any(run)  # a run file that is none is an error, and waiting would not mend it
    looks = RunLooks(partial(directory_if_any, run))
    if is_live(out):
        _watch_live(out, looks, every or LIVE_EVERY_S)
    else:
        _watch_lines(out, looks, every or LINES_EVERY_S)


def _watch_live(console: Console, looks: RunLooks, every: float) -> None:
    try:
        with Live(console=console, auto_refresh=False) as live:
            while not (look := looks.look()).is_over:
                live.update(_shown(console, look, HINT), refresh=True)
                time.sleep(every)
            live.update(_shown(console, look), refresh=True)
    except KeyboardInterrupt:
        say(console, "The run was not touched.")
    else:
        _say_end(console, look)


def _shown(console: Console, look: Look, hint: str = "") -> RenderableType:
    if look.status is None:
        return plain(f"{look.problem} ... {hint}")
    age = f" (the figures above are {time.time() - look.status.time:.0f} s old)" if look.problem else ""
    return screen(console, look.status, look.problem + age, hint)


def _watch_lines(console: Console, looks: RunLooks, every: float) -> None:
    told, due = "", 0.0
    while True:
        look = looks.look()
        if look.problem and look.problem != told:
            say(console, look.problem)
        told, now = look.problem, time.monotonic()
        if look.status is not None and not look.problem and (now >= due or look.is_over):
            say(console, f"{look.status.state} | {line(look.status)}")
            due = now + every
        if look.is_over or stdout.lost is not None:
            break
        time.sleep(min(every, LOOK_EVERY_S))
    _say_end(console, look)


def _say_end(console: Console, look: Look) -> None:
    status = look.status
    if status is None:
        return
    if status.state == "complete":
        say(console, f"The run is complete: paceline export {status.directory} --to vllm DIR")
        return
    say(
        console, f"{status.error or 'The run does not go on at present'}. Go on with: paceline train RUN.yaml"
    )
