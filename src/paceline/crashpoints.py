"""The few places inside files and transactions where a test may stop the process: no call ends there.

Everywhere else a test puts its kill points around the calls of a part, from outside
(testing/kill_points.py). Next to no cost when no test watches.
"""

from __future__ import annotations

from collections.abc import Callable

Watch = Callable[[str], None]
_watch: Watch | None = None


def reach(name: str) -> None:
    """Tell the watching test that this process is at the place called `name`."""
    if _watch is not None:
        _watch(name)


def watch(seen: Watch | None) -> None:
    """Call `seen` with the name of every place this process reaches from now on; None: no test watches."""
    global _watch
    _watch = seen
