"""A terminal is given nothing to obey, and a stream that fails stops nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from paceline.terminal import one_line, printable


@pytest.mark.parametrize(
    "character", ["\x1b", "\x07", "\b", "\r", "\x7f", "\x9b", "\u202e", "\u2066", "\u2028", "\ud800"]
)
def test_what_a_terminal_would_obey_is_escaped(character: str) -> None:
    """C0, C1, marks of direction, line separators, halves of surrogates."""
    assert printable(f"a{character}b") == f"a{character.encode('unicode_escape').decode()}b"


def test_other_text_is_left_alone() -> None:
    """Letters of any script, and a newline of our own; none of somebody else's."""
    text = "\tüñí 漢字 🚲\nnext"
    assert printable(text) == text
    assert one_line("a\nb") == "a\\nb"


FAILING_STREAM = """
import sys
from pathlib import Path
from paceline.terminal import Output, open_standard_streams
open_standard_streams()
stdout = Output("stdout")
stdout.replace()
for _ in range(3):
    print("x" * 9000, flush=True)
sys.exit(7 if stdout.lost else 8)
"""


def test_a_stream_on_a_full_device_loses_text_and_nothing_else() -> None:
    """Not the exit code either, which Python would replace by 120."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", FAILING_STREAM], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert (done.returncode, done.stderr) == (7, b"")


def test_no_file_takes_the_place_of_a_closed_stream() -> None:
    """The first file that is opened would get number 1, and all that is printed would go into it."""
    code = (
        "import os\nfrom paceline.terminal import open_standard_streams\nopen_standard_streams()\nprint(1)\n"
    )
    code += "import sys\nassert os.open('/dev/null', 0) > 2\nassert sys.stdin.read() == ''"
    script = f'exec {sys.executable} -c "$0" <&- >&- 2>&-'
    assert subprocess.run(["/bin/sh", "-c", script, code], check=False).returncode == 0
