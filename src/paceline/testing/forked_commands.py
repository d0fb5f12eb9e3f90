"""`paceline` commands, their roles, and scripts of tests, as forks of one process that has imported torch.

A command does what it does for a user: its supervisor and the roles are processes of their own, with their
own ids, parents, sessions, environments, files and signals (forked_processes.py). Only the start of Python
and its imports are left out, most of the seconds of a tiny run.

A supervisor has its ledger open, and an open SQLite database must not be carried into a fork. So every
command first forks a nursery, which opens nothing, and roles are forked there. The one that forks them ends
at once, and the kernel gives the role to the command as to their nearest ancestor that has asked for orphans.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from paceline.testing.forked_starts import ForkedStart, ForkedStarts
from paceline.testing.forked_templates import ForkedTemplates

SERVER = """
import sys
from paceline.testing.forked_processes import prepare, process
from paceline.testing.forked_starts import serve
from paceline.testing.forked_templates import start_at
prepare()
start_at(sys.argv[1])
serve(process)
"""


class ForkedCommand(ForkedStart):
    """A Python process that was begun; a context, at whose end it has ended."""

    def __init__(
        self, starts: ForkedStarts, arguments: Sequence[str], environment: Mapping[str, str]
    ) -> None:
        self.args = arguments
        self._folder = Path(tempfile.mkdtemp(prefix="paceline-command-"))
        self.out, self.err = (self._folder / stream for stream in ("out", "err"))
        request = {"arguments": arguments, "environment": dict(environment), "folder": str(Path.cwd())}
        super().__init__(starts.ask, starts.ask([json.dumps(request), str(self.out), str(self.err)]))

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it wrote, when it has ended. Raises subprocess.TimeoutExpired."""
        self.wait(timeout)
        return self.out.read_text(), self.err.read_text()

    def __enter__(self) -> ForkedCommand:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
        shutil.rmtree(self._folder)


class ForkedCommands:
    """The server's process, started with the first command; a context, at whose end it ends."""

    def __init__(self, templates: ForkedTemplates) -> None:
        """`templates`: where all processes get the workers that render chat templates."""
        self._templates = templates
        self._starts: ForkedStarts | None = None

    def __enter__(self) -> ForkedCommands:
        return self

    def __exit__(self, *error: object) -> None:
        if self._starts is not None:
            self._starts.__exit__(*error)

    def begin(self, arguments: Sequence[str], environment: Mapping[str, str]) -> ForkedCommand:
        """`[python, "-m", module, ...]` or `[python, "-c", code, ...]`, without standard input."""
        self._starts = self._starts or ForkedStarts(SERVER, self._templates.address())
        return ForkedCommand(self._starts, arguments, environment)

    def run(
        self, arguments: Sequence[str], environment: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """The same to its end, as subprocess.run does it."""
        with self.begin(arguments, environment) as command:
            out, err = command.communicate()
        assert command.returncode is not None
        return subprocess.CompletedProcess(arguments, command.returncode, out, err)

    def script(self, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`python -c code arguments ...`, to its end."""
        return self.run([sys.executable, "-c", code, *arguments], os.environ)
