"""How long a person waits for a command that only tells something, in processor seconds.

On an idle machine they are the seconds that pass; on a busy one those would tell of its other work.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from benchmarks.rows import Row, row

GOAL_S = 0.3
STARTS = {
    "import paceline": ["-c", "import paceline"],
    "paceline --version": ["-m", "paceline", "--version"],
    "paceline --help": ["-m", "paceline", "--help"],
}


def seconds(arguments: Sequence[str], times: int) -> float:
    """The least of several starts."""
    found = []
    for _ in range(times):
        started = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(started.pid, 0)
        started.returncode = os.waitstatus_to_exitcode(status)
        assert started.returncode == 0, arguments
        found.append(used.ru_utime + used.ru_stime)
    return min(found)


def run(quick: bool) -> list[Row]:
    times = 5 if quick else 20
    bare = seconds(["-c", "pass"], times)
    rows = []
    for name, arguments in STARTS.items():
        found = seconds(arguments, times)
        note = f"a bare start of Python: {bare:.3f} s"
        rows.append(
            row(
                f"start of `{name}`",
                found,
                "processor s",
                limit=GOAL_S,
                limit_name="goal",
                ratio=GOAL_S / found,
                goal=1.0,
                note=note,
            )
        )
    return rows
