"""Kill points in the middle of file writes and transactions, where tests stop the process.

Tests put all other kill points around whole calls, from outside (testing/kill_points.py). Without a
watching test these cost almost nothing.
"""

from __future__ import annotations

from collections.abc import Callable

Watch = Callable[[str], None]
_watch: Watch | None = None


def reach(name: str) -> None:
    """Tell the watching test that this process has reached the kill point `name`."""
    if _watch is not None:
        _watch(name)


def watch(seen: Watch | None) -> None:
    """Call `seen` with the name of every kill point that this process reaches; None ends that."""
    global _watch
    _watch = seen
