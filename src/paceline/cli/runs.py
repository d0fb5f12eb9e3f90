"""`paceline runs`: what lies in a folder, what is alive, and what it takes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import msgspec
from rich.console import Console
from rich.text import Text

from paceline.cli.plain import BARE, out, plain, say, table
from paceline.cli.screen import STATE_STYLES, amount, part_of
from paceline.monitoring.runs import FoundRun, find_runs


def show_runs(base: Path, *, as_json: bool) -> None:
    """Raises ConfigError if the folder cannot be listed."""
    found = list(find_runs(base))
    if as_json:
        out.file.write(json.dumps(msgspec.to_builtins(found, str_keys=True), indent=1) + "\n")
    elif found:
        _show(out, base, found)
    else:
        say(out, f"{base} holds no run. One begins with: paceline train RUN.yaml")


def _show(console: Console, base: Path, found: list[FoundRun]) -> None:
    sizes = ("memory", "disk")
    shown = table("run", "state", "step", "acceptance", *sizes, "in", right=sizes, **BARE)
    for one in found:
        shown.add_row(*_row(base, one))
    console.print(shown)
    for one in found:
        if one.problem:
            say(console, f"{one.directory}: {one.problem}")
    memory, disk = (sum(getattr(one, name) for one in found) for name in ("memory_bytes", "disk_bytes"))
    live = sum(one.status is not None and one.status.state == "live" for one in found)
    count = f"{len(found)} run{'s' * (len(found) != 1)}"
    say(console, f"{count}, {live} live; {amount(memory)} of memory, {amount(disk)} of disk")


def _row(base: Path, one: FoundRun) -> list[Text]:
    where = os.path.relpath(one.directory, base)
    takes = [plain(amount(size)) for size in (one.memory_bytes, one.disk_bytes)]
    if (s := one.status) is None:
        return [plain("?"), plain("unreadable", "red"), Text(), Text(), *takes, plain(where)]
    best = s.evaluation.best
    length = "" if best is None else f"{best.acceptance_length:.2f}"
    state, step = plain(s.state, STATE_STYLES[s.state]), part_of(s.step.number, s.step.planned)
    return [plain(s.run), state, plain(step), plain(length), *takes, plain(where)]
