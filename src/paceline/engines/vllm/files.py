"""Reads the files in which vLLM leaves hidden states, and trusts nothing that they or the server say.

The server writes a file under its final name and holds the lock beside it until the write has ended, or has
failed: after the lock there may be no file, or a part of one. The path comes from the server, so only a
regular file of this user, directly in the configured folder, is opened, and never through a link. What is
returned was read whole and has the run's layers, width and dtype; its tokens are the caller's to compare. A
file that was read is removed; files that no producer waits for any more are removed by age.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from paceline.engines.capture_rows import is_sound
from paceline.engines.served.http import TryAgainError
from paceline.engines.served.own_files import (
    foreign,
    open_own,
    opened,
    read_own,
    remove_own,
    sweep,
    wait_until,
)
from paceline.errors import EngineError

STATES, TOKENS = "hidden_states", "token_ids"
SERVERS_WORD = "cmpl-"  # before the id of a request, in the name of its file
SUFFIX, LOCK = ".safetensors", ".lock"
HEADER_BYTES_MAX = 1 << 16


@dataclass(frozen=True)
class Layout:
    """What the states of one token are: [layers, hidden_size] of `dtype`."""

    num_layers: int
    hidden_size: int
    dtype: torch.dtype

    def file_bytes(self, num_tokens: int) -> int:
        """The most bytes of a file with so many tokens."""
        return num_tokens * (self.num_layers * self.hidden_size * self.dtype.itemsize + 8) + HEADER_BYTES_MAX


@dataclass(frozen=True)
class Written:
    """A file's content: token ids [T], and states [T, layers, H]."""

    token_ids: tuple[int, ...]
    states: torch.Tensor


class StateFiles:
    def __init__(
        self,
        folder: Path,
        layout: Layout,
        *,
        prefix: str,
        wait_s: float,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """`prefix`: of the run's requests. `wait_s`: how long the server may hold a file's lock."""
        self.folder = folder
        self.layout = layout
        self._prefix, self._wait_s = prefix, wait_s
        self._should_stop = should_stop

    def take(self, named: str, tokens_max: int) -> Written:
        """Read and remove the file that the server names, of at most `tokens_max` tokens.

        Raises TryAgainError if it is missing or not whole, CaptureMismatchError for a file that is not the
        run's, EngineError for states that are not finite or all zero.
        """
        name = self._own_name(named)
        with opened(self.folder) as folder:
            try:
                self._wait_for_writer(folder, name)
                data = read_own(folder, name, self.layout.file_bytes(tokens_max))
            finally:
                remove_own(folder, name, name + LOCK)
        return self._content(name, data)

    def sweep(self, older_than_s: float = 0.0) -> int:
        """Remove the files of the run's requests that no producer waits for any more; their number."""
        return sweep(self.folder, SERVERS_WORD + self._prefix, (SUFFIX, SUFFIX + LOCK), older_than_s)

    def _own_name(self, named: str) -> str:
        """The file's name, if the path lies directly in the folder."""
        folder, name = os.path.split(named)
        inside = "\0" not in named and os.path.realpath(folder or ".") == os.path.realpath(self.folder)
        if not inside or not name.endswith(SUFFIX) or name.startswith("."):
            raise foreign(f"The server named {named[:200]!r}, which is not a file of {self.folder}")
        return name

    def _wait_for_writer(self, folder: int, name: str) -> None:
        """Wait until the server has ended its write. Raises TryAgainError."""
        try:
            lock = open_own(folder, name + LOCK)
        except FileNotFoundError as error:
            raise TryAgainError(f"{name} has no lock beside it") from error

        def is_free() -> bool:
            with suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return True
            return False

        held = f"the server holds the lock of {name} for {self._wait_s:g} s"
        try:
            wait_until(is_free, self._wait_s, self._should_stop, held)
        finally:
            os.close(lock)

    def _content(self, name: str, data: bytes) -> Written:
        try:
            tensors = load(data)
        except (SafetensorError, ValueError, TypeError, KeyError) as error:
            raise TryAgainError(f"{name} is not whole ({str(error)[:200]})") from error
        layout, states, tokens = self.layout, tensors.get(STATES), tensors.get(TOKENS)
        if states is None or tokens is None or tokens.dtype != torch.int64 or tokens.dim() != 1:
            raise foreign(f"{name} holds {sorted(tensors)[:8]} instead of {STATES} and {TOKENS}")
        wanted = (len(tokens), layout.num_layers, layout.hidden_size)
        if tuple(states.shape) != wanted or states.dtype != layout.dtype:
            raise foreign(
                f"{name} holds states {list(states.shape)} of {states.dtype}; the run expects "
                f"{list(wanted)} of {layout.dtype}"
            )
        if not is_sound(states):
            raise EngineError(
                f"The states in {name} are not finite, or a token's are all zero.",
                why="Training on them would destroy the draft's weights; they were dropped.",
                next="try target.dtype: float32, remove the prompt, or another version of the server.",
            )
        return Written(tuple(tokens.tolist()), states)
