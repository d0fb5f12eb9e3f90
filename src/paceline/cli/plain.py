"""Everything that the commands print. Text from outside (a reason, a path, an id) is printed literally.

Otherwise the console would take `[/INST]` for markup and fail, and `:a:` for an emoji, and the terminal would
obey control characters.
"""

from __future__ import annotations

import errno
import json
from typing import IO, cast

import msgspec
from rich.console import Console
from rich.text import Text

from paceline.errors import PacelineError
from paceline.terminal import Output, one_line, printable

INTERRUPTED = 130  # exit code
READER_GONE = 141  # exit code, as of a process that SIGPIPE ends


stdout, stderr = Output("stdout"), Output("stderr")
out, err = Console(file=cast(IO[str], stdout)), Console(file=cast(IO[str], stderr), stderr=True)


def plain(text: str, style: str = "") -> Text:
    """Literal text for a table's cell or a part of a line."""
    return Text(one_line(text), style)


def say(console: Console, text: str) -> None:
    """Print it as one line, however long it is."""
    console.print(plain(text), soft_wrap=True)


def say_document(document: msgspec.Struct) -> None:
    """Print it as JSON, in ASCII: a terminal obeys nothing in it."""
    out.file.write(json.dumps(msgspec.to_builtins(document, str_keys=True), indent=1) + "\n")


def say_error(error: PacelineError) -> None:
    """Print what, why and next. Later lines are indented, so that foreign text cannot imitate the labels."""
    parts = (("error", "bold red", error.what), (" why ", "bold", error.why), ("next ", "bold", error.next))
    for name, style, text in parts:
        if text:
            indented = printable(text.rstrip("\n")).replace("\n", "\n      ")
            err.print(Text.assemble((name, style), " ", indented), soft_wrap=True)


def exit_code_of_lost_output() -> int:
    """0 if all output was written; READER_GONE, silently, if its reader is gone; else 1, with a message."""
    if stdout.lost is None:
        return 0
    if stdout.lost.errno == errno.EPIPE:
        return READER_GONE
    say(err, f"The output of this command could not be written ({stdout.lost.strerror}).")
    return 1
