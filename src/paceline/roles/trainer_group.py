"""The processes of a consumer with several ranks, as the supervisor's one child.

If a rank dies, or ends with an error, the others learn it from their connections and end by themselves within
a moment; those that do not are killed. The group's result is that of the rank that ended it: an error of its
own counts before a death, and both before the errors of those that only lost it.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from pathlib import Path

from paceline.config.run import RunConfig
from paceline.errors import RanksError
from paceline.roles.child import Child, RoleFailedError
from paceline.roles.trainers import MeetingPoint, role_of_rank
from paceline.roles.workers import CONSUMER

LAST_WORDS_S = 5.0  # for the others to end, once one rank has
LOOK_S = 0.1


class TrainerGroup:
    def __init__(self, run_file: Path, config: RunConfig, threads: int) -> None:
        self.role = CONSUMER  # then that of the rank that ended the group
        self._result: int | None = None
        self._error: RoleFailedError | None = None
        self._ended_at: float | None = None
        meeting = MeetingPoint(config.machine.trainers)
        self._ranks: list[Child] = []
        try:
            for rank in range(config.machine.trainers):
                self._ranks.append(
                    Child(
                        role_of_rank(rank),
                        run_file,
                        config,
                        threads,
                        environment=meeting.environment(rank),
                        descriptors=meeting.descriptors(rank),
                    )
                )
        except BaseException:
            self.end(time.monotonic())
            raise
        finally:
            meeting.close()

    def poll(self) -> int | None:
        """The exit code of the rank that ended the group, once all have ended; 0 if rank 0 ended well."""
        if self._result is not None:
            return self._result
        codes = [rank.poll() for rank in self._ranks]
        if codes[0] is None and not any(codes):
            return None
        if self._ended_at is None:
            self._ended_at = time.monotonic()
        if None in codes:
            if time.monotonic() < self._ended_at + LAST_WORDS_S:
                return None
            late = [rank for rank, code in zip(self._ranks, codes, strict=True) if code is None]
            for rank in late:
                rank.send(signal.SIGKILL)
            for rank in late:
                rank.wait(LAST_WORDS_S)
        self._judge({rank: code for rank, code in zip(self._ranks, codes, strict=True) if code is not None})
        return self._result

    def _judge(self, ended: Mapping[Child, int]) -> None:
        """`ended`: the ranks that ended by themselves."""
        first = self._ranks[0]
        if ended.get(first) == 0:
            self._result = 0
            return
        errors = {rank: rank.error() for rank in ended}

        def weight(rank: Child) -> int:
            code = ended[rank]
            if code in (0, RanksError.exit_code):
                return 2 if code else 3
            return 0 if code > 1 and errors[rank] is not None else 1

        cause = min(ended, key=weight)  # the first rank of several
        self.role, self._result, self._error = cause.role, ended[cause], errors[cause]

    def wait(self, seconds: float) -> bool:
        """Wait up to `seconds` for rank 0 to end; returns whether it has."""
        return self._ranks[0].wait(seconds)

    def send(self, number: signal.Signals) -> None:
        for rank in self._ranks:
            rank.send(number)

    def end(self, deadline: float) -> None:
        """Kill what has not ended by `deadline` (time.monotonic), and release all.

        A rank that waits for one that died while they met hears no signal: `poll` ends it before.
        """
        while (left := deadline - time.monotonic()) > 0 and self.poll() is None:
            late = next((rank for rank in self._ranks if rank.poll() is None), self._ranks[0])
            late.wait(min(LOOK_S, left))
        for rank in self._ranks:
            rank.end(deadline)

    def keep_log_short(self) -> None:
        for rank in self._ranks:
            rank.keep_log_short()

    def error(self) -> RoleFailedError | None:
        """What the rank reported that ended the group."""
        return self._error
