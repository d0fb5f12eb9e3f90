"""Reads the files in which vLLM leaves hidden states, and trusts nothing that they or the server say.

The server writes a file under its final name and holds the lock beside it until the write has ended, or has
failed: after the lock there may be no file, or a part of one. The path comes from the server, so only a
regular file of this user, directly in the configured folder, is opened, and never through a link. What is
returned was read whole and has the run's layers, width and dtype; its tokens are the caller's to compare. A
file that was read is removed; files that nobody asked for any more are removed by age.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from paceline.engines.vllm.client import TryAgainError, stopped
from paceline.errors import CaptureMismatchError, EngineError

STATES, TOKENS = "hidden_states", "token_ids"
SUFFIX, LOCK = ".safetensors", ".lock"
HEADER_BYTES_MAX = 1 << 16
LOOK_S = 0.01
OTHERS_MAY_WRITE = 0o022


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
        wait_s: float,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """`wait_s`: how long the server may hold a file's lock."""
        self.folder = folder
        self.layout = layout
        self._wait_s = wait_s
        self._should_stop = should_stop

    def take(self, named: str, tokens_max: int) -> Written:
        """Read and remove the file that the server names, of at most `tokens_max` tokens.

        Raises TryAgainError if it is missing or not whole, CaptureMismatchError for a file that is not the
        run's, EngineError for states that are not finite or all zero.
        """
        name = self._own_name(named)
        with _opened(self.folder) as folder:
            try:
                self._wait_for_writer(folder, name)
                data = _read(folder, name, self.layout.file_bytes(tokens_max))
            finally:
                _remove(folder, name)
        return self._content(name, data)

    def sweep(self, older_than_s: float = 0.0) -> int:
        """Remove the server's files that nobody waits for any more; their number."""
        removed, before = 0, time.time() - older_than_s
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(self.folder) as entries:
            for entry in entries:
                if not entry.name.endswith((SUFFIX, SUFFIX + LOCK)):
                    continue
                with suppress(FileNotFoundError):
                    facts = entry.stat(follow_symlinks=False)
                    if facts.st_uid == os.geteuid() and facts.st_mtime <= before:
                        Path(entry.path).unlink()
                        removed += 1
        return removed

    def _own_name(self, named: str) -> str:
        """The file's name, if the path lies directly in the folder."""
        folder, name = os.path.split(named)
        inside = "\0" not in named and os.path.realpath(folder or ".") == os.path.realpath(self.folder)
        if not inside or not name.endswith(SUFFIX) or name.startswith("."):
            raise _foreign(f"The server named {named[:200]!r}, which is not a file of {self.folder}")
        return name

    def _wait_for_writer(self, folder: int, name: str) -> None:
        """Wait until the server has ended its write. Raises TryAgainError."""
        deadline = time.monotonic() + self._wait_s
        try:
            lock = _open_own(folder, name + LOCK)
        except FileNotFoundError as error:
            raise TryAgainError(f"{name} has no lock beside it") from error
        try:
            while True:
                with suppress(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    return
                if self._should_stop():
                    raise stopped()
                if time.monotonic() > deadline:
                    raise TryAgainError(f"the server holds the lock of {name} for {self._wait_s:g} s")
                time.sleep(LOOK_S)
        finally:
            os.close(lock)

    def _content(self, name: str, data: bytes) -> Written:
        try:
            tensors = load(data)
        except (SafetensorError, ValueError, TypeError, KeyError) as error:
            raise TryAgainError(f"{name} is not whole ({str(error)[:200]})") from error
        layout, states, tokens = self.layout, tensors.get(STATES), tensors.get(TOKENS)
        if states is None or tokens is None or tokens.dtype != torch.int64 or tokens.dim() != 1:
            raise _foreign(f"{name} holds {sorted(tensors)[:8]} instead of {STATES} and {TOKENS}")
        wanted = (len(tokens), layout.num_layers, layout.hidden_size)
        if tuple(states.shape) != wanted or states.dtype != layout.dtype:
            raise _foreign(
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


def is_sound(states: torch.Tensor) -> bool:
    """Whether every row of states [T, layers, H] is finite and none is all zeros, which no layer gives."""
    if not states.numel():
        return False
    least, greatest = torch.aminmax(states, dim=-1)
    finite = torch.isfinite(least).all() & torch.isfinite(greatest).all()
    return bool(finite & ((least != 0) | (greatest != 0)).all())


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    """The folder's descriptor. Raises CaptureMismatchError if others may change it."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise TryAgainError(f"{folder} cannot be opened ({error.strerror})") from error
    try:
        facts = os.fstat(fd)
        if facts.st_uid != os.geteuid() or facts.st_mode & OTHERS_MAY_WRITE:
            raise _foreign(f"Other users may write to {folder}")
        yield fd
    finally:
        os.close(fd)


def _open_own(folder: int, name: str) -> int:
    """Open a regular file of this user. Raises FileNotFoundError, CaptureMismatchError."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        fd = os.open(name, flags, dir_fd=folder)
    except FileNotFoundError:
        raise
    except OSError as error:
        what = "a link" if error.errno == errno.ELOOP else error.strerror
        raise _foreign(f"{name} is not a regular file ({what})") from error
    facts = os.fstat(fd)
    if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid():
        os.close(fd)
        raise _foreign(f"{name} is not a regular file of user {os.geteuid()}")
    return fd


def _read(folder: int, name: str, limit: int) -> bytes:
    try:
        fd = _open_own(folder, name)
    except FileNotFoundError as error:
        raise TryAgainError(f"the server ended its write of {name}, and there is no file") from error
    with os.fdopen(fd, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise _foreign(f"{name} has more than the {limit} bytes of its tokens")
    return data


def _remove(folder: int, name: str) -> None:
    for each in (name, name + LOCK):
        with suppress(OSError):
            os.unlink(each, dir_fd=folder)


def _foreign(what: str) -> CaptureMismatchError:
    return CaptureMismatchError(
        f"{what}.",
        why="Only files that the run's own server wrote, in the run's layout, may be trained on.",
        next="start the server as `paceline engine vllm RUN.yaml` prints, as the same user.",
    )
