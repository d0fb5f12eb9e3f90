"""The files of samples in a folder that several hosts share: one for each sample and generation.

A file is written under another name, closed, and renamed, so it appears whole or not at all. Its name follows
from the sample and the generation, and no generation is used twice. So no two processes ever write one file,
no process needs a lock, and none asks for a name before it may be there: a network filesystem's client has no
stale answer about it. Files of a thousand consecutive generations lie in one folder, which goes with the last
of them. Nothing here trusts a listing that may be old: files are freed by name, and a reader that misses one
looks again. No torch.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from paceline.crashpoints import reach
from paceline.features.ownership import ASIDE, BLOCK, SAMPLE_FILE, SEALED
from paceline.mounts import is_on_network, look_anew
from paceline.regular_files import open_regular

GENERATIONS_PER_BLOCK = 1000
KEY_DIGITS = 24  # of the digest of a sample's id in a name
STALE_TRIES = 5
LOOKS_S = (0.0, 0.1)  # pauses before the second and the third look for a file that is not there

T = TypeVar("T")


@dataclass(frozen=True)
class Found:
    """A file of the folder: of which sample (its key) and generation, and whether it has its own name yet."""

    path: Path
    generation: int
    key: str
    is_sealed: bool


class SampleFiles:
    def __init__(self, folder: Path, *, sleep: Callable[[float], None] = time.sleep) -> None:
        """The folder need not exist yet."""
        self.folder = folder
        self._sleep = sleep
        self._touched: set[int] = set()  # blocks of which this process has freed something
        self._lock = threading.Lock()
        self._syncs: bool | None = None

    # -- one file ------------------------------------------------------------------------------

    def write(self, sample_id: str, generation: int, fill: Callable[[int], None]) -> None:
        """Publish the file that `fill` writes to the descriptor that it is given. Raises OSError.

        On a network filesystem the file is on its server when it appears. If the bytes were freed while they
        were written, because the right to write them was revoked, nothing appears.
        """
        path, aside = self._paths(sample_id, generation)
        fd = self._create(aside)
        try:
            try:
                fill(fd)
                if self._is_on_network():
                    os.fsync(fd)  # else a full disk may show after the sample was committed
            finally:
                os.close(fd)  # some filesystems tell of a full disk only here
            reach("features.put.before_seal")
            with suppress(FileNotFoundError):  # freed
                _again(lambda: aside.rename(path))
        except OSError:
            with suppress(OSError):
                aside.unlink()
            raise

    def open(self, sample_id: str, generation: int) -> BinaryIO:
        """The file, for reading. Raises FileNotFoundError if it is not there at a third look; OSError."""
        path, _ = self._paths(sample_id, generation)
        for pause_s in LOOKS_S:
            with suppress(FileNotFoundError, NotADirectoryError):
                return _again(lambda: open_regular(path, os.O_NOFOLLOW))
            self._sleep(pause_s)
            look_anew(path.parent)
        return _again(lambda: open_regular(path, os.O_NOFOLLOW))

    def is_there(self, sample_id: str, generation: int) -> bool:
        return self._paths(sample_id, generation)[0].exists()

    def free(self, written: Iterable[tuple[str, int]]) -> None:
        """Remove the files of these samples and generations. Raises OSError.

        Generation 0: any. An empty id: any sample's file that has not its own name yet.
        """
        freed = list(written)
        for sample_id, generation in freed:
            if sample_id and generation:
                path, aside = self._paths(sample_id, generation)
                # Its writer may give it its name between the first two.
                any(_unlinked(one) for one in (path, aside, path))
            else:
                for found in self.list():
                    wanted = found.key == key_of(sample_id) if sample_id else not found.is_sealed
                    if wanted and generation in (0, found.generation):
                        _unlinked(found.path)
        with self._lock:
            self._touched |= {_block_of(generation) for _, generation in freed}
            self._remove_empty()

    # -- all of them ---------------------------------------------------------------------------

    def list(self, *, anew: bool = False) -> list[Found]:
        """What lies there, in the order of generations. `anew`: also what other hosts have just made."""
        return sorted(self._list(anew), key=lambda found: (found.generation, found.key, found.is_sealed))

    def _list(self, anew: bool) -> Iterator[Found]:
        if anew:
            look_anew(self.folder)
        for block in _names(self.folder):
            if not BLOCK.fullmatch(block):
                continue
            folder = self.folder / block
            if anew:
                look_anew(folder)
            for name in _names(folder):
                if SAMPLE_FILE.fullmatch(name):
                    generation, key = name.partition(".")[0].split("-")
                    yield Found(folder / name, int(generation), key, name.endswith(SEALED))

    def _paths(self, sample_id: str, generation: int) -> tuple[Path, Path]:
        """The file's own name, and the one that it has while it is written."""
        stem = self.folder / f"{_block_of(generation):08d}" / f"{generation}-{key_of(sample_id)}"
        return stem.with_suffix(SEALED), stem.with_suffix(ASIDE)

    def _create(self, aside: Path) -> int:
        """Raises FileNotFoundError if the store's folder is gone."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        for _ in range(STALE_TRIES):
            with suppress(FileNotFoundError):
                return _again(lambda: os.open(aside, flags, 0o600))
            aside.parent.mkdir(mode=0o700, exist_ok=True)  # it was never there, or went with its last file
        return os.open(aside, flags, 0o600)

    def _is_on_network(self) -> bool:
        if self._syncs is None:
            self._syncs = is_on_network(self.folder)
        return self._syncs

    def _remove_empty(self) -> None:
        """Remove folders of which all was freed; the newest one is still written to."""
        for block in sorted(self._touched)[:-1]:
            folder = self.folder / f"{block:08d}"
            with suppress(OSError):
                folder.rmdir()
            if not folder.exists():
                self._touched.discard(block)


def key_of(sample_id: str) -> str:
    """What stands for the sample in names."""
    return hashlib.sha256(sample_id.encode(errors="surrogatepass")).hexdigest()[:KEY_DIGITS]


def _block_of(generation: int) -> int:
    return generation // GENERATIONS_PER_BLOCK


def _names(folder: Path) -> list[str]:
    """[] if there is no such folder."""
    try:
        return _again(lambda: os.listdir(folder))  # noqa: PTH208 (often)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _unlinked(path: Path) -> bool:
    """Whether there was one."""
    try:
        _again(path.unlink)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return False
    return True


def _again(call: Callable[[], T]) -> T:
    """Repeat a call by path while its handle is stale: it was replaced on the server. Raises OSError."""
    for _ in range(STALE_TRIES):
        try:
            return call()
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
    raise FileNotFoundError(errno.ENOENT, "its handle stays stale: it was removed on the server")
