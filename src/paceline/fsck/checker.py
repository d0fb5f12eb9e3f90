"""The checker: does what lies on the disk keep the promise? It shares no code with what it checks.

It reads a run's ledger and checkpoints, and nothing else of Paceline: the rules below are written from the
documents (docs/guarantees.md, ledger/stores/sqlite/schema.sql), so a bug in the product is not also a
bug here. It never writes, and it may look at a run that is live: what it reads is one moment.

C1 every committed sample is in the lineage of the head, terminal with a reason, or still to come;
C2 no sample is in the lineage more often than configured; C3 every checkpoint's chain is the hash of the
steps it covers; C4 steps are without gaps and first visits in log order; C5 checkpoints on disk are the
ones recorded, byte for byte; C8 counters and folded history agree; C9 bytes are promised or owned once.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import apsw

APPLICATION_ID = 0x50414345
SCHEMA = 2
SHOWN = 5  # ids in one line


@dataclass
class Report:
    """`errors` break the promise; `notes` are harmless; `counts` say how much was looked at."""

    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def error(self, rule: str, what: str, ids: Any = ()) -> None:
        self.errors.append(f"{rule} {what}{_named(ids)}")

    def note(self, what: str, ids: Any = ()) -> None:
        self.notes.append(f"{what}{_named(ids)}")


@dataclass
class Sample:
    seq: int
    sample_id: str
    state: str  # present | lost | released | quarantined
    resident: bool
    generation: int
    ack_step: int | None
    durable: bool
    reason: str
    folded: bool = False


@dataclass
class Step:
    step: int
    rev: int
    ids: list[str]

    @property
    def digest(self) -> str:
        head = str(self.step) if self.rev == 0 else f"{self.step}.{self.rev}"
        return _sha256("\n".join([head, *self.ids]).encode())


class Ledger:
    """One moment of ledger.db, decoded."""

    def __init__(self, path: Path, report: Report) -> None:
        self._report = report
        self._db = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
        self._db.set_busy_timeout(60_000)
        self._db.execute("BEGIN")
        self.version = self._value("PRAGMA user_version")
        if self._value("PRAGMA application_id") != APPLICATION_ID or self.version != SCHEMA:
            return
        damage = [row[0] for row in self._db.execute("PRAGMA quick_check(5)")]
        if damage != ["ok"]:
            report.error("C8", f"the database is damaged: {'; '.join(map(str, damage))}")
        names = [row[1] for row in self._db.execute("PRAGMA table_info(run)")]
        self.run = dict(zip(names, next(iter(self._db.execute("SELECT * FROM run"))), strict=True))
        self.facts = {k: json.loads(v) for k, v in self._db.execute("SELECT key, value FROM fact")}
        self.tasks = list(self._db.execute("SELECT ordinal, task_id, state, reason FROM task"))
        self.intents = dict(self._db.execute("SELECT generation, sample_id FROM intent"))
        self.checkpoints = list(
            self._db.execute("SELECT step, name, manifest_digest, chain FROM checkpoint ORDER BY step")
        )
        self.acked = {row[0] for row in self._db.execute("SELECT sample_id FROM ack")}
        self.samples = self._samples()
        self.steps = self._steps()
        self.task_blocks = list(
            self._db.execute("SELECT first, last FROM folded WHERE kind = 'tasks' ORDER BY first")
        )
        list(self._blocks("tasks"))

    def _value(self, sql: str) -> Any:
        return next(iter(self._db.execute(sql)))[0]

    def close(self) -> None:
        self._db.close()

    def _blocks(self, kind: str) -> Iterator[Any]:
        for first, last, digest, content in self._db.execute(
            "SELECT first, last, digest, content FROM folded WHERE kind = ? ORDER BY first", (kind,)
        ):
            if content is None:
                continue
            try:
                data = lzma.decompress(content)
            except lzma.LZMAError:
                data = b""
            if _sha256(data) != digest:
                self._report.error("C8", f"the folded {kind} {first} to {last} are damaged")
                continue
            yield json.loads(data)

    def _samples(self) -> dict[int, Sample]:
        found: dict[int, Sample] = {}
        for block in self._blocks("samples"):
            columns = (block["seq"], block["sample_id"], block["step"])
            for seq, sample_id, step in zip(*columns, strict=True):
                found[seq] = Sample(seq, sample_id, "released", False, 0, step, True, "", folded=True)
        for row in self._db.execute(
            "SELECT seq, sample_id, state, resident, generation, step, coalesce(durable, 0), reason "
            "FROM sample LEFT JOIN ack USING (sample_id)"
        ):
            sample = Sample(*row[:3], bool(row[3]), *row[4:6], bool(row[6]), row[7])  # type: ignore[call-arg]
            if sample.seq in found:
                self._report.error("C8", f"seq {sample.seq} is both folded and live", [sample.sample_id])
            found[sample.seq] = sample
        return dict(sorted(found.items()))

    def _steps(self) -> list[Step]:
        names = {seq: sample.sample_id for seq, sample in self.samples.items()}
        found = []
        for block in self._blocks("steps"):
            for step, rev, _, seqs in block:
                ids = [names.get(seq, f"seq {seq}") if isinstance(seq, int) else seq for seq in seqs]
                found.append(Step(step, rev, ids))
        for step, rev, ids in self._db.execute("SELECT step, rev, sample_ids FROM plan ORDER BY step"):
            found.append(Step(step, rev, json.loads(ids)))
        return found


def check(directory: Path) -> Report:
    """Look at the run in `directory`. Never raises for what it finds, and never writes."""
    report = Report()
    try:
        ledger = Ledger(directory / "ledger.db", report)
    except (apsw.Error, ValueError, KeyError, TypeError, StopIteration) as error:
        report.error("C8", f"ledger.db cannot be read ({type(error).__name__}: {error})")
        return report
    if ledger.version != SCHEMA or not hasattr(ledger, "steps"):
        report.error("C8", f"ledger.db has schema version {ledger.version}; this checker knows {SCHEMA}")
        ledger.close()
        return report
    head = ledger.checkpoints[-1][0] if ledger.checkpoints else 0
    _check_counters(ledger, report)
    _check_steps(ledger, report)
    _check_samples(ledger, head, report)
    _check_chains(ledger, report)
    _check_folders(ledger, directory / "checkpoints", report)
    report.counts = {
        "samples": len(ledger.samples),
        "steps": len(ledger.steps),
        "checkpoints": len(ledger.checkpoints),
        "head_step": head,
        "folded_samples": sum(sample.folded for sample in ledger.samples.values()),
        "quarantined": sum(sample.state == "quarantined" for sample in ledger.samples.values()),
        "failed_prompts": sum(state == "failed" for _, _, state, _ in ledger.tasks),
    }
    ledger.close()
    return report


def _check_counters(ledger: Ledger, report: Report) -> None:
    run, samples = ledger.run, ledger.samples
    missing = sorted(set(range(1, run["last_seq"] + 1)) - samples.keys())
    if missing or len(samples) != run["last_seq"]:
        report.error("C8", f"{run['last_seq']} samples were committed, {len(samples)} are known", missing)
    twice = [i for i, n in Counter(s.sample_id for s in samples.values()).items() if n > 1]
    if twice:
        report.error("C2", "samples have two places in the log", twice)
    used = [*ledger.intents, *(s.generation for s in samples.values())]
    if max(used, default=0) >= run["next_generation"]:
        report.error("C9", f"generation {max(used)} is in use, but {run['next_generation']} is the next")
    both = [s.sample_id for s in samples.values() if s.generation and s.generation in ledger.intents]
    if both:
        report.error("C9", "committed bytes are still promised", both)
    owned = Counter(s.generation for s in samples.values() if s.generation and s.resident)
    if any(n > 1 for n in owned.values()):
        report.error("C9", "one generation belongs to two samples", [g for g, n in owned.items() if n > 1])
    expected = 0
    for first, last in ledger.task_blocks:
        if first != expected:
            report.error("C8", f"the prompts' blocks have a gap or an overlap at {expected}")
        expected = last + 1
    if expected != run["num_tasks"]:
        report.error("C8", f"{run['num_tasks']} prompts are known, their blocks hold {expected}")
    if run["next_ordinal"] > run["num_tasks"]:
        report.error("C8", f"prompt {run['next_ordinal']} is the next of only {run['num_tasks']}")


def _check_steps(ledger: Ledger, report: Report) -> None:
    numbers = [step.step for step in ledger.steps]
    if numbers and numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        report.error("C4", "steps are missing or repeated", numbers)
    last = numbers[-1] if numbers else 0
    if ledger.run["trained_step"] > max(last, *(c[0] for c in ledger.checkpoints), 0):
        report.error("C4", f"step {ledger.run['trained_step']} is acked, the last plan is {last}")
    if numbers and numbers[0] != 1:
        report.note(f"plans before step {numbers[0]} were not kept by an earlier version")
    places = {sample.sample_id: sample.seq for sample in ledger.samples.values()}
    seen: set[str] = set()
    before = 0
    for step in ledger.steps:
        unknown = [i for i in step.ids if i not in places]
        if unknown:
            report.error("C4", f"step {step.step} trains what was never committed", unknown)
        for sample_id in step.ids:
            if sample_id in places and sample_id not in seen:
                seen.add(sample_id)
                if places[sample_id] < before and numbers[0] == 1:
                    report.error("C4", f"step {step.step} visits out of log order", [sample_id])
                before = max(before, places[sample_id])


def _check_samples(ledger: Ledger, head: int, report: Report) -> None:
    passes = int(ledger.facts.get("config", {}).get("training.passes") or 0)
    whole = not ledger.steps or ledger.steps[0].step == 1
    visits = Counter(i for step in ledger.steps if step.step <= head for i in step.ids)
    last_visit = {i: step.step for step in ledger.steps for i in step.ids}
    passes = passes or max(visits.values(), default=1)
    often = [i for i, n in visits.items() if n > passes]
    if often:
        report.error("C2", f"visited more than {passes} times in the weights of the head", often)
    for s in ledger.samples.values():
        quarantined = s.state == "quarantined"
        if quarantined and not s.reason:
            report.error("C1", "quarantined without a reason", [s.sample_id])
        if s.durable and s.state == "lost":
            report.error("C1", "durably trained, and yet waited for", [s.sample_id])
        if s.state == "released" and not s.durable:
            report.error("C1", "its features were freed before a checkpoint covered it", [s.sample_id])
        if s.durable and s.ack_step is not None and s.ack_step > head:
            report.error("C1", f"durable by step {s.ack_step}, but the head is {head}", [s.sample_id])
        if not s.durable and s.ack_step is not None and s.ack_step <= head and not quarantined:
            report.error("C1", "in the head's weights, and yet to be trained again", [s.sample_id])
        if s.durable and whole and not visits[s.sample_id]:
            report.error("C1", "durable, but in no step of the head's lineage", [s.sample_id])
        elif s.durable and whole and visits[s.sample_id] != passes:
            report.error("C2", f"durable after {visits[s.sample_id]} of {passes} visits", [s.sample_id])
        if s.durable and whole and s.ack_step not in (None, last_visit.get(s.sample_id)):
            report.error("C1", f"acked by step {s.ack_step}, which is not its last visit", [s.sample_id])
        if not s.durable and not quarantined and visits[s.sample_id] >= passes and whole:
            report.error("C1", "fully visited in the head's lineage, and yet not durable", [s.sample_id])
    strangers = ledger.acked - {s.sample_id for s in ledger.samples.values()}
    if strangers:
        report.error("C1", "acked, but never committed", sorted(strangers))
    lost = [s.sample_id for s in ledger.samples.values() if s.state == "lost"]
    if lost:
        report.note(f"{len(lost)} samples wait to be captured again", lost)
    for s in ledger.samples.values():
        if s.state == "quarantined":
            report.note(f"quarantined: {s.sample_id}: {s.reason}")
    for _, task_id, state, reason in ledger.tasks:
        if state == "failed":
            report.note(f"failed prompt: {task_id}: {reason}")


def _check_chains(ledger: Ledger, report: Report) -> None:
    steps = {step.step: step for step in ledger.steps}
    records = {step: chain for step, _, _, chain in ledger.checkpoints}
    chain, known = "", 1 in steps or not any(records)
    for number in range(max(records, default=0) + 1):
        if number in steps:
            chain = _sha256(f"{chain}{steps[number].digest}".encode())
        elif number and known:
            known = False
        if number in records and not known:
            chain = records[number]  # what an earlier version trained: believed, and continued
        elif number in records and records[number] not in ("", chain):
            report.error("C3", f"the checkpoint of step {number} does not cover the steps on record")
    if not known:
        report.note("the chain of the first checkpoint could not be checked: its steps were not kept")


def _check_folders(ledger: Ledger, folder: Path, report: Report) -> None:
    plans = {step.step: step for step in ledger.steps}
    for step, name, digest, chain in ledger.checkpoints:
        problem = _folder_problem(folder / name, digest, step, chain, plans)
        if problem:
            report.error("C5", f"checkpoint {name} (step {step}): {problem}")
    recorded = {name for _, name, _, _ in ledger.checkpoints}
    found = {path.name for path in folder.glob("step-*")} if folder.is_dir() else set()
    if found - recorded:
        report.note("folders of no recorded checkpoint, swept at the next start", sorted(found - recorded))


def _folder_problem(folder: Path, digest: str, step: int, chain: str, plans: dict[int, Step]) -> str:
    try:
        data = (folder / "manifest.json").read_bytes()
        if _sha256(data) != digest:
            return "its manifest is not the one that was recorded"
        manifest = json.loads(data)
        for name, expected in manifest["files"].items():
            content = (folder / name).read_bytes()
            if len(content) != expected["bytes"] or _sha256(content) != expected["sha256"]:
                return f"{name} is damaged"
    except (OSError, ValueError, KeyError) as error:
        return f"it cannot be read ({error})"
    if manifest["step"] != step or manifest.get("chain", "") != chain:
        return "its manifest tells of another step or lineage than the ledger"
    for number, rev, _, samples in manifest.get("lineage", []):
        ids = [sample[1] for sample in samples]
        if number in plans and (plans[number].rev, plans[number].ids) != (rev, ids):
            return f"its step {number} is not the one on record"
    return ""


def _named(ids: Any) -> str:
    shown = [str(i) for i in ids]
    more = f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    return f": {', '.join(shown[:SHOWN])}{more}" if shown else ""


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
