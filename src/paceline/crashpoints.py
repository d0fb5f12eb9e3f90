"""Named places where a test may kill the process; no cost when none is asked for."""

from __future__ import annotations

import os
import signal
from collections import Counter

_wanted = os.environ.get("PACELINE_CRASH_AT", "")
_reached: Counter[str] = Counter()


def reach(name: str) -> None:
    """Kill this process if PACELINE_CRASH_AT is `name` or `name:n` and this is the n-th time (from 1)."""
    if not _wanted:
        return
    wanted, _, turn = _wanted.partition(":")
    if name == wanted:
        _reached[name] += 1
        if _reached[name] == int(turn or 1):
            os.kill(os.getpid(), signal.SIGKILL)
