"""Output to a terminal or a log: escapes control characters, and survives a stream that fails.

A terminal obeys control characters: they retitle it, clear it, or overwrite a line. Ids, reasons, paths and
the contents of files may carry them; here each becomes its escape.
"""

from __future__ import annotations

import os
import re
import sys
from typing import Any

# C0 except tab and newline, DEL and C1; marks that change the direction of text; line separators; half
# surrogates, which no terminal can write.
_OBEYED = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """`text` with an escape, such as \\x1b, for every character that a terminal would obey."""
    return _OBEYED.sub(lambda found: _escaped(found[0]), text)


def one_line(text: str) -> str:
    """As `printable`, with newlines escaped too, so that foreign text cannot add a line."""
    return printable(text).replace("\n", "\\n")


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


OUTPUTS = (("stdout", os.O_WRONLY, "w"), ("stderr", os.O_WRONLY, "w"))


class Output:
    """stdout or stderr. Once it takes no more text, further text is dropped without an error.

    `lost`: its first error, such as a full disk or a closed pipe (`| head -1`).
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._stream: Any = None  # None: the current sys.stdout or sys.stderr
        self.lost: OSError | None = None

    def replace(self) -> None:
        """Replace sys.stdout or sys.stderr, for all later output of this process."""
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
            # Otherwise Python would try to write the stream's buffer again at exit.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream or getattr(sys, self._name), name)


def open_standard_streams() -> None:
    """Make sure that descriptors 0, 1 and 2 are open; otherwise the next opened file would become one."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    for name, flag, mode in (("stdin", os.O_RDONLY, "r"), *OUTPUTS):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, flag), mode))
    for name, _, _ in OUTPUTS:
        getattr(sys, name).reconfigure(errors="backslashreplace")
