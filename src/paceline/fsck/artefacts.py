"""What lies on the disk, decoded by the checker's own code: ledger, folded history, slots.

Formats: ledger/stores/sqlite/schema.sql, features/stores/slots.py. The ledger is opened read-only and read
at one moment, so it may belong to a live run; what is damaged in it is reported, not raised.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import apsw

from paceline.fsck.files import open_file, refuse_what_is_no_database
from paceline.fsck.report import Report

APPLICATION_ID, SCHEMA = 0x50414345, 3
HEADER_BYTES, TEXT_AT = 4096, 128
MAGIC, SEALED = int.from_bytes(b"PACESLOT", "little"), 0x5345414C45442E2E
ALL_BITS = (1 << 64) - 1
BLOCK_BYTES_MAX = 1 << 28  # of folded history, unpacked


@dataclass(slots=True)
class Sample:
    """A committed sample; of a folded one nothing but the first five is left."""

    seq: int
    sample_id: str
    task_id: str | None
    ack_step: int | None
    durable: bool = True
    state: str = "released"  # present | lost | released | quarantined
    ordinal: int | None = None
    resident: bool = False
    generation: int = 0
    num_bytes: int = 0
    reason: str = ""
    ref: str | None = None


@dataclass(slots=True)
class Step:
    step: int
    rev: int
    ids: list[str]

    @property
    def digest(self) -> str:
        head = str(self.step) if self.rev == 0 else f"{self.step}.{self.rev}"
        return sha256("\n".join([head, *self.ids]))


class Ledger:
    """One moment of ledger.db. Raises apsw.Error, or ValueError and its like, if it makes no sense."""

    def __init__(self, path: Path, report: Report) -> None:
        self._report = report
        refuse_what_is_no_database(path)
        self.owner = path.stat().st_uid
        # Without a log beside it nobody has it open, and reading it must not make one.
        self.at_rest = not path.with_name(path.name + "-wal").exists()
        uri = f"file:{quote(str(path.resolve()))}?mode=ro{'&immutable=1' if self.at_rest else ''}"
        # Not through a layer that checks pages: what is in damaged ones is judged too.
        flags = apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI
        self._db = apsw.Connection(uri, flags=flags, vfs="unix")
        self._db.set_busy_timeout(60_000)
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
        self.tasks = {
            row[0]: row[1:] for row in self._rows("SELECT ordinal, task_id, state, reason FROM task")
        }
        self.intents: dict[int, str] = dict(self._rows("SELECT generation, sample_id FROM intent"))
        self.checkpoints = self._rows(
            "SELECT step, name, manifest_digest, last_seq, chain FROM checkpoint ORDER BY step"
        )
        self.head: int = self.checkpoints[-1][0] if self.checkpoints else 0
        [(self.last_operation,)] = self._rows("SELECT coalesce(max(lsn), 0) FROM operation")
        self.acked = {row[0] for row in self._rows("SELECT sample_id FROM ack")}
        self.prompt_blocks = self._rows("SELECT first, last FROM folded WHERE kind = 'tasks' ORDER BY first")
        self.prompts = {first + n: i for first, ids in self._blocks("tasks") for n, i in enumerate(ids)}
        self.samples = self._samples()
        self.last_folded_step = 0
        self.steps = self._steps()

    def _rows(self, sql: str) -> list[Any]:
        return list(self._db.execute(sql))

    def now(self, sql: str) -> set[Any]:
        """The first column at this later moment: what a live run has not changed meanwhile."""
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")
        return {row[0] for row in self._rows(sql)}

    def close(self) -> None:
        self._db.close()

    def _blocks(self, kind: str) -> Iterator[tuple[int, Any]]:
        """(first, content) of every folded block that is not damaged; one without content is left out."""
        for first, last, digest, content in self._db.execute(
            "SELECT first, last, digest, content FROM folded WHERE kind = ? ORDER BY first", (kind,)
        ):
            if content is None:
                continue
            try:
                data = lzma.LZMADecompressor().decompress(content, BLOCK_BYTES_MAX)
            except lzma.LZMAError:
                data = b""
            if sha256(data) != digest:
                self._report.error("C8", f"the folded {kind} {first} to {last} are damaged")
                continue
            found = json.loads(data)
            if kind == "tasks":
                ends = first, first + len(found) - 1
            else:
                keys = found["seq"] if kind == "samples" else [step[0] for step in found]
                ends = keys[0], keys[-1]
            if ends != (first, last):
                what = f"the folded {kind} {first} to {last} are those of {ends[0]} to {ends[1]}"
                self._report.error("C8", what)
            yield first, found

    def _samples(self) -> dict[int, Sample]:
        found: dict[int, Sample] = {}
        for _, block in self._blocks("samples"):
            columns = (block["seq"], block["sample_id"], block["task_id"], block["step"])
            for seq, *rest in zip(*columns, strict=True):
                if seq in found:
                    self._report.error("C8", f"seq {seq} is folded twice", [rest[0]])
                found[seq] = Sample(seq, *rest)
        if max(found, default=0) > self.run["folded_seq"]:
            self._report.error("C8", f"seq {max(found)} is folded, the counter says {self.run['folded_seq']}")
        for seq, i, task, step, durable, state, ordinal, resident, *rest in self._db.execute(
            "SELECT seq, sample_id, task_id, step, coalesce(durable, 0), state, ordinal, resident, "
            "generation, bytes, reason, ref FROM sample LEFT JOIN ack USING (sample_id) ORDER BY seq"
        ):
            if seq in found:
                self._report.error("C8", f"seq {seq} is both folded and live", [i])
            found[seq] = Sample(seq, i, task, step, bool(durable), state, ordinal, bool(resident), *rest)
        return found

    def _steps(self) -> list[Step]:
        """In the order on record: the folded ones, then the live ones."""
        found, samples = [], self.samples
        for _, block in self._blocks("steps"):
            for step, rev, _, seqs in block:
                # An id that was never committed stays an id; a seq whose sample is gone becomes one.
                ids = [samples[s].sample_id if s in samples else str(s) for s in seqs]
                found.append(Step(step, rev, ids))
        self.last_folded_step = max((step.step for step in found), default=0)
        rows = self._rows("SELECT step, rev, sample_ids FROM plan ORDER BY step")
        return found + [Step(step, rev, json.loads(ids)) for step, rev, ids in rows]


@dataclass(frozen=True)
class Slot:
    """What a slot's header says; `sample_id` None if its description cannot be read."""

    name: str
    generation: int
    sealed: bool
    sample_id: str | None


def slots_in_use(folder: Path) -> tuple[list[Slot], list[str]]:
    """Slots that are not free, and the names of files that are no slots. Those in motion are left out."""
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
