"""The checker's rules for what was trained: chains, steps and visits (C2, C3, C4), and checkpoints (C5).

Steps are checked one after another, archived steps first. Of a finished sample only one bit is kept, so a
run of any length is checked in little memory.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paceline.fsck.artefacts import UNKNOWN_PLACE, Sample, Step, sha256
from paceline.fsck.files import open_file, read_file, size_of
from paceline.fsck.report import SHOWN, Report
from paceline.fsck.viewed import AnyLedger

FORBIDDEN = "forbidden"  # in place of a rule: this user may not read the file
PART = re.compile(r"(.+)-\d{5}-of-(\d{5})(\.safetensors)")
UNREADABLE = (AttributeError, LookupError, OSError, TypeError, ValueError)


def check_lineage(ledger: AnyLedger, passes: int | None, report: Report) -> int:
    """Check every step; returns their number. `passes`: how often each sample is visited; None: what the run
    recorded, or what most samples show."""
    walk = _Walk(ledger, report)
    for step in ledger.steps():
        walk.take(step)
    walk.end(passes)
    return walk.count


class _Bits:
    """A set of small numbers."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def add(self, number: int) -> bool:
        """Add a number; returns whether it is new."""
        place, bit = number >> 3, 1 << (number & 7)
        if place >= len(self._bytes):
            self._bytes.extend(bytes(place + 1 - len(self._bytes) + 4096))
        known = self._bytes[place] & bit
        self._bytes[place] |= bit
        return not known

    def __contains__(self, number: int) -> bool:
        return number >> 3 < len(self._bytes) and bool(self._bytes[number >> 3] & 1 << (number & 7))


@dataclass
class _Open:
    """A sample that is not finished: its planned visits, and those in the head's weights."""

    place: int
    planned: int = 0
    trained: int = 0
    last: int = 0


@dataclass
class _Walk:
    ledger: AnyLedger
    report: Report
    count: int = 0
    last: int = 0
    chain: str = ""
    furthest: int = -1
    open: dict[str, _Open] = field(default_factory=dict)
    visits_of_finished: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))
    num_finished: dict[int, int] = field(default_factory=lambda: defaultdict(int))

    def __post_init__(self) -> None:
        self.seen, self.done = _Bits(), _Bits()
        self.heads = {step: chain for step, _, _, chain, _ in self.ledger.checkpoints}

    def take(self, step: Step) -> None:
        if step.step != self.last + 1:
            self.report.error("C4", "steps are missing, repeated or out of order before", [step.step])
        self.count, self.last = self.count + 1, step.step
        self._check_chain(step)
        unknown = [v.sample_id for v in step.visits if v.place == UNKNOWN_PLACE]
        if unknown:
            self.report.error("C4", f"step {step.step} trains what was never committed", unknown)
        # If the last block of a run is smaller than a batch, a step visits a sample twice.
        finished = {visit.sample_id for visit in step.visits if visit.finished}
        last = {visit.sample_id: number for number, visit in enumerate(step.visits)}
        for number, visit in enumerate(step.visits):
            if visit.place != UNKNOWN_PLACE:
                ends = visit.sample_id in finished and last[visit.sample_id] == number
                self._visit(step, visit.place, visit.sample_id, ends)

    def _check_chain(self, step: Step) -> None:
        self.chain = sha256(self.chain + step.digest)
        expected = self.heads.pop(step.step, None)
        if expected is not None and expected != self.chain:
            self.report.error("C3", f"the checkpoint of step {step.step} does not cover the steps on record")
            self.chain = expected  # judge the next checkpoint by itself

    def _visit(self, step: Step, place: int, sample_id: str, finished: bool) -> None:
        if self.seen.add(place):
            if place < self.furthest:
                self.report.error("C4", f"step {step.step} visits out of log order", [sample_id])
            self.furthest = max(self.furthest, place)
        if place in self.done:
            self.report.error("C2", f"step {step.step} trains it after its last visit", [sample_id])
            return
        known = self.open.setdefault(sample_id, _Open(place))
        known.planned += 1
        if step.step <= self.ledger.head:
            known.trained, known.last = known.trained + 1, step.step
        if finished and step.step <= self.ledger.head:
            self.done.add(place)
            del self.open[sample_id]
            self.num_finished[known.trained] += 1
            if len(self.visits_of_finished[known.trained]) < SHOWN:
                self.visits_of_finished[known.trained].append(sample_id)

    # -- after the last step ---------------------------------------------------------------

    def end(self, passes: int | None) -> None:
        for step in self.heads:
            if step > 0:
                self.report.error("C3", f"the checkpoint of step {step} does not cover the steps on record")
        for step, chain in self.heads.items():
            if step == 0 and chain:
                self.report.error("C3", "the checkpoint before the first step has a lineage")
        trained = self.ledger.run["trained_step"]
        if not self.ledger.head <= trained <= self.last:
            what = f"step {trained} is acked, the last plan is {self.last}, the head {self.ledger.head}"
            self.report.error("C4", what)
        passes = passes or self._passes()
        for count, ids in self.visits_of_finished.items():
            if count > passes:
                self.report.error("C2", f"visited more than {passes} times in the weights of the head", ids)
            elif count < passes:
                self.report.error("C2", f"durable after {count} of {passes} visits", ids)
        self._check_open(passes)

    def _passes(self) -> int:
        config = self.ledger.facts.get("config")
        if config is not None:
            return int(config.get("training.passes", 1))
        if self.num_finished:
            return max(self.num_finished, key=lambda count: (self.num_finished[count], -count))
        return max((known.planned for known in self.open.values()), default=1)

    def _check_open(self, passes: int) -> None:
        for sample_id, known in self.open.items():
            if known.trained > passes:
                what = f"visited more than {passes} times in the weights of the head"
                self.report.error("C2", what, [sample_id])
            elif known.planned > passes:
                self.report.error("C2", f"planned to be visited more than {passes} times", [sample_id])
        for s in self.ledger.samples.values():
            self._check_sample(s, passes)

    def _check_sample(self, s: Sample, passes: int) -> None:
        known = self.open.get(s.sample_id)
        if s.durable and known is not None and known.trained:
            what = f"acked by step {s.ack_step}, last visited by step {known.last}"
            self.report.error("C2", what, [s.sample_id])
        elif s.durable and s.place not in self.done:
            self.report.error("C1", "durable, but in no step of the head's lineage", [s.sample_id])
        elif not s.durable and s.state != "quarantined" and known is not None and known.trained >= passes:
            what = "fully trained in the head's weights, and yet to be trained again"
            self.report.error("C1", what, [s.sample_id])


