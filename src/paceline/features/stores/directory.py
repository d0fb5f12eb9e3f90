"""The feature store in a folder that several hosts share, on a network filesystem or a disk.

Writers (the producers of any host) and a reader (the consumer) share nothing but the folder: there is no
lock, no map and no count in it. The ledger gives every file its generation, and counts the bytes of all of
them when they are reserved. A listing, which may be old on a network filesystem, tells a producer at its
start what to free and what is lost (capture/upkeep.py), and decides nothing else. A file that is gone, cut
off, or not what its ref says is a miss, and its sample is captured again. Within a process any thread may
call. Features outlive processes and reboots; what a host had not written to its disk when its power failed is
such a miss.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from paceline.errors import StoreError
from paceline.features import codec
from paceline.features.ownership import make_store_id, remove, store_id
from paceline.features.sample_files import Found, SampleFiles, key_of
from paceline.features.settings import FeaturesSection
from paceline.features.store import Sealed, Usage, Written
from paceline.features.stores import sample_format
from paceline.features.stores.refusals import (
    corrupt,
    elsewhere,
    fails,
    missing,
    no_disk,
    over_budget,
    reader_may_not,
    replaced,
    stale,
    unmounted,
)
from paceline.regular_files import open_regular
from paceline.types import SampleRef

PATIENCE_S = 60.0  # with a disk that has no room: other users may give some, and the consumer frees
LOOK_S = 1.0
OWN_MAX = 4096  # samples of which a writer remembers the generation
FULL = (errno.ENOSPC, errno.EDQUOT)
NO_FILE = (errno.EINVAL, errno.EISDIR, errno.ELOOP)  # what open_regular says of a FIFO, a folder, a link


class DirectoryFeatureStore:
    def __init__(
        self,
        folder: Path,
        *,
        budget_bytes: int,
        owner: bool,
        patience_s: float = PATIENCE_S,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`budget_bytes`: as the ledger enforces it; what is put without a generation is counted here.

        `patience_s`: how long `put` waits for room on a full disk. A reader may open the store before a
        writer has created it, and finds nothing. Raises StoreError if the folder is another user's.
        """
        self._folder, self._budget_bytes = folder, budget_bytes
        self._owner, self._patience_s, self._sleep = owner, patience_s, sleep
        self._files = SampleFiles(folder, sleep=sleep)
        self._lock = threading.Lock()
        self._own: OrderedDict[str, int] = OrderedDict()  # what this writer put last of a sample
        self._read: dict[Path, str] = {}  # sample ids of files that `written` has looked into
        self._counter = 0
        try:
            self._id = make_store_id(folder) if owner else store_id(folder)
        except OSError as error:
            raise fails(folder, error) from error

    @classmethod
    def of_run(
        cls, section: FeaturesSection, folder: Path, *, owner: bool, writer: int = 0
    ) -> DirectoryFeatureStore:
        """`writer` decides nothing: no two writers have one generation."""
        del writer
        return cls(folder, budget_bytes=section.budget_mib << 20, owner=owner)

    @property
    def uri(self) -> str:
        """It does not name the folder, which hosts may have mounted in different places."""
        return f"directory://{self._id}"

    def put(self, sample_id: str, tensors: Mapping[str, Any], *, generation: int = 0) -> Sealed:
        self._refuse_reader("put")
        before = self._newest(sample_id) if generation == 0 else self._own.get(sample_id, 0)
        if before and generation in (0, before) and (sealed := self._sealed_before(sample_id, before)):
            return sealed
        if generation and generation < before:
            raise stale(sample_id, generation, before)
        layout = codec.layout_of_tensors(sample_id, tensors)
        number = generation or self._next_generation()
        size = sample_format.file_bytes(sample_id, layout, number)
        if before:
            self.free([(sample_id, before)])
        if not generation and self.usage().resident_bytes + size > self._budget_bytes:
            raise over_budget(sample_id, size, self._folder, self._budget_bytes)
        digest = self._write(sample_id, layout, number, tensors, size)
        with self._lock:
            self._own[sample_id] = number
            self._own.move_to_end(sample_id)
            while len(self._own) > OWN_MAX:
                self._own.popitem(last=False)
        return self._sealed(layout, number, size, digest)

    def get(self, ref: SampleRef) -> dict[str, Any]:
        if ref.feature_store_uri != self.uri:
            self._id = self._identity()  # a writer may have made it since
            if ref.feature_store_uri != self.uri:
                raise elsewhere(ref, f"{self.uri if self._id else 'no store'} in {self._folder}")
        layout = codec.layout_of_specs(ref.sample_id, ref.feature_specs)
        number = next(iter(ref.feature_keys.values()), "").partition("/")[0]
        if not number.isdecimal() or dict(ref.feature_keys) != _keys(layout, int(number)):
            raise corrupt(ref, "its keys are not those of its tensors")
        digest = str(ref.metadata.get("digest"))
        header = sample_format.header(ref.sample_id, layout, int(number), digest)
        try:
            with self._files.open(ref.sample_id, int(number)) as file:
                if file.read(len(header)) != header:
                    raise corrupt(ref, "the file's header tells of other tensors or another digest")
                tensors, found = sample_format.read(file, ref.sample_id, layout, len(header))
        except FileNotFoundError as error:
            raise self._not_here(ref, "the file was freed, or never written") from error
        except EOFError as error:
            raise corrupt(ref, "the file is cut off") from error
        except OSError as error:
            if error.errno == errno.ESTALE:
                raise self._not_here(ref, "the file was removed on its server") from error
            if error.errno in NO_FILE:
                raise corrupt(ref, f"something else lies in its place: {error.strerror}") from error
            raise fails(self._folder, error) from error
        if found != digest:
            raise corrupt(ref, f"the bytes have digest {found}")
        return tensors

    def free(self, written: Iterable[Written]) -> None:
        wanted = list(written)
        with self._lock:
            for sample_id, generation in wanted:
                if generation in (0, self._own.get(sample_id)):
                    self._own.pop(sample_id, None)
        try:
            self._files.free(wanted)
        except OSError as error:
            raise fails(self._folder, error) from error

    def written(self) -> list[Written]:
        """Whole files with the ids in their headers; of files that are being written, no id.

        A file that is cut off is not among them, so the ledger learns that its sample is lost.
        """
        self._refuse_reader("list samples")
        found, known = [], {}
        try:
            for file in self._files.list(anew=True):
                if not file.is_sealed:
                    found.append(("", file.generation))
                elif sample_id := self._read.get(file.path) or _id_in(file):
                    known[file.path] = sample_id
                    found.append((sample_id, file.generation))
        except OSError as error:
            raise fails(self._folder, error) from error
        if self._identity() != self._id:  # what is not listed would be lost
            raise replaced(self._folder)
        self._read = known
        return found

    def usage(self) -> Usage:
        """By this host's look at the folder."""
        sizes = []
        for file in self._files.list():
            try:
                sizes.append(file.path.stat().st_size)
            except OSError:
                continue  # freed since
        return Usage(sum(sizes), len(sizes), self._budget_bytes, is_current=False)

    def close(self) -> None:
        """Nothing to detach from."""

    def _not_here(self, ref: SampleRef, because: str) -> StoreError:
        """A miss only if the store is here: without its mount every sample would be one, again and again."""
        now = self._identity()
        if now == self._id:
            return missing(ref, because)
        return elsewhere(ref, f"another store in {self._folder}") if now else unmounted(self._folder)

    def _identity(self) -> str:
        """Of the store that is here now; "" if there is none. Raises StoreError."""
        try:
            return store_id(self._folder)
        except OSError as error:
            raise fails(self._folder, error) from error

    def destroy(self) -> None:
        try:
            remove(self._folder)
        except OSError as error:
            raise fails(self._folder, error) from error

    # -- a writer ------------------------------------------------------------------------------

    def _write(
        self,
        sample_id: str,
        layout: codec.Layout,
        generation: int,
        tensors: Mapping[str, Any],
        size: int,
    ) -> str:
        """Write the file, and wait for room if the disk is full. Raises StoreFullError, StoreError."""
        digests: list[str] = []

        def fill(fd: int) -> None:
            digests.append(sample_format.write(fd, sample_id, layout, generation, tensors))

        waited_s = 0.0
        while True:
            try:
                self._files.write(sample_id, generation, fill)
            except OSError as error:
                if isinstance(error, FileNotFoundError) and store_id(self._folder) != self._id:
                    raise replaced(self._folder) from error
                if error.errno not in FULL:
                    raise fails(self._folder, error) from error
                if waited_s >= self._patience_s:
                    raise no_disk(self._folder, size, error, waited_s) from error
                self._sleep(LOOK_S)
                waited_s += LOOK_S
            else:
                return digests[-1]

    def _next_generation(self) -> int:
        with self._lock:
            self._counter = max(self._counter, *(file.generation for file in self._files.list()), 0) + 1
            return self._counter

    def _newest(self, sample_id: str) -> int:
        """The newest generation of the sample that lies here; 0 if there is none."""
        key = key_of(sample_id)
        return max((f.generation for f in self._files.list() if f.key == key and f.is_sealed), default=0)

    def _sealed_before(self, sample_id: str, generation: int) -> Sealed | None:
        """What was answered when the file was written; None if it is gone or cut off."""
        try:
            with self._files.open(sample_id, generation) as file:
                _, _, digest, layout = sample_format.read_header(file)
        except (OSError, ValueError):
            return None
        size = sample_format.file_bytes(sample_id, layout, generation)
        return self._sealed(layout, generation, size, digest)

    def _sealed(self, layout: codec.Layout, generation: int, size: int, digest: str) -> Sealed:
        return Sealed(self.uri, _keys(layout, generation), dict(layout.specs), size, digest)

    def _refuse_reader(self, verb: str) -> None:
        if not self._owner:
            raise reader_may_not(verb, self._folder)


def _keys(layout: codec.Layout, generation: int) -> dict[str, str]:
    """Each tensor's key, `generation/name`."""
    return {name: f"{generation}/{name}" for name in layout.specs}


def _id_in(found: Found) -> str:
    """The sample id in a whole file's header; "" if it is gone, cut off or not what its name says.

    Raises OSError if that cannot be known: the sample may be sound.
    """
    try:
        with open_regular(found.path, os.O_NOFOLLOW) as file:
            sample_id, generation, *_ = sample_format.read_header(file)
    except ValueError:
        return ""
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE, *NO_FILE):
            return ""
        raise
    return sample_id if (key_of(sample_id), generation) == (found.key, found.generation) else ""
