"""`paceline train --on` and `paceline stop --on`: a run on a Ray cluster.

Ray ends the process that is connected to a cluster when the cluster's head is gone, without an exception. So
the connection is a child's, and this process tells what has happened.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from functools import partial
from pathlib import Path

import typer

from paceline.cli.plain import out, say, stdout
from paceline.cli.verbs.verb import INTERRUPTED, advises
from paceline.placement.driver import lost_cluster, stop_on, train_on
from paceline.roles.process import PR_SET_PDEATHSIG, stop_signals

BEGIN = b"."  # what the child waits for
ENDED = b"."  # what it writes if its exit code is its own


def train_on_cluster(run_file: Path, address: str) -> None:
    """Raises typer.Exit with the exit code of the run's command, PacelineError."""
    _in_a_child(lambda: train_on(run_file, address, partial(say, out)), f"train {run_file}", address)


def stop_on_cluster(run_file: Path, address: str, *, at_once: bool) -> None:
    """Raises typer.Exit with the exit code of an error that was printed, PacelineError."""

    def stop() -> int:
        stop_on(run_file, address, partial(say, out), at_once=at_once)
        return 0

    _in_a_child(stop, f"stop {run_file}", address)


def _in_a_child(work: Callable[[], int], command: str, address: str) -> None:
    """Do the work in a child, and hand signals on to it. Raises PacelineError if it ended by Ray's will."""
    stdout.flush()
    reads, writes = os.pipe()
    waits, begins = os.pipe()
    parent, child, asked = os.getpid(), os.fork(), list[int]()
    if child == 0:
        os.close(begins)
        _be_the_child(work, parent, waits, writes)
    for fd in (waits, writes):
        os.close(fd)

    def hand_on(number: int, _: object) -> None:
        asked.append(number)
        with suppress(ProcessLookupError):
            os.kill(child, number)

    before = {number: signal.signal(number, hand_on) for number in stop_signals()}
    try:
        with suppress(BrokenPipeError), os.fdopen(begins, "wb") as begun:
            begun.write(BEGIN)
        with os.fdopen(reads, "rb") as said:
            ended = said.read() == ENDED  # until its end
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if not ended and asked:  # before there was anything to stop
        raise typer.Exit(INTERRUPTED)
    if not ended:
        raise lost_cluster(command, address)
    if code:
        raise typer.Exit(code)


def _be_the_child(work: Callable[[], int], parent: int, waits: int, writes: int) -> None:
    """Never returns. If the command is killed, this process ends as suddenly, and the run goes on.

    The work begins when the command hands signals on: one that ends it before finds nothing begun.
    """
    code = 1
    try:
        os.setsid()  # a terminal's Ctrl-C reaches the parent alone, which hands it on
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent or not os.read(waits, 1):
            os._exit(code)
        stdout.replace()
        # Where a node dies, Ray prints pages of its log; what it means for the run is told anyway.
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
            code = _done(work)
        stdout.flush()
        os.write(writes, ENDED)
    finally:
        os._exit(code)


def _done(work: Callable[[], int]) -> int:
    @advises
    def command() -> None:
        if code := work():
            raise typer.Exit(code)

    try:
        command()
    except typer.Exit as end:
        return end.exit_code
    return 0