# -- C5: checkpoints ---------------------------------------------------------------------------


def check_folders(ledger: AnyLedger, folder: Path, report: Report) -> None:
    """Compare every checkpoint on record with its manifest and files, and with the steps."""
    damaged = 0
    found = [
        (record, list(_problems(ledger, folder / record[1], record, before)))
        for record, before in _with_the_one_before(ledger.checkpoints)
    ]
    for record, problems in found:
        step, name = record[:2]
        forbidden = [problem for rule, problem in problems if rule == FORBIDDEN]
        if forbidden:
            report.forbidden = f"checkpoint {name}: {forbidden[0]}"
        elif problems and name in ledger.checkpoints_now():
            for rule, problem in problems:
                report.error(rule, f"checkpoint {name} (step {step}): {problem}")
            damaged += any(rule == "C5" for rule, _ in problems)
    report.is_resumable = not damaged or damaged < len(ledger.checkpoints)
    recorded = {record[1] for record in ledger.checkpoints}
    there = {path.name for path in folder.glob("step-*")} if folder.is_dir() else set()
    report.newer = sorted(name for name in there - recorded if _is_newer(name, ledger.head))
    if report.newer:
        report.note(f"checkpoints of later steps than the head's, {ledger.head}", report.newer)
    if there - recorded - set(report.newer):
        names = sorted(there - recorded - set(report.newer))
        report.note("folders of no recorded checkpoint, unfinished or swept at the next start", names)


def _with_the_one_before(records: list[Any]) -> Iterator[tuple[Any, tuple[int, str] | None]]:
    before: tuple[int, str] | None = None
    for record in records:
        yield record, before
        before = record[0], record[1]


def _is_newer(name: str, head: int) -> bool:
    """Whether this is the name of a finished checkpoint of a later step."""
    step = name.split("-")[1]
    return "." not in name and step.isdecimal() and int(step) > head


def _problems(
    ledger: AnyLedger, folder: Path, record: Any, before: tuple[int, str] | None
) -> Iterator[tuple[str, str]]:
    step, _, digest, chain, first_place = record
    try:
        data = read_file(folder / "manifest.json")
        if sha256(data) != digest:
            yield "C5", "its manifest is not the one that was recorded"
            return
        manifest = json.loads(data)
        for name in _missing_parts(manifest["files"]):
            yield "C5", f"its manifest does not name {name}, and names other parts of that file"
        for name, expected in manifest["files"].items():
            if size_of(folder / name) != expected["bytes"]:
                yield "C5", f"{name} is damaged: its size is not the recorded one"
                continue
            with open_file(folder / name) as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                    yield "C5", f"{name} is damaged"
    except PermissionError as error:
        yield FORBIDDEN, f"this user may not read it ({error})"
        return
    except UNREADABLE as error:
        yield "C5", f"it cannot be read ({error})"
        return
    told = (manifest["step"], manifest["chain"], manifest["first_place"])
    if told != (step, chain, first_place):
        yield "C5", "its manifest names another step or lineage than the ledger"
    lineage = manifest["lineage"]
    if before is not None:
        # A later consumer may have renamed the folder to its own epoch.
        if manifest["previous"].rpartition("-")[2] != before[1].rpartition("-")[2]:
            yield "C3", f"it follows {manifest['previous'] or 'nothing'}, not {before[1]}"
        if [row[0] for row in lineage] != list(range(before[0] + 1, step + 1)):
            yield "C4", f"its lineage is not steps {before[0] + 1} to {step}"
    for number, rev, samples in lineage:
        yield from _problems_of_step(ledger, number, rev, samples)


def _missing_parts(names: Iterable[str]) -> list[str]:
    """The parts that belong to those among `names`: `draft-00002-of-00004.safetensors` to the other three."""
    there = set(names)
    wanted = {
        f"{found[1]}-{part:05d}-of-{found[2]}{found[3]}"
        for found in map(PART.fullmatch, there)
        if found
        for part in range(1, int(found[2]) + 1)
    }
    return sorted(wanted - there)


def _problems_of_step(
    ledger: AnyLedger, number: int, rev: int, samples: list[Any]
) -> Iterator[tuple[str, str]]:
    on_record = ledger.step(number)
    if on_record is None or (on_record.rev, on_record.ids) != (rev, [row[1] for row in samples]):
        yield "C4", f"its step {number} is not the one on record"
        return
    for visit, (place, sample_id, _, done) in zip(on_record.visits, samples, strict=True):
        finished, known = bool(done), ledger.samples.get(sample_id)
        if visit.place != place:
            yield "C1", f"{sample_id} is in its weights, and the ledger does not know it at place {place}"
        elif (known is None or known.durable) and finished != visit.finished:
            yield "C2", f"{sample_id} is {'' if finished else 'not '}finished by step {number} here"
