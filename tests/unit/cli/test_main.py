"""The command is there at once, and says what it can in one screen."""

from __future__ import annotations

import re
import subprocess
import sys

from typer.testing import CliRunner

import paceline
from paceline.cli.main import app
from paceline.cli.reference import command_tables

# Each of them costs more than a command that only tells something may: together they are its whole time.
HEAVY = {"torch", "transformers", "numpy", "pydantic", "yaml", "rich", "apsw", "redis", "importlib.metadata"}


def loaded(*arguments: str) -> set[str]:
    """The modules of a Python process that ran so."""
    told = "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr))\n"
    told += "from paceline.cli.main import main; main()" if arguments else "import paceline"
    command = [sys.executable, "-c", told, *arguments]
    found = subprocess.run(command, text=True, capture_output=True, check=True)
    return set(found.stderr.split())


def test_help_and_version_import_little() -> None:
    """Neither they nor `import paceline` load what runs need: a person waits for them."""
    assert {name for name in loaded() if name.startswith("paceline")} == {"paceline"}
    for asked in ("--help", "--version"):
        assert not loaded(asked) & HEAVY


def test_the_version_is_that_of_the_package() -> None:
    """The build reads it from the same place."""
    result = CliRunner().invoke(app, ["--version"])
    assert result.output == f"paceline {paceline.__version__}\n"


def test_no_help_text_is_cut_in_the_list_of_commands() -> None:
    """The list fits in 80 columns, a sentence for each verb."""
    listed = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80"}).output
    assert "  train" in listed
    assert "..." not in listed.split("Commands:")[1]
    assert all(len(line) <= 80 for line in listed.splitlines())


def test_a_help_text_says_what_is_a_default() -> None:
    """Without the word, "the run file to write; run.yaml" reads like a second file."""
    bare = r"; (?:the|that of|those of|as many as|\d+|[^\s/]+\.(?:yaml|html|jsonl?))\b[^;:\n]*\. \|"
    assert not re.findall(rf".*{bare}.*", command_tables())
