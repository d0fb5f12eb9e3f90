"""The feature store in the memory of many hosts: one object for each sample, over Mooncake.

The ledger gives every object its generation, which is in the key, and counts the bytes of all of them when
they are reserved; every object is pinned, so a master below its capacity evicts none. Objects are a cache
all the same: they go with the process in whose memory they lie, and a restarted master knows none. Whatever
is not there, or not what its ref says, is a miss, and its sample is captured again. A master that is away is
waited for. Within a process any thread may call.

While a producer is at the master, it keeps an object there that says so. A reader that misses what was
captured again and again, and never sees that object, asks the wrong master, and says so.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paceline.crashpoints import reach
from paceline.errors import FeatureCorruptError, FeatureMissingError, StoreError
from paceline.features import codec
from paceline.features.ownership import remove
from paceline.features.sample_files import key_of
from paceline.features.settings import MooncakeSection
from paceline.features.store import Sealed, Usage, Written
from paceline.features.stores.mooncake.link import MARK, Link, connect
from paceline.features.stores.mooncake.refusals import forgotten, not_this_master
from paceline.features.stores.mooncake.staging import Buffer, Staging
from paceline.features.stores.refusals import corrupt, elsewhere, over_budget, reader_may_not, stale
from paceline.types import SampleRef

OWN_MAX = 4096  # samples of which a writer remembers what it sealed
LATER_MAX = 4096  # keys that could not be removed; what is forgotten goes when the store is destroyed
MARK_BYTES = 64
TELL_S = 1.0  # between two looks whether the master knows this producer
IN_FLIGHT = 4  # samples that `get_many` asks for at a time
BLIND_MAX = 5  # captures of one sample that a reader misses at a master without a producer

Sample = dict[str, Any]
Miss = FeatureMissingError | FeatureCorruptError


_Place = tuple[int, memoryview]  # an address, and the bytes there


@dataclass(frozen=True)
class _Wanted:
    """The ref in this place of a call, and its object."""

    number: int
    ref: SampleRef
    layout: codec.Layout
    key: str

    @property
    def num_bytes(self) -> int:
        return _object_bytes(self.layout)

    @property
    def room(self) -> int:
        """Bytes of its place in a buffer."""
        return -(-self.num_bytes // codec.ALIGNMENT_BYTES) * codec.ALIGNMENT_BYTES


class MooncakeFeatureStore:
    def __init__(
        self, link: Link, store: str, *, budget_bytes: int, owner: bool, folder: Path | None = None
    ) -> None:
        """`store`: what all keys of the run begin with. `budget_bytes`: as the ledger enforces it; what is
        put without a generation is counted here. `folder`: of this host; it goes when the store is destroyed.
        """
        self._link, self._store, self._budget_bytes = link, store, budget_bytes
        self._owner, self._folder = owner, folder
        self._staging = Staging(link)
        self._lock = threading.Lock()
        self._own: OrderedDict[str, tuple[int, Sealed]] = OrderedDict()  # what this writer put last
        self._counter = 0
        self._later: dict[str, None] = {}  # keys that were being written when they were to be removed
        self._blind: dict[str, set[str]] = {}  # of samples: the keys that were missed without a producer
        self._end = threading.Event()
        self._teller: threading.Thread | None = None
        self._mark = Buffer(link, MARK_BYTES) if owner else None

    @classmethod
    def of_run(
        cls, section: MooncakeSection, folder: Path, *, owner: bool, writer: int = 0
    ) -> MooncakeFeatureStore:
        """`writer` decides nothing: no two writers have one generation."""
        del writer
        link = connect(section, section.given_mib if owner else 0)
        store = cls(link, folder.name, budget_bytes=section.budget_mib << 20, owner=owner, folder=folder)
        if owner:
            store._teller = threading.Thread(
                target=store._tell_until_closed, name="paceline-mooncake", daemon=True
            )
            store._teller.start()
        return store

    @property
    def uri(self) -> str:
        """It does not name the master, whose address may change."""
        return f"mooncake://{self._store}"

    # -- a writer ------------------------------------------------------------------------------

    def put(self, sample_id: str, tensors: Mapping[str, Any], *, generation: int = 0) -> Sealed:
        self._refuse_reader("put")
        with self._lock:
            before, sealed = self._own.get(sample_id, (0, None))
        if sealed and generation in (0, before) and self._link.exist([self._key(sample_id, before)])[0]:
            return sealed
        if generation and generation < before:
            raise stale(sample_id, generation, before)
        layout = codec.layout_of_tensors(sample_id, tensors)
        if before:
            self.free([(sample_id, before)])
        size = _object_bytes(layout)
        if not generation and self.usage().resident_bytes + size > self._budget_bytes:
            raise over_budget(sample_id, size, self.uri, self._budget_bytes)
        number = generation or self._next_generation()
        description = codec.describe(sample_id, layout)
        with self._staging.borrow(size, pinned=_is_on_gpu(tensors)) as buffer:
            digest = self._staging.fill(buffer, layout, description, tensors)
            reach("features.put.before_seal")
            self._link.put(self._key(sample_id, number), buffer.address, size)
        sealed = Sealed(self.uri, _keys(layout, number), dict(layout.specs), size, digest)
        with self._lock:
            self._own[sample_id] = number, sealed
            self._own.move_to_end(sample_id)
            while len(self._own) > OWN_MAX:
                self._own.popitem(last=False)
        return sealed

    def _next_generation(self) -> int:
        with self._lock:
            self._counter = max(self._counter, *(number for number, _ in self._own.values()), 0) + 1
            return self._counter

    def tell(self) -> None:
        """Let the master know that a producer of this run is there, and remove what could not be removed."""
        if self._mark is not None:
            self._link.try_to_mark(f"{self._store}/{MARK}", self._mark.address, MARK_BYTES)
        self._remove_late()

    def _tell_until_closed(self) -> None:
        while True:
            with suppress(StoreError):
                self.tell()
            if self._end.wait(TELL_S):
                return

    # -- a reader ------------------------------------------------------------------------------

    def get(self, ref: SampleRef) -> Sample:
        layout, key = self._checked(ref)
        size = _object_bytes(layout)
        with self._staging.borrow(size) as buffer:
            [code] = self._link.get([key], [buffer.address], [size])
            self._refuse_miss(ref, key, size, code)
            tensors, digest = codec.read(layout, codec.describe(ref.sample_id, layout), buffer.content)
        _refuse_other_bytes(ref, digest)
        return tensors

    def buffer(self, num_bytes: int) -> Buffer:
        """Memory for `get_many`. Raises StoreError."""
        return Buffer(self._link, num_bytes)

    def get_many(self, refs: Sequence[SampleRef], *, into: Buffer | None = None) -> list[Sample | Miss]:
        """The samples, some of them on their way at a time; in the place of one that cannot be read, why.

        `into`: they lie in this memory, one after another, until it is used again, and nothing is copied;
        None: each has memory of its own. Raises ValueError if they do not fit in.
        """
        found: dict[int, Sample | Miss] = {}
        wanted: list[_Wanted] = []
        for number, ref in enumerate(refs):
            try:
                wanted.append(_Wanted(number, ref, *self._checked(ref)))
            except (FeatureMissingError, FeatureCorruptError) as error:
                found[number] = error
        if into is not None and (end := sum(one.room for one in wanted)) > into.num_bytes:
            raise ValueError(f"{len(refs)} samples of {end} bytes do not fit into {into.num_bytes}")
        parts = [wanted[at : at + IN_FLIGHT] for at in range(0, len(wanted), IN_FLIGHT)]
        with ExitStack() as held:
            places = _one_after_another(into, parts) if into is not None else self._in_turns(held, parts)
            ahead = held.enter_context(ThreadPoolExecutor(1, thread_name_prefix="paceline-mooncake"))
            coming = [ahead.submit(self._fetch, *one) for one in zip(parts[:1], places, strict=False)]
            for number, part in enumerate(parts):
                codes = coming[number].result()
                if number + 1 < len(parts):  # on its way while this part is verified
                    coming.append(ahead.submit(self._fetch, parts[number + 1], places[number + 1]))
                for one, code, (_, payload) in zip(part, codes, places[number], strict=True):
                    found[one.number] = self._verified(one, payload, code, copies=into is None)
        return [found[number] for number in range(len(refs))]

    def _in_turns(self, held: ExitStack, parts: Sequence[Sequence[_Wanted]]) -> list[list[_Place]]:
        """Places in two buffers in turns: while one part is copied out, the next fills the other one."""
        most = max((sum(one.room for one in part) for part in parts), default=0)
        buffers = [held.enter_context(self._staging.borrow(most)) for _ in parts[:2]]
        return [_one_after_another(buffers[n % 2], [part])[0] for n, part in enumerate(parts)]

    def _fetch(self, part: Sequence[_Wanted], places: Sequence[_Place]) -> list[int]:
        return self._link.get(
            [one.key for one in part], [address for address, _ in places], [one.num_bytes for one in part]
        )

    def _verified(self, one: _Wanted, payload: memoryview, code: int, *, copies: bool) -> Sample | Miss:
        """The sample in `payload`, if it is what the ref says."""
        description = codec.describe(one.ref.sample_id, one.layout)
        try:
            self._refuse_miss(one.ref, one.key, one.num_bytes, code)
            if copies:
                tensors, digest = codec.read(one.layout, description, payload)
            else:
                tensors = codec.views(one.layout, payload)
                digest = codec.digest_of(one.layout, description, payload)
            _refuse_other_bytes(one.ref, digest)
        except (FeatureMissingError, FeatureCorruptError) as error:
            return error
        return tensors

    def _checked(self, ref: SampleRef) -> tuple[codec.Layout, str]:
        """The ref's layout and the object's key. Raises FeatureMissingError, FeatureCorruptError."""
        if ref.feature_store_uri != self.uri:
            raise elsewhere(ref, self.uri)
        layout = codec.layout_of_specs(ref.sample_id, ref.feature_specs)
        number = next(iter(ref.feature_keys.values()), "").partition("/")[0]
        if not number.isdecimal() or dict(ref.feature_keys) != _keys(layout, int(number)):
            raise corrupt(ref, "its keys are not those of its tensors")
        return layout, self._key(ref.sample_id, int(number))

    def _refuse_miss(self, ref: SampleRef, key: str, size: int, code: int) -> None:
        if code == size:
            self._blind.clear()
        elif code >= 0:
            raise corrupt(ref, f"the object has {code} bytes instead of {size}")
        else:
            self._look_for_producers(ref, key)
            raise forgotten(ref, key, code)

    def _look_for_producers(self, ref: SampleRef, key: str) -> None:
        """Raise StoreError if the sample was captured often enough, and always at another master."""
        if self._link.exist([f"{self._store}/{MARK}"])[0]:
            self._blind.clear()
            return
        missed = self._blind.setdefault(ref.sample_id, set())
        missed.add(key)
        if len(missed) >= BLIND_MAX:
            raise not_this_master(self._link.master, ref.sample_id, len(missed))

    # -- both ----------------------------------------------------------------------------------

    def free(self, written: Iterable[Written]) -> None:
        wanted = list(written)
        with self._lock:
            for sample_id, generation in wanted:
                if generation in (0, self._own.get(sample_id, (0,))[0]):
                    self._own.pop(sample_id, None)
        named = [self._key(*one) for one in wanted if all(one)]
        later = self._link.remove(named) if named else []
        self._remove_late()
        with self._lock:
            self._later |= dict.fromkeys(later)
            for key in list(self._later)[:-LATER_MAX]:
                del self._later[key]
        for sample_id, generation in wanted:
            if not (sample_id and generation):
                number = str(generation) if generation else "[0-9]+"
                self._link.remove_like(f"^{self._begin}{number}-{key_of(sample_id) if sample_id else ''}")

    def _remove_late(self) -> None:
        """Try once to remove what could not be removed before. A reader has no thread that does."""
        with self._lock:
            later = list(self._later)
        if later:
            left = set(self._link.try_to_remove(later))
            with self._lock:
                for key in later:
                    if key not in left:
                        self._later.pop(key, None)

    def written(self) -> None:
        """Mooncake's client does not list; a loss is noticed when the sample is read."""

    def usage(self) -> Usage:
        """Of what this process has put and not freed, as far as it remembers."""
        with self._lock:
            sizes = [sealed.num_bytes for _, sealed in self._own.values()]
        return Usage(sum(sizes), len(sizes), self._budget_bytes, is_current=False)

    def close(self) -> None:
        """What lies in this process's memory goes with it."""
        self._end_telling()
        with suppress(StoreError):  # it was closed before
            self._remove_late()
        self._staging.close()
        self._link.close()

    def destroy(self) -> None:
        self._end_telling()
        with self._lock:
            self._own.clear()
        self._link.remove_like(f"^{self._begin}")
        self._remove_late()
        if self._folder is not None:
            remove(self._folder)

    def _end_telling(self) -> None:
        self._end.set()
        if self._teller is not None:
            self._teller.join()

    @property
    def _begin(self) -> str:
        return f"{self._store.replace('.', '[.]')}/"

    def _key(self, sample_id: str, generation: int) -> str:
        return f"{self._store}/{generation}-{key_of(sample_id)}"

    def _refuse_reader(self, verb: str) -> None:
        if not self._owner:
            raise reader_may_not(verb, self.uri)


def _keys(layout: codec.Layout, generation: int) -> dict[str, str]:
    """Each tensor's key, `generation/name`."""
    return {name: f"{generation}/{name}" for name in layout.specs}


def _one_after_another(buffer: Buffer, parts: Sequence[Sequence[_Wanted]]) -> list[list[_Place]]:
    places, at = list[list[_Place]](), 0
    for part in parts:
        places.append([])
        for one in part:
            places[-1].append((buffer.address + at, buffer.content[at : at + one.num_bytes]))
            at += one.room
    return places


def _object_bytes(layout: codec.Layout) -> int:
    return max(1, layout.num_bytes)  # Mooncake stores no object of no bytes, and says that it did


def _is_on_gpu(tensors: Mapping[str, Any]) -> bool:
    return any(tensor.is_cuda for tensor in tensors.values())


def _refuse_other_bytes(ref: SampleRef, digest: str) -> None:
    if digest != ref.metadata.get("digest"):
        raise corrupt(ref, f"the bytes have digest {digest}")
