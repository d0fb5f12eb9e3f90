"""All that the commands print. Text from outside (a reason, a path, an id) is shown letter by letter.

The console would take `[/INST]` for markup of its own and stop, and `:a:` for an emoji; the terminal would
obey control characters.
"""

from __future__ import annotations

import errno
from typing import IO, cast

from rich.console import Console
from rich.text import Text

from paceline.errors import PacelineError
from paceline.terminal import Output, one_line, printable

READER_GONE = 141  # exit code, as of a process that SIGPIPE ends


stdout, stderr = Output("stdout"), Output("stderr")
out, err = Console(file=cast(IO[str], stdout)), Console(file=cast(IO[str], stderr), stderr=True)


def plain(text: str, style: str = "") -> Text:
    """For a table's cell, or a part of a line."""
    return Text(one_line(text), style)


def say(console: Console, text: str) -> None:
    """Print it as one line, however long it is."""
    console.print(plain(text), soft_wrap=True)


def say_error(error: PacelineError) -> None:
    """What, why and next. A message of several lines is indented, so that none of them looks like ours."""
    parts = (("error", "bold red", error.what), (" why ", "bold", error.why), ("next ", "bold", error.next))
    for name, style, text in parts:
        if text:
            indented = printable(text.rstrip("\n")).replace("\n", "\n      ")
            err.print(Text.assemble((name, style), " ", indented), soft_wrap=True)


def exit_code_of_lost_output() -> int:
    """0 if all was written; READER_GONE, without a word, if its reader went away; else 1, said on stderr."""
    if stdout.lost is None:
        return 0
    if stdout.lost.errno == errno.EPIPE:
        return READER_GONE
    say(err, f"What this command had to say could not be written ({stdout.lost.strerror}).")
    return 1
