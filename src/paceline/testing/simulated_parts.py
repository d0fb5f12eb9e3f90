"""Ledger, features and checkpoints as actors of a simulation see them: every change is a scheduling point.

Each actor has its own view. Before a change the actor yields to the scheduler (`Way.point`), which may let
others run first, or never return. A dead actor's calls do nothing. The views also hold the oracle's immediate
rules: no change by a replaced process, no features freed before a checkpoint covers them, no recorded
checkpoint deleted, no head off the expected trajectory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Executor, Future
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from paceline.errors import CheckpointDamagedError, UnknownResultError
from paceline.features.store import Sealed, Usage, Written
from paceline.ledger.records import CheckpointRecord, State
from paceline.testing.simulated_places import Place, SimulatedStore
from paceline.training.checkpoint import Checkpoint, epoch_of, identity_of
from paceline.types import SampleRef


class ViolationError(AssertionError):
    """The promise was broken."""


class Way(Protocol):
    """What an actor asks of the scheduler."""

    def point(self, name: str) -> None:
        """Give way. Does not return if the actor is killed here."""

    def wait(self, seen_lsn: int) -> None:
        """Sleep until the ledger's number differs, or nobody else can run."""

    def loses_result(self) -> bool:
        """Whether the answer to the call just made gets lost."""

    def count(self, name: str) -> None: ...

    def took(self, role: str) -> None:
        """The actor that runs now has acquired the role."""

    @property
    def epochs(self) -> dict[str, int]: ...


FINAL = {  # on the disk on return, see ledger/stores/sqlite/database.py
    *("acquire", "head", "fall_back", "quarantine", "retire", "end_stream"),
}
CHANGES = FINAL | {
    *("extend", "lease", "give_back", "reserve", "commit", "report_lost", "swept", "plan"),
    *("release", "set_facts"),
}
Call = tuple[str, tuple[Any, ...], dict[str, Any]]


class SimulatedDisk:
    """The one ledger of a simulated run, with what a power loss may take back (durability "head")."""

    def __init__(self, place: Place, *, may_lose_power: bool) -> None:
        self._place = place
        self.ledger = place.open()
        self._may_lose_power = may_lose_power
        self._synced = self._copy()
        self._since: list[Call] = []

    def close(self) -> None:
        self.ledger.close()

    def _copy(self) -> Any:
        return self._place.copy(self.ledger) if self._may_lose_power else None

    def changed(self, call: Call) -> None:
        if call[0] in FINAL or call[2].get("settle") or call[2].get("failure"):
            self._since, self._synced = [], self._copy()
        elif self._may_lose_power:
            self._since.append(call)

    def lose_power(self, keep: float) -> None:
        """Back to a state between the last final call and now."""
        self.ledger.close()
        self._place.put_back(self._synced)
        self.ledger = self._place.open()
        kept = self._since[: round(keep * len(self._since))]
        self._since = []
        for name, args, kwargs in kept:
            getattr(self.ledger, name)(*args, **kwargs)
            self._since.append((name, args, kwargs))


class SlowDisk(Executor):
    """Does the work at some later look at it, and says so at a look after that."""

    def __init__(self, patience: Callable[[], int]) -> None:
        """`patience`: how many looks to let pass, drawn twice for each piece of work."""
        self._patience = patience

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return _Slow(partial(work, *args, **kwargs), self._patience(), self._patience())


class _Slow(Future[Any]):
    def __init__(self, work: Callable[[], Any], until_run: int, until_told: int) -> None:
        super().__init__()
        self._work: Callable[[], Any] | None = work
        self._until_run = until_run
        self._until_told = until_told

    def done(self) -> bool:
        self._until_run -= 1
        if self._until_run < 0:
            self._run()
            self._until_told -= 1
        return self._until_told < 0

    def result(self, timeout: float | None = None) -> Any:
        self._run()
        return super().result()

    def _run(self) -> None:
        if self._work is not None:
            work, self._work = self._work, None
            self.set_result(work())


class SimulatedLedger:
    """One actor's view of the ledger."""

    durable = True

    def __init__(
        self, disk: SimulatedDisk, way: Way, may_be_head: Callable[[CheckpointRecord], None]
    ) -> None:
        self._disk = disk
        self._way = way
        self._may_be_head = may_be_head
        self._role = ""

    def wait(self, seen_lsn: int, timeout_s: float) -> int:
        self._way.wait(seen_lsn)
        return self._disk.ledger.lsn()

    def __getattr__(self, name: str) -> Any:
        if name not in CHANGES:
            return getattr(self._disk.ledger, name)

        def change(*args: Any, **kwargs: Any) -> Any:
            self._way.point(name)
            before = self._disk.ledger.lsn()
            result = getattr(self._disk.ledger, name)(*args, **kwargs)
            if self._disk.ledger.lsn() != before:
                self._judge(name, args)
                self._disk.changed((name, args, kwargs))
            if name != "acquire" and args[0] is not None and self._way.loses_result():
                raise UnknownResultError("The answer got lost.", next="repeat the call.")
            return result

        return change

    def _judge(self, name: str, args: tuple[Any, ...]) -> None:
        epochs = self._way.epochs
        if name == "acquire":
            self._role = args[0]
            self._way.took(self._role)
            return
        fence = args[0]
        if fence is None and self._role:
            raise ViolationError(f"{name} by a {self._role} without its fence")
        if fence is not None and fence.epoch != epochs[fence.role]:
            raise ViolationError(
                f"{name} by epoch {fence.epoch} of the {fence.role}, but {epochs[fence.role]} rules"
            )
        if name == "head":
            self._may_be_head(args[1])


