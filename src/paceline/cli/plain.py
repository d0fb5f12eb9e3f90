"""Everything that the commands print. Text from outside (a reason, a path, an id) is printed literally.

Otherwise the console would take `[/INST]` for markup and fail, and `:a:` for an emoji, and the terminal would
obey control characters.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Collection, Iterable, Mapping
from typing import IO, Any, Literal, cast

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from paceline.errors import PacelineError
from paceline.terminal import Output, one_line, printable

INTERRUPTED = 130  # exit code
BARE: Mapping[str, Any] = {
    "box": None,
    "padding": (0, 2, 0, 0),
    "header_style": "dim",
}  # a table without lines
READER_GONE = 141  # exit code, as of a process that SIGPIPE ends


stdout, stderr = Output("stdout"), Output("stderr")
out, err = Console(file=cast(IO[str], stdout)), Console(file=cast(IO[str], stderr), stderr=True)


def plain(text: str, style: str = "") -> Text:
    """Literal text for a table's cell or a part of a line."""
    return Text(one_line(text), style, overflow="fold")


def table(*heads: str | Text, right: Collection[str] = (), **look: Any) -> Table:
    """A table that folds where the console is narrow. Nothing is cut off with an ellipsis: ASCII has none.

    `right`: the heads of columns of figures. `look`: of rich.table.Table.
    """
    made = Table(**look)
    for head in heads:
        justify: Literal["left", "right"] = "right" if str(head) in right else "left"
        shown = Text(head, overflow="fold") if isinstance(head, str) else head
        made.add_column(shown, justify=justify, overflow="fold")
    return made


def say(console: Console, text: str) -> None:
    """Print it as one line, however long it is."""
    console.print(plain(text), soft_wrap=True)


def say_document(document: msgspec.Struct | Mapping[str, Any]) -> None:
    """Print it as JSON, in ASCII: a terminal obeys nothing in it."""
    out.file.write(json.dumps(msgspec.to_builtins(document, str_keys=True), indent=1) + "\n")


def say_wrapped(console: Console, label: Text, text: str, indent: int | None = None) -> None:
    """Print the text after the label, in lines of the console's width without spaces at their ends.

    `indent`: of the lines after the first; by default they begin below the text.
    """
    indent = label.cell_len if indent is None else indent
    lines = (Text(" " * (label.cell_len - indent)) + plain(text)).wrap(console, console.width - indent)
    for number, line in enumerate(lines):
        line.rstrip()
        shown = label + line[label.cell_len - indent :] if number == 0 else Text(" " * indent) + line
        console.print(shown, soft_wrap=True)


def tell_findings(console: Console, found: Iterable[tuple[bool, str, str]]) -> None:
    """Print findings: whether each refuses, what it is, and what to do about it."""
    for refuses, what, advice in found:
        name, style = ("does not fit", "bold red") if refuses else ("note", "bold")
        console.print()
        say_wrapped(console, plain(f"{name}: ", style), what, indent=2)
        if advice:
            say_wrapped(console, plain("  "), advice)
    console.print()


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
