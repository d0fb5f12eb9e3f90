"""The guard of a managed server: `python -m paceline.engines.vllm.guard COMMAND...` with a pipe as stdin.

It starts the command and ends it when the pipe closes: the producer holds the other end, so no server
outlives a producer, however that dies. It is the leader of the server's session, by which the next producer
finds a server whose guard was killed too. Standard library only.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

GRACE_S = 10.0
LOOK_S = 0.05


def main(command: list[str]) -> int:
    """Run the command until it ends or the pipe closes; its exit code."""
    for number in (signal.SIGINT, signal.SIGHUP):  # a closed pipe is the only order to end
        signal.signal(number, signal.SIG_IGN)
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    threading.Thread(target=_end_with_pipe, args=(server,), daemon=True).start()
    code = server.wait()
    end_session(os.getpid(), started_at(os.getpid()), spare=os.getpid())  # workers may outlive their server
    return code


def _end_with_pipe(server: subprocess.Popen[bytes]) -> None:
    while os.read(0, 1):
        pass
    with suppress(ProcessLookupError):
        server.terminate()
    with suppress(subprocess.TimeoutExpired):
        server.wait(GRACE_S)
    with suppress(ProcessLookupError):
        server.kill()


def started_at(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None if there is no such process."""
    facts = _facts(pid)
    return None if facts is None else facts[1]


def end_session(leader: int, leader_started: int | None, *, spare: int = 0) -> int:
    """End every process of this user in the session that `leader` began; how many there were.

    `leader_started` tells the session from a later one whose leader got the same id.
    """
    if leader_started is None or started_at(leader) not in (None, leader_started):
        return 0
    members = [pid for pid in session_members(leader, leader_started) if pid != spare]
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + GRACE_S
        for pid in session_members(leader, leader_started):
            if pid != spare:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, number)
        while time.monotonic() < deadline and set(session_members(leader, leader_started)) - {spare}:
            time.sleep(LOOK_S)
    return len(members)


def session_members(leader: int, since: int) -> Iterator[int]:
    """This user's live processes in the session of `leader` that started at `since` or later."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with suppress(OSError):
            if entry.stat().st_uid != os.geteuid():
                continue
            facts = _facts(int(entry.name))
            if facts is not None and facts[0] == leader and facts[1] >= since:
                yield int(entry.name)


def _facts(pid: int) -> tuple[int, int] | None:
    """Session and start time of a process that has not ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else (int(fields[3]), int(fields[19]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