class SimulatedFeatures:
    """One actor's view of the feature store; nothing may be freed that a step may need again."""

    def __init__(self, store: SimulatedStore, disk: SimulatedDisk, way: Way) -> None:
        self._features = store
        self._disk = disk
        self._way = way

    def put(self, sample_id: str, tensors: Mapping[str, Any], *, generation: int = 0) -> Sealed:
        self._way.point("put")
        return self._features.put(sample_id, tensors, generation=generation)

    def get(self, ref: SampleRef) -> dict[str, Any]:
        return self._features.get(ref)

    def free(self, written: Iterable[Written]) -> None:
        for one in written:
            self._way.point("free")
            before = self._features.generations()
            self._features.free([one])
            self._judge(before)

    def _judge(self, before: Mapping[str, int]) -> None:
        for sample_id in before.keys() - self._features.generations().keys():
            if self._is_needed(sample_id, before[sample_id]):
                raise ViolationError(f"the features of {sample_id} were freed before a checkpoint covers it")

    def _is_needed(self, sample_id: str, generation: int) -> bool:
        """By the rows alone, not by the ledger's own idea of what is covered."""
        ledger = self._disk.ledger
        sample = ledger.find([sample_id]).get(sample_id)
        if sample is None or sample.ref.generation != generation or not sample.resident:
            return False
        head = ledger.snapshot().head
        covered = head.step if head is not None else -1
        if sample.state == State.QUARANTINED:
            return sample.step is not None and sample.step > covered
        return sample.step is None or sample.step > covered

    def written(self) -> list[Written] | None:
        self._way.point("list")
        return self._features.written()

    def usage(self) -> Usage:
        return self._features.usage()

    def close(self) -> None:
        """Nothing to detach from."""

    def destroy(self) -> None:
        self._features.destroy()


class SimulatedFolders:
    """The checkpoint folder itself: what was renamed into place is there, whatever happens."""

    def __init__(self) -> None:
        self.held: dict[str, tuple[CheckpointRecord, Checkpoint]] = {}
        self.damaged: set[str] = set()
        self.recorded: set[str] = set()  # ever
        self.made = 0


class SimulatedFolder:
    """One actor's view of it."""

    def __init__(self, folders: SimulatedFolders, disk: SimulatedDisk, way: Way) -> None:
        self.folder = "checkpoints"
        self._folders = folders
        self._disk = disk
        self._way = way

    def write(self, checkpoint: Checkpoint) -> CheckpointRecord:
        self._way.point("write")
        checkpoint = replace(checkpoint, files=dict(checkpoint.files))
        folders = self._folders
        folders.made += 1
        name = f"step-{checkpoint.step:08d}-{checkpoint.epoch:06d}-{folders.made:08x}"
        content = json.dumps([repr(checkpoint), name]).encode()
        record = CheckpointRecord(
            checkpoint.step,
            name,
            hashlib.sha256(content).hexdigest(),
            checkpoint.chain,
            checkpoint.first_place,
        )
        folders.held[name] = record, checkpoint
        return record

    def read(self, record: CheckpointRecord, names: Collection[str] | None = None) -> Checkpoint:
        known = self._folders.held.get(record.name)
        if known is None or known[0] != record or record.name in self._folders.damaged:
            raise CheckpointDamagedError(f"{record.name} is damaged.", next="fall back.")
        return known[1]

    def unrecorded(self, records: Collection[CheckpointRecord]) -> list[tuple[CheckpointRecord, Checkpoint]]:
        known = {record.name for record in records} | self._folders.damaged
        found = [pair for name, pair in self._folders.held.items() if name not in known]
        return sorted(found, key=lambda pair: pair[0].step)

    def claim(self, record: CheckpointRecord, epoch: int) -> CheckpointRecord | None:
        self._way.point("claim")
        _, checkpoint = self._folders.held.pop(record.name, (None, None))
        if checkpoint is None:
            return None
        name = f"step-{record.step:08d}-{epoch:06d}-{identity_of(record.name)}"
        claimed = replace(record, name=name)
        self._folders.held[name] = claimed, checkpoint
        return claimed

    def sweep(self, keep: set[str], *, epoch: int | None = None) -> list[str]:
        self._way.point("sweep_checkpoints")
        swept = [n for n in self._folders.held if n not in keep and (epoch is None or epoch_of(n) <= epoch)]
        recorded = {record.name for record in self._disk.ledger.snapshot().checkpoints}
        for name in swept:
            if name in recorded:
                raise ViolationError(f"the recorded checkpoint {name} was deleted")
            del self._folders.held[name]
        if any(name not in self._folders.recorded for name in swept):
            self._way.count("orphan checkpoints swept")
        return swept
