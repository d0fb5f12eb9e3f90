"""What reaches a terminal or a log: text from outside made fit for it, and streams that may fail.

A terminal obeys control characters: they retitle it, clear it, or show another line than the one that
was written. Ids, reasons, paths and what files hold may carry them; here each becomes its escape.
"""

from __future__ import annotations

import os
import re
import sys
from typing import Any

# C0 but for tab and newline, DEL and C1; marks that turn the direction of text; line separators; half
# surrogates, which no terminal can write.
_OBEYED = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """`text` with every character that a terminal would obey as an escape, such as \\x1b."""
    return _OBEYED.sub(lambda found: _escaped(found[0]), text)


def one_line(text: str) -> str:
    """The same, and a newline as an escape too: what comes from outside cannot add a line of its own."""
    return printable(text).replace("\n", "\\n")


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


class Output:
    """stdout or stderr. When it takes no more text nothing fails: what follows is dropped.

    `lost`: its first error. A log on a full disk, a reader that went away (`| head -1`).
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._stream: Any = None  # None: whatever sys.stdout or sys.stderr is at that time
        self.lost: OSError | None = None

    def replace(self) -> None:
        """Stand where the stream stood, for all that this process prints from now on."""
        self._stream = getattr(sys, self._name)
        setattr(sys, self._name, self)

    def write(self, text: str) -> int:
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        self._try("flush")

    def _try(self, action: str, *arguments: str) -> None:
        if self.lost is not None:
            return
        stream = self._stream or getattr(sys, self._name)
        try:
            getattr(stream, action)(*arguments)
        except OSError as error:
            self.lost = error
            # What the stream still holds would be written once more when the process ends.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream or getattr(sys, self._name), name)


def open_standard_streams() -> None:
    """Make sure that 0, 1 and 2 are streams, or the next file that is opened would be taken for one."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        getattr(sys, name).reconfigure(errors="backslashreplace")
