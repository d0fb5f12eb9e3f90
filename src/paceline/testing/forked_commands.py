"""`paceline` commands and the roles that they start, as forks of one process that has imported torch.

A command does what it does for a user: its supervisor and the roles are processes of their own, with their
own ids, parents, sessions, environments, files and signals. Only the start of Python and its imports are
left out, most of the seconds of a tiny run.

A supervisor has its ledger open, and an open SQLite database must not be carried into a fork. So every
command first forks a nursery, which opens nothing, and roles are forked there. The one that forks them ends
at once, and the kernel gives the role to the command as to their nearest ancestor that has asked for orphans.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from paceline.testing.forked_starts import ForkedStarts

SERVER = """
from paceline.testing.forked_commands import command, prepare
from paceline.testing.forked_starts import serve
prepare()
serve(command)
"""
ROLES = [f"paceline.roles.{role}" for role in ("producer", "consumer", "evaluator", "exporter", "comparer")]
IMPORTED_LATER = [  # by a target, its tokenizer and an optimizer
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "torch._dynamo",
]
PR_SET_CHILD_SUBREAPER = 36
REQUEST_BYTES_MAX = 1 << 17
FREE = 500  # the first of the descriptors that no role is given


class ForkedCommands:
    """The server's process, started with the first command; a context, at whose end it ends."""

    def __init__(self) -> None:
        self._starts: ForkedStarts | None = None

    def __enter__(self) -> ForkedCommands:
        return self

    def __exit__(self, *error: object) -> None:
        if self._starts is not None:
            self._starts.__exit__(*error)

    def run(
        self, arguments: Sequence[str], environment: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """Run `[python, "-m", module, ...]` to its end, as subprocess.run does; no standard input."""
        self._starts = self._starts or ForkedStarts(SERVER)
        with tempfile.TemporaryDirectory(prefix="paceline-command-") as name:
            told = [Path(name) / stream for stream in ("out", "err")]
            request = {
                "arguments": arguments[2:],
                "environment": dict(environment),
                "folder": str(Path.cwd()),
            }
            code = self._starts.start(json.dumps(request), *map(str, told))
            out, err = (path.read_text() for path in told)
        return subprocess.CompletedProcess(arguments, code, out, err)


# -- in the server and its forks -----------------------------------------------------------


def prepare() -> None:
    """Import what commands and roles import, so that no fork does."""
    for name in ["paceline.cli.main", *ROLES, *IMPORTED_LATER]:
        import_module(name)
    # A start executes its own module anew, and the command line looks at its environment when it is imported.
    for name in [*ROLES, *(name for name in sys.modules if name.startswith("paceline.cli"))]:
        del sys.modules[name]
    gc.collect()
    gc.freeze()  # forks copy less


def command(request: str, out: str, err: str) -> None:
    """A fork's life as a command. Never returns: raises SystemExit."""
    given = json.loads(request)
    for fd, path in enumerate([os.devnull, out, err]):
        opened = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.dup2(opened, fd)
        os.close(opened)
    os.chdir(given["folder"])
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    processes = SimpleNamespace(
        Popen=partial(ForkedRole, _nursery()),
        DEVNULL=subprocess.DEVNULL,
        TimeoutExpired=subprocess.TimeoutExpired,
    )
    import_module("paceline.roles.child").subprocess = processes  # type: ignore[attr-defined]
    os.execve = _become  # type: ignore[assignment]
    _become("", ["", "-m", *given["arguments"]], given["environment"])


def _become(_: str, arguments: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Stand in for os.execve of `[python, "-m", module, ...]`."""
    os.environ.clear()
    os.environ.update(environment)
    _, _, module, *rest = arguments
    sys.argv[:] = [module, *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    sys.exit(0)


class ForkedRole:
    """What paceline.roles.child uses of subprocess.Popen."""

    def __init__(
        self,
        nursery: socket.socket,
        arguments: Sequence[str],
        *,
        env: Mapping[str, str],
        stdout: int,
        pass_fds: Sequence[int],
        **_: object,  # a session of its own, no input, errors where the output goes: as all roles have it
    ) -> None:
        request = {"arguments": arguments, "environment": dict(env), "kept": list(pass_fds)}
        socket.send_fds(nursery, [json.dumps(request).encode()], [stdout, *pass_fds])
        self.pid = int(nursery.recv(32))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired."""
        if self.poll() is None:
            handle = os.pidfd_open(self.pid)
            select.select([handle], [], [], timeout)
            os.close(handle)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _nursery() -> socket.socket:
    """Fork it; returns the end of a link on which it is asked for roles."""
    supervisor = os.getpid()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork():
        theirs.close()
        return ours
    ours.close()
    while True:
        request, fds, _, _ = socket.recv_fds(theirs, REQUEST_BYTES_MAX, 8)
        if not request:
            os._exit(0)  # the command has ended
        parent = os.fork()
        if parent == 0:
            if os.fork():
                os._exit(0)
            _role(json.loads(request), fds, theirs, supervisor)
        os.waitpid(parent, 0)
        for fd in fds:
            os.close(fd)


def _role(given: dict[str, Any], fds: Sequence[int], link: socket.socket, supervisor: int) -> NoReturn:
    """A fork's life as a role of `supervisor`."""
    while os.getppid() != supervisor:
        time.sleep(0.0005)  # until its parent has ended
    os.setsid()
    log, *kept = (fcntl.fcntl(fd, fcntl.F_DUPFD, FREE) for fd in fds)
    link.send(str(os.getpid()).encode())
    link.close()
    for fd in (1, 2):
        os.dup2(log, fd)
    os.closerange(3, FREE)
    for fd, number in zip(kept, given["kept"], strict=True):
        os.dup2(fd, number, inheritable=False)
    os.closerange(FREE, FREE + len(fds))
    _become("", given["arguments"], given["environment"])
