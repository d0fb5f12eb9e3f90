"""The checker's look at a ledger that is no file: over a view's plain records, which its caller passes.

A view tells facts, counters, samples, failed prompts, steps and checkpoints, but neither rows of prompts nor
intents. So the rules about those (parts of C8 and C9) cannot be checked here; instead the counters are
compared with what they count. All steps are held in memory.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from paceline.fsck.artefacts import Ledger, Sample, Step, Visit
from paceline.fsck.report import Report

TRIES = 5  # to read a ledger that does not change meanwhile


class ChangingError(Exception):
    """The ledger changed during every look at it."""


class ViewedSamples:
    def __init__(self, samples: dict[str, Sample]) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def get(self, sample_id: str) -> Sample | None:
        return self._samples.get(sample_id)

    def values(self) -> Iterator[Sample]:
        return iter(self._samples.values())


class ViewedLedger:
    """The same answers as artefacts.Ledger gives. Raises ChangingError."""

    intents: dict[int, tuple[str, bool]] | None = None  # it does not tell

    def __init__(self, view: Any, directory: Path) -> None:
        self._view = view
        self.owner = directory.stat().st_uid
        for _ in range(TRIES):
            self._read(view.snapshot())
            if view.snapshot().lsn == self.now.lsn:
                return
        raise ChangingError("its ledger keeps changing; stop the run and check it then")

    def _read(self, now: Any) -> None:
        self.now = now
        self.facts: dict[str, Any] = dict(now.facts)
        self.checkpoints = [
            (c.step, c.name, c.manifest_digest, c.chain, c.first_place) for c in now.checkpoints
        ]
        self.head: int = self.checkpoints[-1][0] if self.checkpoints else 0
        self.run = {"trained_step": now.trained_step, "next_generation": now.next_generation}
        self.samples = ViewedSamples({i: _sample(record) for i, record in self._view.find().items()})
        self.prompts = {n: ("failed", False, reason) for n, reason in self._view.failed().items()}
        self._steps = {trained.step: self._step(trained) for trained in self._view.history()}

    def _step(self, trained: Any) -> Step:
        """As planned; where a sample has a record, that tells whether the visit was its last one."""
        last = {sample.sample_id: visit for visit, sample in enumerate(trained.samples)}
        visits = []
        for visit, sample in enumerate(trained.samples):
            known, finished = self.samples.get(sample.sample_id), bool(sample.finished)
            place = sample.place if known is None else known.place
            if known is not None:
                finished = known.ack_step == trained.step and last[sample.sample_id] == visit
            visits.append(Visit(place, sample.sample_id, finished))
        return Step(trained.step, trained.rev, visits, archived=False)

    def steps(self) -> Iterator[Step]:
        return iter(self._steps.values())

    def step(self, number: int) -> Step | None:
        return self._steps.get(number)

    def shared_generations(self) -> list[tuple[int, list[str]]]:
        owners: dict[int, list[str]] = {}
        for s in self.samples.values():
            owners.setdefault(s.generation, []).append(s.sample_id)
        return [(generation, ids) for generation, ids in owners.items() if generation and len(ids) > 1]

    def will_be_captured(self, _: int) -> bool:
        """It does not tell which prompts are pending."""
        return True

    def checkpoints_now(self) -> set[str]:
        return {record.name for record in self._view.snapshot().checkpoints}

    def residents_now(self) -> set[str]:
        return {i for i, record in self._view.find().items() if record.resident}


def _sample(record: Any) -> Sample:
    ref, is_acked = record.ref, record.step is not None and record.state != "quarantined"
    return Sample(
        place=record.place,
        sample_id=record.sample_id,
        ordinal=ref.ordinal,
        state=str(record.state),
        resident=record.resident,
        num_bytes=ref.estimated_bytes,
        generation=ref.generation,
        acked=2 if record.durable else 1 if is_acked else 0,
        step=record.step,
        reason=record.reason,
        ref=json.dumps({name: getattr(ref, name) for name in ("sample_id", "generation", "estimated_bytes")}),
    )


AnyLedger = Ledger | ViewedLedger


def check_counts(ledger: ViewedLedger, report: Report) -> None:
    """Compare the counters, which each change keeps, with what they count (C8, C9)."""
    now, samples = ledger.now, list(ledger.samples.values())
    resident = [s for s in samples if s.resident]
    states = Counter(s.state for s in samples)
    counted = {
        "resident samples": (now.usage.resident_samples, len(resident)),
        "resident bytes": (now.usage.resident_bytes, sum(s.num_bytes for s in resident)),
        "provisional samples": (now.usage.provisional_samples, sum(s.acked == 1 for s in resident)),
        "lost samples": (now.lost, states["lost"]),
        "samples in quarantine": (now.quarantined, states["quarantined"]),
        "failed prompts": (now.prompts.failed, len(ledger.prompts)),
    }
    for what, (told, found) in counted.items():
        if told != found:
            report.error("C8", f"the ledger counts {told} {what}, and has {found}")
    if len(samples) > now.committed:
        report.error("C8", f"{now.committed} samples were committed, and {len(samples)} are there")
    starts = sum(now.epochs.values())
    if now.lsn < starts:
        report.error("C8", f"the log number is {now.lsn}, but roles were taken {starts} times")
    used = max(chain((s.generation for s in samples), [0]))
    if used >= now.next_generation:
        report.error("C9", f"generation {used} is in use, but {now.next_generation} is the next")
