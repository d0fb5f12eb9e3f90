"""Named places where a test may kill or stop the process; next to no cost when nobody watches."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable

Watch = Callable[[str], None]
_watch: Watch | None = None


def reach(name: str) -> None:
    """Tell whoever watches that this process is at the place called `name`."""
    if _watch is not None:
        _watch(name)


def watch(seen: Watch | None) -> None:
    """Call `seen` with the name at every place this process reaches from now on; None: nobody watches."""
    global _watch
    _watch = seen


class Armed:
    """A watcher that sends this process `number` when it reaches `name` for the `turn`-th time (from 1).

    SIGKILL ends it there; SIGSTOP holds it there until somebody sends SIGCONT.
    """

    def __init__(self, name: str, turn: int = 1, number: signal.Signals = signal.SIGKILL) -> None:
        self._name, self._turn, self._number = name, turn, number
        self._reached: Counter[str] = Counter()

    def __call__(self, name: str) -> None:
        if name == self._name:
            self._reached[name] += 1
            if self._reached[name] == self._turn:
                os.kill(os.getpid(), self._number)


def _arm_from_environment() -> None:
    """PACELINE_CRASH_AT is `name` or `name:n`: be killed there, the n-th time."""
    wanted = os.environ.get("PACELINE_CRASH_AT", "")
    if wanted:
        name, _, turn = wanted.partition(":")
        watch(Armed(name, int(turn or 1)))


_arm_from_environment()
