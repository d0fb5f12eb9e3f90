"""The tutorial works as it stands: its files are written, its commands run, and they print what it shows."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from paceline.testing.tiny_run import TinyRun

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorial.md"
BLOCK = re.compile(r'^```(\w+)(?: title="([\w.]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def blocks() -> Iterator[tuple[str, str, str]]:
    """Language, file name and text of each code block, in order."""
    for found in BLOCK.finditer(TUTORIAL.read_text()):
        yield found[1], found[2] or "", found[3]


def command(line: str) -> list[str]:
    """`paceline ...` and `python -m ...` by this Python."""
    program, *rest = shlex.split(line)
    return [sys.executable, *({"paceline": ["-m", "paceline"], "python": []}[program]), *rest]


def without_figures(text: str) -> str:
    return re.sub(r"\d[\d.,:]*", "#", text)


def test_every_command_runs_and_prints_what_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shown line may differ from a printed one in its figures alone."""
    monkeypatch.chdir(tmp_path)
    printed, commands = "", 0
    for language, name, text in blocks():
        if name:
            (tmp_path / name).write_text(text)
        elif language == "sh":
            for line in text.splitlines():
                ended = TinyRun.execute(command(line), {**os.environ, "COLUMNS": "200"})
                assert ended.returncode == 0, f"{line}: {ended.stdout}{ended.stderr}"
                printed, commands = printed + ended.stdout, commands + 1
        else:
            assert language == "text", f"a block of {language} is neither a file, nor commands, nor output"
            for line in text.splitlines():
                assert without_figures(line) in without_figures(printed), line
    assert commands > 8
