"""The checker's rules for what was trained: chains, steps and visits (C2, C3, C4), and checkpoints (C5)."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import mode
from typing import Any

from paceline.fsck.artefacts import Ledger, Sample, Step, sha256
from paceline.fsck.files import open_file, read_file, size_of
from paceline.fsck.report import Report

FORBIDDEN = "forbidden"  # in the place of a rule: it could not be looked at
BASES_MAX = 512  # steps at which the beginning of a chain is looked for
UNREADABLE = (AttributeError, LookupError, OSError, TypeError, ValueError)


def check_lineage(ledger: Ledger, passes: int | None, report: Report) -> None:
    """`passes`: how often each sample is visited; None: what the run recorded, or most samples say."""
    base = _check_chains(ledger, report)
    _check_steps(ledger, base, report)
    visits = Counter(i for step in ledger.steps if step.step <= ledger.head for i in step.ids)
    planned = Counter(i for step in ledger.steps for i in step.ids)
    passes = passes or _passes(ledger, visits, planned)
    often = [i for i, count in visits.items() if count > passes]
    if often:
        report.error("C2", f"visited more than {passes} times in the weights of the head", often)
    often = [i for i, count in planned.items() if count > passes >= visits[i]]
    if often:
        report.error("C2", f"planned to be visited more than {passes} times", often)
    if _is_whole(ledger):
        _check_visits(ledger, visits, passes, report)


def _check_chains(ledger: Ledger, report: Report) -> int:
    """The step at which the chain begins: 0, or the last that a version without chains trained."""
    digests = {step.step: step.digest for step in ledger.steps}
    chained = [(step, chain) for step, *_, chain in ledger.checkpoints if chain]
    bare = [step for step, *_, chain in ledger.checkpoints if step and not chain]
    if bare:
        report.note("checkpoints of an earlier version have no chain to check, at steps", bare)
    if not chained:
        return max(bare, default=0)
    first = min(digests, default=1) - 1
    bases = [0, *bare, *range(first, first + BASES_MAX)]
    found = (base for base in bases if _chain("", base, chained[0][0], digests) == chained[0][1])
    base = next(found, None)
    if base is None:
        report.error("C3", f"the checkpoint of step {chained[0][0]} does not cover the steps on record")
    elif base:
        report.note(f"the steps up to {base} were trained by an earlier version and have no chain to check")
    for (before, chain), (step, expected) in pairwise(chained):
        if _chain(chain, before, step, digests) != expected:
            report.error("C3", f"the checkpoint of step {step} does not continue that of step {before}")
    return base or 0


def _chain(before: str, base: int, step: int, digests: dict[int, str]) -> str | None:
    """The hash of steps base + 1 to `step` behind `before`; None if one of them is not on record."""
    chain = before
    for number in range(base + 1, step + 1):
        if number not in digests:
            return None
        chain = sha256(chain + digests[number])
    return chain if base < step else None


def _check_steps(ledger: Ledger, base: int, report: Report) -> None:
    numbers, trained = [step.step for step in ledger.steps], ledger.run["trained_step"]
    gaps = [after for before, after in pairwise(numbers) if after != before + 1]
    if gaps:
        report.error("C4", "steps are missing, repeated or out of order before", gaps)
    if numbers and numbers[0] > base + 1:
        report.error("C4", f"the plans of the steps before {numbers[0]} are missing")
    if trained > max([*numbers[-1:], base, 0]) or trained < ledger.head:
        last = numbers[-1] if numbers else "none"
        report.error("C4", f"step {trained} is acked; the last plan is {last}, the head {ledger.head}")
    places = {sample.sample_id: sample.seq for sample in ledger.samples.values()}
    seen: set[str] = set()
    furthest = 0
    for step in ledger.steps:
        unknown = [i for i in step.ids if i not in places]
        if unknown:
            report.error("C4", f"step {step.step} trains what was never committed", unknown)
        first_visits = [i for i in step.ids if i in places and i not in seen]
        for sample_id in dict.fromkeys(first_visits):
            if places[sample_id] < furthest and _is_whole(ledger):
                report.error("C4", f"step {step.step} visits out of log order", [sample_id])
            furthest = max(furthest, places[sample_id])
        seen.update(first_visits)


def _is_whole(ledger: Ledger) -> bool:
    """Whether every step has its plan: an earlier version dropped those it needed no more."""
    return bool(ledger.steps) and ledger.steps[0].step == 1


def _passes(ledger: Ledger, visits: Counter[str], planned: Counter[str]) -> int:
    config = ledger.facts.get("config")
    if config is not None:
        return int(config.get("training.passes", 1))
    durable = [visits[s.sample_id] for s in ledger.samples.values() if s.durable and visits[s.sample_id]]
    return mode(durable) if durable else max(planned.values(), default=1)


def _check_visits(ledger: Ledger, visits: Counter[str], passes: int, report: Report) -> None:
    last = {i: step.step for step in ledger.steps if step.step <= ledger.head for i in step.ids}
    for s in ledger.samples.values():
        count = visits[s.sample_id]
        if s.durable and not count:
            report.error("C1", "durable, but in no step of the head's lineage", [s.sample_id])
        elif s.durable and count < passes:
            report.error("C2", f"durable after {count} of {passes} visits", [s.sample_id])
        elif s.durable and s.ack_step not in (None, last[s.sample_id]):
            what = f"acked by step {s.ack_step}, last visited by step {last[s.sample_id]}"
            report.error("C2", what, [s.sample_id])
        elif not s.durable and s.state != "quarantined" and count >= passes:
            report.error(
                "C1", "fully trained in the head's weights, and yet to be trained again", [s.sample_id]
            )


def check_folders(ledger: Ledger, folder: Path, report: Report) -> None:
    """Every checkpoint on record against its manifest and files, and against the plans."""
    plans = {step.step: step for step in ledger.steps}
    places = {sample.sample_id: sample for sample in ledger.samples.values()}
    before: tuple[int, str] | None = None
    damaged = 0
    for record in ledger.checkpoints:
        step, name = record[:2]
        problems = list(_problems(folder / name, record, before, plans, places))
        forbidden = [problem for rule, problem in problems if rule == FORBIDDEN]
        if forbidden:
            report.forbidden = f"checkpoint {name}: {forbidden[0]}"
        elif problems and name in ledger.now("SELECT name FROM checkpoint"):
            for rule, problem in problems:
                report.error(rule, f"checkpoint {name} (step {step}): {problem}")
            damaged += any(rule == "C5" for rule, _ in problems)
        before = step, name
    report.is_resumable = not damaged or damaged < len(ledger.checkpoints)
    recorded = {record[1] for record in ledger.checkpoints}
    found = {path.name for path in folder.glob("step-*")} if folder.is_dir() else set()
    if found - recorded:
        names = sorted(found - recorded)
        report.note("folders of no recorded checkpoint, unfinished or swept at the next start", names)


def _problems(
    folder: Path,
    record: Any,
    before: tuple[int, str] | None,
    plans: dict[int, Step],
    places: dict[str, Sample],
) -> Iterator[tuple[str, str]]:
    step, _, digest, last_seq, chain = record
    try:
        data = read_file(folder / "manifest.json")
        if sha256(data) != digest:
            yield "C5", "its manifest is not the one that was recorded"
            return
        manifest = json.loads(data)
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
    told = (manifest["step"], manifest["last_seq"], manifest.get("chain", ""))
    if told != (step, last_seq, chain):
        yield "C5", "its manifest tells of another step or lineage than the ledger"
    lineage = manifest.get("lineage", [])
    if before is not None and "lineage" in manifest:
        # A later consumer may have put the folder under a name of its own epoch.
        if manifest["previous"].rpartition("-")[2] != before[1].rpartition("-")[2]:
            yield "C3", f"it follows {manifest['previous'] or 'nothing'}, not {before[1]}"
        if [row[0] for row in lineage] != list(range(before[0] + 1, step + 1)):
            yield "C4", f"its lineage is not steps {before[0] + 1} to {step}"
    for number, rev, _, samples in lineage:
        if number in plans and (plans[number].rev, plans[number].ids) != (rev, [row[1] for row in samples]):
            yield "C4", f"its step {number} is not the one on record"
        ends = {row[1] for row in samples if row[3]}
        for seq, sample_id, _, _ in samples:
            known, finished = places.get(sample_id), sample_id in ends
            if known is None or known.seq != seq:
                yield "C1", f"{sample_id} is in its weights, and the ledger does not know it at seq {seq}"
            elif known.durable and finished != (known.ack_step == number):
                yield "C2", f"{sample_id} is {'' if finished else 'not '}finished by step {number} here"
