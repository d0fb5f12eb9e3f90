"""The checker's own decoders of ledger, archived steps and slots.

Formats: ledger/stores/sqlite/schema.sql, features/stores/slots.py. The ledger is opened read-only and read
in one transaction, so it may belong to a live run; damage is reported, not raised. Samples and plans are read
row by row and the archive one chunk at a time, so a long history needs no more memory than a short one.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import struct
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import apsw

from paceline.fsck.files import open_file, refuse_what_is_no_database
from paceline.fsck.report import Report

APPLICATION_ID, SCHEMA = 0x50414345, 1
HEADER_BYTES, TEXT_AT = 4096, 128
MAGIC, SEALED = int.from_bytes(b"PACESLOT", "little"), 0x5345414C45442E2E
ALL_BITS = (1 << 64) - 1
BLOCK_BYTES_MAX = 1 << 28  # of the archive, unpacked
UNKNOWN_PLACE = -1  # the place of a planned sample that was never committed


@dataclass(slots=True)
class Sample:
    """A committed sample that has a row."""

    place: int
    sample_id: str
    ordinal: int | None
    state: str  # present | lost | released | quarantined
    resident: bool
    num_bytes: int
    generation: int
    acked: int  # 0 no, 1 provisionally, 2 durably
    step: int | None
    reason: str
    ref: str

    @property
    def durable(self) -> bool:
        return self.acked == 2

    @property
    def ack_step(self) -> int | None:
        return self.step if self.acked else None


class Samples:
    """The committed samples that have rows, by place; read anew whenever they are asked for."""

    _SELECT = (
        "SELECT place, sample_id, ordinal, state, resident, bytes, generation, acked, step, reason, ref "
        "FROM sample "
    )

    def __init__(self, db: apsw.Connection) -> None:
        self._db = db

    def __len__(self) -> int:
        [(count,)] = self._db.execute("SELECT count(*) FROM sample")
        return int(count)

    def get(self, sample_id: str) -> Sample | None:
        rows = self._db.execute(f"{self._SELECT}WHERE sample_id = ?", (sample_id,))
        return next(map(_sample, rows), None)

    def values(self) -> Iterator[Sample]:
        return map(_sample, self._db.execute(f"{self._SELECT}ORDER BY place"))


def _sample(row: Any) -> Sample:
    sample = Sample(*row)
    sample.resident = bool(sample.resident)
    return sample


@dataclass(slots=True)
class Visit:
    """One sample in a step; `finished`: this is its last visit, according to the ledger."""

    place: int
    sample_id: str
    finished: bool


@dataclass(slots=True)
class Step:
    step: int
    rev: int
    visits: list[Visit]
    archived: bool

    @property
    def ids(self) -> list[str]:
        return [visit.sample_id for visit in self.visits]

    @property
    def digest(self) -> str:
        head = str(self.step) if self.rev == 0 else f"{self.step}.{self.rev}"
        return sha256("\n".join([head, *self.ids]))


class Ledger:
    """ledger.db at one moment. Raises apsw.Error, or ValueError and the like, if it makes no sense."""

    def __init__(self, path: Path, report: Report) -> None:
        self._report = report
        refuse_what_is_no_database(path)
        self.owner = path.stat().st_uid
        # Without a log beside it no process has it open, and reading must not create a log.
        self.at_rest = not path.with_name(path.name + "-wal").exists()
        self._uri = f"file:{quote(str(path.resolve()))}?mode=ro{'&immutable=1' if self.at_rest else ''}"
        self._db = self._connect()
        self._db.execute("BEGIN")
        [(application,)], [(self.version,)] = (
            self._rows(f"PRAGMA {name}") for name in ("application_id", "user_version")
        )
        self.is_empty = not self._rows("SELECT 1 FROM sqlite_schema LIMIT 1")
        if application != APPLICATION_ID and not self.is_empty:
            raise ValueError(f"application id {application:#x} is not that of a ledger")
        if self.version == SCHEMA:
            self._read()

    def _read(self) -> None:
        damage = [" ".join(str(row[0]).split()) for row in self._rows("PRAGMA quick_check(5)")]
        if damage != ["ok"]:
            self._report.error("C8", "the database is damaged", damage)
        names = [row[1] for row in self._rows("PRAGMA table_info(run)")]
        self.run: dict[str, Any] = dict(zip(names, self._rows("SELECT * FROM run")[0], strict=True))
        self.facts = {key: json.loads(value) for key, value in self._rows("SELECT key, value FROM fact")}
        self.starts = sum(row[0] for row in self._rows("SELECT epoch FROM role"))
        self.source = self._rows("SELECT first, count FROM source ORDER BY first")
        self.prompts: dict[int, tuple[str, bool, str]] = {
            ordinal: (state, bool(again), reason)
            for ordinal, state, again, reason in self._rows(
                "SELECT ordinal, state, again, reason FROM prompt"
            )
        }
        self.intents: dict[int, tuple[str, bool]] = {
            generation: (sample_id, bool(revoked))
            for generation, sample_id, revoked in self._rows(
                "SELECT generation, sample_id, revoked FROM intent"
            )
        }
        self.checkpoints = self._rows(
            "SELECT step, name, manifest_digest, chain, first_place FROM checkpoint ORDER BY step"
        )
        self.head: int = self.checkpoints[-1][0] if self.checkpoints else 0
        self.samples = Samples(self._db)
        self.blocks = self._rows("SELECT first, last, finished FROM archive ORDER BY first")

    @property
    def in_ordinal_order(self) -> bool:
        return bool(self.run["place_order"] != "arrival")

    def _connect(self) -> apsw.Connection:
        flags = apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI
        db = apsw.Connection(self._uri, flags=flags, vfs="unix")
        db.set_busy_timeout(60_000)
        return db

    def _rows(self, sql: str, *values: Any) -> list[Any]:
        return list(self._db.execute(sql, values))

    # After the moment of the check, in case a live run changed it.

    def checkpoints_now(self) -> set[str]:
        """Names of the recorded checkpoints."""
        return self._now("SELECT name FROM checkpoint")

    def residents_now(self) -> set[str]:
        """Ids of the samples whose bytes the feature store should hold."""
        return self._now("SELECT sample_id FROM sample WHERE resident")

    def _now(self, sql: str) -> set[Any]:
        with closing(self._connect()) as db:
            return {row[0] for row in db.execute(sql)}

    def will_be_captured(self, ordinal: int) -> bool:
        """Whether the prompt is pending, leased, or failed (with a reason)."""
        return ordinal in self.prompts or ordinal >= self.run["next_ordinal"]

    def shared_generations(self) -> list[tuple[int, list[str]]]:
        """Generations that several samples have, and those samples."""
        rows = self._rows(
            "SELECT generation, json_group_array(sample_id) FROM sample WHERE generation != 0 "
            "GROUP BY generation HAVING count(*) > 1"
        )
        return [(generation, json.loads(ids)) for generation, ids in rows]

    def close(self) -> None:
        self._db.close()

    # -- steps -----------------------------------------------------------------------------

    def steps(self) -> Iterator[Step]:
        """Every step in order: archived steps, then steps with a row."""
        for first, _, _ in self.blocks:
            yield from self._archived(first)
        yield from self._planned("1")

    def step(self, number: int) -> Step | None:
        """The step on record."""
        found = list(self._planned("step = ?", number))
        for first, last, _ in self.blocks if not found else []:
            if first <= number <= last:
                found = [step for step in self._archived(first) if step.step == number]
        return found[0] if found else None

    def _planned(self, where: str, *values: Any) -> Iterator[Step]:
        plans = f"SELECT step, rev, sample_ids FROM plan WHERE {where} ORDER BY step"  # noqa: S608 (ours)
        for number, rev, ids in self._db.execute(plans, values):
            visits, names = [], json.loads(ids)
            last_visits = {
                sample_id: visit for visit, sample_id in enumerate(names)
            }  # a sample may come twice
            for visit, sample_id in enumerate(names):
                known = self.samples.get(sample_id)
                place = UNKNOWN_PLACE if known is None else known.place
                finished = known is not None and known.ack_step == number
                visits.append(Visit(place, sample_id, finished and visit == last_visits[sample_id]))
            yield Step(number, rev, visits, archived=False)

    def _archived(self, first: int) -> list[Step]:
        """The steps of one chunk; [] if it is damaged, which is reported once."""
        if self._block is None or self._block[0] != first:
            self._block = first, self._read_block(first)
        return self._block[1]

    _block: tuple[int, list[Step]] | None = None

    def _read_block(self, first: int) -> list[Step]:
        [(last, finished, digest, content)] = self._rows(
            "SELECT last, finished, digest, content FROM archive WHERE first = ?", first
        )
        try:
            data = lzma.LZMADecompressor().decompress(content, BLOCK_BYTES_MAX)
        except lzma.LZMAError:
            data = b""
        what = f"the archived steps {first} to {last}"
        if sha256(data) != digest:
            self._report.error_once("C8", f"{what} are damaged")
            return []
        steps = [
            Step(number, rev, [Visit(p, i, bool(done)) for p, i, _, done in visits], archived=True)
            for number, rev, visits in json.loads(data)
        ]
        if (steps[0].step, steps[-1].step) != (first, last):
            self._report.error_once("C8", f"{what} are those of {steps[0].step} to {steps[-1].step}")
        if sum(visit.finished for step in steps for visit in step.visits) != finished:
            self._report.error_once("C8", f"{what} finish another number of samples than is noted")
        return steps


@dataclass(frozen=True)
class Slot:
    """A slot's header; `sample_id` is None if its description cannot be read."""

    name: str
    generation: int
    sealed: bool
    sample_id: str | None


def slots_in_use(folder: Path) -> tuple[list[Slot], list[str]]:
    """Slots in use, and the names of files that are not slots. Files that change meanwhile are left out."""
    found, damaged = [], []
    for path in sorted(folder.glob("slot-*")):
        try:
            header, again = _header(path), _header(path)
        except OSError:
            continue  # unlinked since
        if header != again or path.suffix:
            continue
        if len(header) < HEADER_BYTES or struct.unpack_from("<Q", header)[0] != MAGIC:
            damaged.append(path.name)
            continue
        state, generation, *freed = struct.unpack_from("<4Q", header, 24)
        [length, inverted] = struct.unpack_from("<2Q", header, 80)
        if generation not in freed and generation ^ inverted == ALL_BITS:
            text = header[TEXT_AT : TEXT_AT + length]
            found.append(Slot(path.name, generation, state == SEALED, _described(text)))
    return found, damaged


def _header(path: Path) -> bytes:
    with open_file(path, os.O_NOFOLLOW) as file:
        return file.read(HEADER_BYTES)


def _described(text: bytes) -> str | None:
    try:
        sample_id, _ = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return None
    return sample_id if isinstance(sample_id, str) else None


def sha256(data: bytes | str) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()
