"""Processes that start to work at one moment, and return what each of them counted.

    python -m benchmarks.together MODULE FUNCTION OPTIONS

A worker is a function of a module, with options that JSON can hold. It opens its files, calls `ready`, works,
and returns its counts.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
Counts = dict[str, Any]
Worker = tuple[Callable[..., Counts], dict[str, Any]]


def started(work: Callable[..., Counts], options: dict[str, Any]) -> subprocess.Popen[str]:
    """A process of its own that gets ready for the work, and waits for `go`."""
    command = [sys.executable, "-m", "benchmarks.together", work.__module__, work.__name__]
    return subprocess.Popen(
        [*command, json.dumps(options)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def go(*processes: subprocess.Popen[str]) -> None:
    """Let them begin, as soon as all are ready."""
    pipes = [(process.stdin, process.stdout) for process in processes]
    assert all(stdin and stdout and stdout.readline() == "ready\n" for stdin, stdout in pipes)
    for stdin, _ in pipes:
        assert stdin is not None
        stdin.write("go\n")
        stdin.flush()


def counted(process: subprocess.Popen[str]) -> Counts:
    """What a process returned at its end."""
    out, _ = process.communicate()
    assert process.returncode == 0, f"{process.args} ended with {process.returncode}"
    counts: Counts = json.loads(out.splitlines()[-1])  # a worker may tell on the way
    return counts


def together(*workers: Worker) -> list[Counts]:
    """Run (function, options) each in its own process, all starting at one moment."""
    processes = [started(work, options) for work, options in workers]
    go(*processes)
    return [counted(process) for process in processes]


def ready() -> None:
    print("ready", flush=True)
    sys.stdin.readline()


def timed(seconds: float, work: Callable[[], int]) -> Counts:
    """Call `work`, which returns how many refs it moved, until the time is over or it returns 0."""
    moved, before = 0, time.process_time()
    started = now = time.perf_counter()
    while now - started < seconds and (refs := work()):
        moved += refs
        now = time.perf_counter()
    return {"refs": moved, "seconds": now - started, "processor_seconds": time.process_time() - before}


def rate(counts: list[Counts]) -> float:
    """Refs per second of all workers."""
    return sum(one["refs"] / one["seconds"] for one in counts)


if __name__ == "__main__":
    module, function, options = sys.argv[1:]
    print(json.dumps(getattr(import_module(module), function)(**json.loads(options))))
