"""When a command that Ray placed is started again, and when its end is the end. It imports no Ray.

`paceline train` watches its own roles, so whatever it says at its end is final; only its death is not.
A producer that joined may be taken for dead, and joins again.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from enum import Enum

from paceline.errors import FencedError, PacelineError, RanksError, RunBusyError

INTERRUPTED = 130  # of `paceline train`: it was asked to stop
OWN_ERRORS = range(2, 11)
BUSY_MAX = 60  # a command that died a moment ago may still hold the run
WITHOUT_PROGRESS_MAX = 3  # the same error in a row


class Verdict(Enum):
    DONE = "done"  # it has done all its work
    STOPPED = "stopped"  # in good order, because it was asked to
    FAILED = "failed"  # starting it again would not help
    AGAIN = "again"


@dataclass
class Ends:
    """How a command has ended so far, without progress of the run between."""

    most: int
    progress: object = None
    count: int = 0
    busy: int = 0
    causes: list[str] = field(default_factory=list)

    def judge(self, code: int, *, trains: bool, progress: object, stopping: bool) -> Verdict:
        """What its end with `code` means; `progress`: a value that changes when the run makes progress."""
        if progress != self.progress:
            self.progress, self.count, self.busy = progress, 0, 0
        if code == 0:
            return Verdict.STOPPED if stopping else Verdict.DONE
        if stopping or code == INTERRUPTED:
            return Verdict.STOPPED
        if code == RunBusyError.exit_code:
            self.busy += 1
            return Verdict.AGAIN if self.busy <= BUSY_MAX else Verdict.FAILED
        comes_again = code < 0 or (not trains and code in (FencedError.exit_code, RanksError.exit_code))
        if not comes_again:
            return Verdict.FAILED
        self.count += 1
        return Verdict.AGAIN if self.count <= self.most else Verdict.FAILED


def ended_too_often(what: str, code: int, count: int, log: str) -> PacelineError:
    """`log`: where to look."""
    how = f"by {signal.Signals(-code).name}" if -code in set(signal.Signals) else f"with {code}"
    return PacelineError(
        f"{what.capitalize()} ended {count} times {how}, without progress in between.",
        why="Something ends it at every start. Everything that was checkpointed is safe.",
        next=f"read {log}; if the kernel killed it for lack of memory, give it a node with more; then run "
        "the same command again.",
    )
