"""Workers that render chat templates, as forks of one process that has imported the library.

Every producer, evaluator and engine starts a worker, and a worker takes a second of processor time to import.
"""

from __future__ import annotations

import gc
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from paceline.target import template, template_worker

SERVER = "import sys; from paceline.testing.forked_templates import serve; serve(sys.argv[1])"


class ForkedTemplates:
    """The server's process, started with the first worker; a context, in which all workers are its forks."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="paceline-templates-"))
        self._server: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ForkedTemplates:
        self.executed = template._start  # as a run starts one
        template._start = self.start  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        template._start = self.executed
        if self._server is not None:
            self._server.communicate()  # it ends with its input
        shutil.rmtree(self._folder)

    def address(self) -> str:
        """Where it listens, from now on."""
        address = str(self._folder / "socket")
        if self._server is None:
            command = [sys.executable, "-c", SERVER, address]
            self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            assert self._server.stdout is not None
            self._server.stdout.readline()
        return address

    def start(self) -> ForkedWorker:
        return ForkedWorker(self.address())


class ForkedWorker:
    """What paceline.target.template uses of subprocess.Popen."""

    def __init__(self, address: str) -> None:
        their_input, our_end = os.pipe()
        our_input, their_end = os.pipe()
        self.stdin, self.stdout = os.fdopen(our_end, "w"), os.fdopen(our_input)
        self._code: int | None = None
        self._link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._link.connect(address)
        socket.send_fds(self._link, [b"start"], [their_input, their_end])
        for fd in (their_input, their_end):
            os.close(fd)
        self.pid = int(self._link.recv(32))
        self._handle = os.pidfd_open(self.pid)

    def kill(self) -> None:
        if self._code is None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)

    def wait(self) -> int:
        if self._code is None:
            self._code = int(self._link.recv(32) or -signal.SIGKILL)
            self._link.close()
            os.close(self._handle)
        return self._code


def start_at(address: str) -> None:
    """Let this process take its workers from the server that listens there."""
    template._start = lambda: ForkedWorker(address)  # type: ignore[assignment,return-value]


# -- in the server and its forks -----------------------------------------------------------


def serve(address: str) -> None:
    """Fork for each connection, until the end of the input."""
    from transformers.utils import chat_template_utils

    gc.collect()
    gc.freeze()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for these forks
        sys.stdout.write(f"{chat_template_utils.__name__} is there\n")
        sys.stdout.flush()
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
            link, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _look_after_a_worker(link)
            link.close()


def _look_after_a_worker(link: socket.socket) -> NoReturn:
    """Start it with the pipes that come over `link`; tell its id, and its exit code when it has ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):  # the server's, who may end before this worker
        os.dup2(null, fd)
    _, fds, _, _ = socket.recv_fds(link, 32, 2)
    if (pid := os.fork()) == 0:
        link.close()
        _work(*fds)
    for fd in fds:
        os.close(fd)
    with suppress(OSError):  # nobody may ask any more
        link.send(str(pid).encode())
        link.send(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())
    os._exit(0)


def _work(read: int, write: int) -> NoReturn:
    sys.stdin, sys.stdout = os.fdopen(read), os.fdopen(write, "w")
    code = 1
    try:
        template_worker.main()
        code = 0
    finally:
        os._exit(code)
