"""What the forks of forked_commands.py do: each becomes the Python process that was asked for.

Not only a process of its own, but one that /proc describes as started so: arguments and environment are
written where the kernel looks for them, because a start of a run looks there for orphans of an earlier one.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

from paceline.testing.forked_starts import ForkedStart

ROLES = [f"paceline.roles.{role}" for role in ("producer", "consumer", "evaluator", "exporter", "comparer")]
IMPORTED_LATER = [  # by a target, its tokenizer, an optimizer and the scripts of tests
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "torch._dynamo",
    "paceline.testing.small_run",
]
PR_SET_CHILD_SUBREAPER = 36
REQUEST_BYTES_MAX = 1 << 17
FREE = 500  # the first of the descriptors that no role is given


def prepare() -> None:
    """Import what commands and roles import, so that no fork does."""
    for name in ["paceline.cli.main", *ROLES, *IMPORTED_LATER]:
        import_module(name)
    # A start executes its own module anew, and the command line looks at its environment when it is imported.
    for name in [*ROLES, *(name for name in sys.modules if name.startswith("paceline.cli"))]:
        del sys.modules[name]
    gc.collect()
    gc.freeze()  # forks copy less


def process(request: str, out: str, err: str) -> None:
    """A fork's life as `[python, "-m", module, ...]` or `[python, "-c", code, ...]`."""
    given = json.loads(request)
    for fd, path in enumerate([os.devnull, out, err]):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(opened, fd)
        os.close(opened)
    os.chdir(given["folder"])
    if given["arguments"][1] == "-m":
        _start_roles_as_forks()
    os.execve = _become  # type: ignore[assignment]
    _become("", given["arguments"], given["environment"])


def _start_roles_as_forks() -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    nursery = _nursery()
    import_module("paceline.roles.child").subprocess = SimpleNamespace(  # type: ignore[attr-defined]
        Popen=partial(ForkedRole, nursery),
        DEVNULL=subprocess.DEVNULL,
        TimeoutExpired=subprocess.TimeoutExpired,
    )
    import_module("paceline.roles.question").subprocess = SimpleNamespace(  # type: ignore[attr-defined]
        run=partial(answered, nursery)
    )


def _become(_: str, arguments: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Stand in for os.execve."""
    _show(arguments, environment)
    os.environ.clear()
    os.environ.update(environment)
    _, option, program, *rest = arguments
    if option == "-m":
        sys.argv[:] = [program, *rest]
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = [option, *rest]
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(program, "<string>", "exec"), vars(main))  # noqa: S102 (a test's own)
    sys.exit(0)


def _show(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """Write both where the server's own are, which were made long for this (forked_starts.py)."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    places = list(map(int, fields[45:49]))  # start and end of the arguments, and of the environment
    _write(arguments, *places[:2])
    _write((f"{name}={value}" for name, value in environment.items()), *places[2:])


def _write(words: Iterable[str], start: int, end: int) -> None:
    data = b"".join(os.fsencode(word) + b"\0" for word in words)
    assert len(data) <= end - start, "there is room"
    ctypes.memmove(start, data.ljust(end - start, b"\0"), end - start)


# -- roles ---------------------------------------------------------------------------------


class ForkedRole(ForkedStart):
    """What paceline.roles.child uses of subprocess.Popen."""

    def __init__(
        self,
        nursery: socket.socket,
        arguments: Sequence[str],
        *,
        env: Mapping[str, str],
        stdin: int,
        stdout: int,
        stderr: int,
        pass_fds: Sequence[int] = (),
        **_: object,  # a session of its own, as all roles have it
    ) -> None:
        request = {"arguments": arguments, "environment": dict(env), "kept": list(pass_fds)}
        streams = [0 if stdin == subprocess.DEVNULL else stdin, stdout, stderr]  # a command's input is empty
        socket.send_fds(nursery, [json.dumps(request).encode()], [*streams, *pass_fds])
        super().__init__(lambda pid: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), int(nursery.recv(32)))


def answered(
    nursery: socket.socket,
    arguments: Sequence[str],
    *,
    input: str,
    env: Mapping[str, str],
    **_: object,  # text, captured, any exit code
) -> subprocess.CompletedProcess[str]:
    """What paceline.roles.question uses of subprocess.run."""
    with ExitStack() as opened:
        files = [opened.enter_context(tempfile.TemporaryFile()) for _ in range(3)]
        files[0].write(input.encode())
        files[0].seek(0)
        stdin, stdout, stderr = (file.fileno() for file in files)
        code = ForkedRole(nursery, arguments, env=env, stdin=stdin, stdout=stdout, stderr=stderr).wait()
        said = [os.pread(fd, os.fstat(fd).st_size, 0).decode(errors="replace") for fd in (stdout, stderr)]
    return subprocess.CompletedProcess(arguments, code, *said)


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
            between = os.getpid()
            if os.fork():
                os._exit(0)
            while os.getppid() == between:
                time.sleep(0.0005)
            if os.getppid() != supervisor:  # it was killed a moment ago
                os._exit(0)
            _role(json.loads(request), fds, theirs)
        os.waitpid(parent, 0)
        for fd in fds:
            os.close(fd)


def _role(given: dict[str, Any], fds: Sequence[int], link: socket.socket) -> NoReturn:
    """A fork's life as a role."""
    os.setsid()
    _show(given["arguments"], given["environment"])  # a start has executed its program when it returns
    given_fds = [fcntl.fcntl(fd, fcntl.F_DUPFD, FREE) for fd in fds]
    link.send(str(os.getpid()).encode())
    link.close()
    for number in range(3):
        os.dup2(given_fds[number], number)
    sys.stdin = os.fdopen(0, closefd=False)
    os.closerange(3, FREE)
    for fd, number in zip(given_fds[3:], given["kept"], strict=True):
        os.dup2(fd, number, inheritable=False)
    os.closerange(FREE, FREE + len(fds))
    _become("", given["arguments"], given["environment"])
