"""The figures of the prompts that an unfinished evaluation has measured, so that a killed one goes on.

JSON lines: the first says of which evaluation, each other one is a prompt's figures. A torn last line is
dropped. What was measured for another evaluation (another checkpoint, another request) is not used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from paceline.evaluation.acceptance import PromptFigures
from paceline.evaluation.heldout import Asked


class Unfinished:
    """The file at `path`, of the evaluation that `identity` (JSON values) describes. A context manager."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Raises OSError."""
        self.path = path
        first = json.dumps(identity, sort_keys=True).encode()
        self._found = _read(path, first)
        self._has_figures = bool(self._found)
        self._file = path.open("wb" if self._found is None else "ab")
        # A line that a crash has torn ends here.
        self._file.write(first + b"\n" if self._found is None else b"\n")

    def __enter__(self) -> Unfinished:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The file stays if the evaluation did not end well and has measured something."""
        self.close()
        if error is None or not self._has_figures:
            self.path.unlink()

    def close(self) -> None:
        self._file.close()

    def find(self, part: str, asked: Asked) -> PromptFigures | None:
        """What was measured of this prompt in this part, such as a suite at a temperature."""
        return (self._found or {}).get(_key(part, asked))

    def add(self, part: str, asked: Asked, figures: PromptFigures) -> None:
        """Raises OSError."""
        self._file.write(msgspec.json.encode([_key(part, asked), figures]) + b"\n")
        self._file.flush()
        self._has_figures = True


def _key(part: str, asked: Asked) -> str:
    told = json.dumps([part, asked.prompt_id, asked.token_ids])
    return hashlib.sha256(told.encode()).hexdigest()


def _read(path: Path, first: bytes) -> dict[str, PromptFigures] | None:
    """Figures by key; None if the file is not of the evaluation that `first` describes."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return None
    if lines[0] != first:
        return None
    found = {}
    for line in lines[1:]:
        try:
            key, figures = msgspec.json.decode(line, type=tuple[str, PromptFigures])
        except msgspec.MsgspecError:  # empty, torn by a crash, or not ours
            continue
        found[key] = figures
    return found
