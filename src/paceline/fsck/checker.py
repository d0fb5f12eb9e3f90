"""The checker: does what lies on the disk keep the promise? It shares no code with what it checks.

It reads a run's ledger, checkpoints and slots, and imports nothing of Paceline but its own package: the
rules are written from the documents (docs/guarantees.md, ledger/stores/sqlite/schema.sql), so a bug in the
product is not also a bug here. It never writes, and it may look at a live run: what was removed or added
after the moment it looks at is not held against the run. The rules, C1 to C10, are in report.py.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import apsw

from paceline.fsck.artefacts import SCHEMA, Ledger, sha256, slots_in_use
from paceline.fsck.files import refuse_what_is_no_database
from paceline.fsck.lineage import check_folders, check_lineage
from paceline.fsck.pages import damaged_pages
from paceline.fsck.report import SHOWN, Report

STATES = ("present", "lost", "released", "quarantined")
TASK_STATES = ("pending", "leased", "done", "failed")
NONSENSE = (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError)


def check(directory: Path, *, features: Path | None = None, passes: int | None = None) -> Report:
    """Look at the run in `directory`. Never raises for what it finds, and never writes.

    `features`: the folder of its slots; `passes`: how often each sample is visited. Not given, they are
    what the run recorded, or what most of its samples say.
    """
    report, path = Report(), directory / "ledger.db"
    before, at_rest = _stamp(path), False
    try:
        refuse_what_is_no_database(path)
        foreign = damaged_pages(path)
        if foreign:
            report.error("C10", f"{len(foreign)} pages do not match their checksums", foreign)
        ledger = Ledger(path, report)
        at_rest = ledger.at_rest
        if ledger.version == SCHEMA:
            _check_all(ledger, directory, features, passes, report)
        elif ledger.is_empty and any((directory / "checkpoints").glob("step-*")):
            report.error("C8", "ledger.db is empty, but there are checkpoints")
        elif ledger.is_empty:
            report.unchecked = "ledger.db is empty, the run has not begun"
        else:
            report.unchecked = f"ledger.db has schema version {ledger.version}, this checker knows {SCHEMA}"
        ledger.close()
    except PermissionError as error:
        report.forbidden = f"this user may not read {error.filename}"
    except (apsw.Error, *NONSENSE) as error:
        report.error("C8", f"ledger.db cannot be read ({type(error).__name__}: {error})")
    if at_rest and _stamp(path) != before:
        return check(directory, features=features, passes=passes)  # somebody began to write meanwhile
    return report


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_mtime_ns, facts.st_size


def _check_all(
    ledger: Ledger, directory: Path, features: Path | None, passes: int | None, report: Report
) -> None:
    _check_counters(ledger, report)
    _check_prompts(ledger, report)
    check_lineage(ledger, passes, report)
    _check_states(ledger, report)
    check_folders(ledger, directory / "checkpoints", report)
    _check_bytes(ledger, features or _feature_folder(ledger.facts, directory), report)
    samples = ledger.samples.values()
    report.counts |= {
        "samples": len(samples),
        "steps": len(ledger.steps),
        "checkpoints": len(ledger.checkpoints),
        "head_step": ledger.head,
        "folded_samples": sum(sample.ref is None for sample in samples),
        "quarantined": sum(sample.state == "quarantined" for sample in samples),
        "failed_prompts": sum(state == "failed" for _, state, _ in ledger.tasks.values()),
    }


# -- C8: counters and prompts ------------------------------------------------------------------


def _check_counters(ledger: Ledger, report: Report) -> None:
    run, samples = ledger.run, ledger.samples
    last = run["last_seq"]
    if len(samples) != last or any(not 1 <= seq <= last for seq in samples):
        missing = islice((seq for seq in range(1, last + 1) if seq not in samples), SHOWN)
        report.error("C8", f"{last} samples were committed, {len(samples)} are known; seqs missing", missing)
    if ledger.last_operation > run["lsn"]:
        report.error("C8", f"operation {ledger.last_operation} is on record, the log ends at {run['lsn']}")
    places = Counter(sample.sample_id for sample in samples.values())
    twice = [i for i, count in places.items() if count > 1]
    if twice:
        report.error("C2", "samples have two places in the log", twice)
    strangers = sorted(ledger.acked - places.keys())
    if strangers:
        report.error("C1", "acked, but never committed", strangers)
    oldest = min((step for step, *_ in ledger.checkpoints), default=0)
    if not ledger.last_folded_step <= run["folded_step"] <= oldest:
        folded = (
            f"history is folded up to step {ledger.last_folded_step}, the counter says {run['folded_step']}"
        )
        report.error("C8", f"{folded}, the oldest checkpoint is that of step {oldest}")
    used = max([*ledger.intents, *(sample.generation for sample in samples.values())], default=0)
    if used >= run["next_generation"]:
        report.error("C9", f"generation {used} is in use, but {run['next_generation']} is the next")


def _check_prompts(ledger: Ledger, report: Report) -> None:
    """A prompt without a row is done below `next_ordinal`, and pending from there on."""
    run, tasks = ledger.run, ledger.tasks
    following, known = run["next_ordinal"], run["num_tasks"]
    ends = [(-1, -1), *ledger.prompt_blocks, (known, known)]
    if any(after[0] != before[1] + 1 for before, after in pairwise(ends)):
        blocks = [f"{first} to {last}" for first, last in ledger.prompt_blocks]
        report.error("C8", f"{known} prompts are known, but their blocks have a gap or an overlap", blocks)
    if following > known or any(not 0 <= ordinal < known for ordinal in tasks):
        report.error("C8", f"{known} prompts are known, but {following} or a later one is in work")
    named = {s.ordinal: s.task_id for s in ledger.samples.values() if s.ordinal is not None}
    named |= {ordinal: task_id for ordinal, (task_id, *_) in tasks.items()}
    other = [f"{i} at {n}" for n, i in named.items() if ledger.prompts.get(n, i) != i]
    if other:
        report.error("C8", "a prompt's place is that of another prompt", other)
    done = following + sum((state == "done") - (n < following) for n, (_, state, _) in tasks.items())
    have = {s.ordinal for s in ledger.samples.values() if s.ordinal is not None and s.state != "lost"}
    have -= {n for n, (_, state, _) in tasks.items() if state != "done"}
    count = len(have) + sum(s.ref is None for s in ledger.samples.values())
    if count < done:
        committed = {sample.task_id for sample in ledger.samples.values()}
        behind = {n: i for n, i in ledger.prompts.items() if n < following and n not in tasks}
        names = [i for i in behind.values() if i not in committed]
        report.error("C1", f"{done - count} prompts are done, but their samples are gone", names)


# -- C1: what became of every sample -----------------------------------------------------------


def _check_states(ledger: Ledger, report: Report) -> None:
    head = ledger.head
    # SQLite does not look at CHECK constraints through a connection that only reads.
    odd = [s.sample_id for s in ledger.samples.values() if s.state not in STATES]
    odd += [task_id for task_id, state, _ in ledger.tasks.values() if state not in TASK_STATES]
    if odd:
        report.error("C1", "in a state that there is not", odd)
    for s in ledger.samples.values():
        if s.state == "quarantined" and not s.reason:
            report.error("C1", "quarantined without a reason", [s.sample_id])
        if s.state == "released" and not s.durable:
            report.error("C1", "its features were freed before a checkpoint covered it", [s.sample_id])
        if s.durable and ledger.checkpoints and s.ack_step is not None and s.ack_step > head:
            report.error("C1", f"durable by step {s.ack_step}, but the head is {head}", [s.sample_id])
        covered = s.ack_step is not None and s.ack_step <= head
        if covered and not s.durable and s.state != "quarantined":
            report.error(
                "C1", f"acked by step {s.ack_step}, which the head covers, but not durable", [s.sample_id]
            )
        if s.state == "lost" and s.ordinal is not None and not _is_open(ledger, s.ordinal):
            report.error("C1", "lost, and nobody will capture it again", [s.sample_id])
        if s.resident != (s.state == "present") and s.state != "quarantined":
            told = "should" if s.resident else "should not"
            report.error("C9", f"{s.state}, yet the feature store {told} hold its bytes", [s.sample_id])
    lost = [s.sample_id for s in ledger.samples.values() if s.state == "lost"]
    if lost:
        report.note(f"{len(lost)} samples wait to be captured again", lost)
    for s in ledger.samples.values():
        if s.state == "quarantined":
            report.note(f"quarantined: {s.sample_id}: {s.reason}")
    for task_id, state, reason in ledger.tasks.values():
        if state == "failed":
            report.note(f"failed prompt: {task_id}: {reason}")


def _is_open(ledger: Ledger, ordinal: int) -> bool:
    """Whether the prompt waits, is in work, or failed for good (with a reason)."""
    _, state, _ = ledger.tasks.get(ordinal, ("", "done", ""))
    return state != "done" or (ordinal not in ledger.tasks and ordinal >= ledger.run["next_ordinal"])


# -- C9: bytes ---------------------------------------------------------------------------------


def _check_bytes(ledger: Ledger, folder: Path | None, report: Report) -> None:
    owners: dict[int, str] = {}
    for s in ledger.samples.values():
        if s.generation and s.generation in ledger.intents:
            report.error("C9", f"generation {s.generation} is committed and still promised", [s.sample_id])
        if s.generation and owners.setdefault(s.generation, s.sample_id) != s.sample_id:
            report.error(
                "C9", f"generation {s.generation} has two owners", [owners[s.generation], s.sample_id]
            )
        if s.ref is not None:
            ref = json.loads(s.ref)
            told = (ref["sample_id"], ref.get("generation", 0), ref["estimated_bytes"])
            if told != (s.sample_id, s.generation, s.num_bytes):
                report.error("C9", f"its ref tells of other bytes: {told}", [s.sample_id])
    if folder is not None and folder.is_dir():
        _check_slots(ledger, folder, report)
    elif folder is not None and (gone := [s.sample_id for s in ledger.samples.values() if s.resident]):
        report.note(f"there is no {folder}; captured again at the next start", gone)


def _check_slots(ledger: Ledger, folder: Path, report: Report) -> None:
    if folder.lstat().st_uid != ledger.owner:
        report.note(f"{folder} belongs to another user than the ledger, and was not looked at")
        return
    slots, damaged = slots_in_use(folder)
    resident = {s.sample_id: s for s in ledger.samples.values() if s.resident}
    by_generation = {s.generation: s for s in resident.values() if s.generation}
    held, left = set(), []
    for slot in slots:
        sample = resident.get(slot.sample_id or "")
        if slot.generation >= ledger.run["next_generation"] > 1:
            continue  # begun after the moment that is looked at
        owner = by_generation.get(slot.generation)
        if slot.sealed and owner is not None and slot.sample_id != owner.sample_id:
            what = f"{slot.name} holds {slot.sample_id} under the generation of"
            report.error("C9", what, [owner.sample_id])
        elif slot.sealed and sample is not None and sample.generation in (0, slot.generation):
            if sample.sample_id in held:
                report.error("C9", f"{slot.name} and another slot hold the same sample", [sample.sample_id])
            held.add(sample.sample_id)
        elif ledger.intents.get(slot.generation) is None or (
            slot.sealed and ledger.intents[slot.generation] != slot.sample_id
        ):
            left.append(f"{slot.name} ({slot.sample_id or 'unreadable'})")
    gone = [sample_id for sample_id in resident if sample_id not in held]
    if gone:  # and not freed by a live run meanwhile
        still = ledger.now("SELECT sample_id FROM sample WHERE resident")
        gone = [sample_id for sample_id in gone if sample_id in still]
    if gone:
        report.note(f"{len(gone)} samples have no sealed bytes; they will be captured again", gone)
    if left or damaged:
        report.note("slots that nobody owns, swept when a producer starts", [*left, *damaged])
    report.counts["slots"] = len(slots)


def _feature_folder(facts: dict[str, Any], directory: Path) -> Path | None:
    """Where a run of this configuration keeps its features."""
    if lies := facts.get("features_lie"):
        return Path(lies["folder"])
    config = facts.get("config", {})
    if "features.directory" not in config or "run.name" not in config:
        return None
    place = sha256(str(directory.resolve()))[:8]
    return Path(config["features.directory"]) / f"paceline-{config['run.name']}-{place}"
