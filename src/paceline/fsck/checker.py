"""The checker decides whether a run's files keep the guarantee. It shares no code with what it checks.

It reads a run's ledger, checkpoints and features, and imports nothing of Paceline but its package. The rules
are written from the documents (docs/guarantees.md, ledger/stores/sqlite/schema.sql), so a bug in the product
is not also a bug here. It never writes. It may check a live run: it ignores what was added or removed after
the moment of the check. The rules are in report.py.
"""

from __future__ import annotations

import json
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import apsw

from paceline.fsck.artefacts import SCHEMA, Ledger, Sample, Slot, sha256, slots_in_use
from paceline.fsck.best import check_best
from paceline.fsck.files import refuse_what_is_no_database
from paceline.fsck.lineage import check_folders, check_lineage
from paceline.fsck.report import Report
from paceline.fsck.sample_files import files_in_use, is_shared, store_in
from paceline.fsck.viewed import AnyLedger, ChangingError, ViewedLedger, check_counts

STATES = ("present", "lost", "released", "quarantined")
PROMPT_STATES = ("pending", "leased", "failed")
NONSENSE = (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError)


def check(
    directory: Path,
    *,
    features: Path | None = None,
    passes: int | None = None,
    mounted: Path | None = None,
) -> Report:
    """Check the run in `directory`. Findings are reported, never raised.

    `features`: the folder of its slots; `passes`: how often each sample is visited. By default they are what
    the run recorded, or else what most of its samples show. `mounted`: where this host has mounted the folder
    that holds the features, if hosts share them; by default where the host that started the run has it.
    """
    report, path = Report(), directory / "ledger.db"
    before, at_rest = _stamp(path), False
    try:
        refuse_what_is_no_database(path)
        ledger = Ledger(path, report)
        at_rest = ledger.at_rest
        if ledger.version == SCHEMA:
            folder = features or _feature_folder(ledger.facts, directory, mounted)
            _check_all(ledger, directory, folder, passes, report)
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
        again = {"features": features, "mounted": mounted}
        return check(directory, passes=passes, **again)  # a process began to write meanwhile
    return report


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_mtime_ns, facts.st_size


def check_view(
    view: Any, directory: Path, *, features: Path | None = None, mounted: Path | None = None
) -> Report:
    """Check a run whose ledger is no file, through a view of it (viewed.py). See `check`."""
    report = Report()
    try:
        ledger = ViewedLedger(view, directory)
        steps = check_lineage(ledger, None, report)
        check_counts(ledger, report)
        _check_run(ledger, directory, features or _feature_folder(ledger.facts, directory, mounted), report)
    except PermissionError as error:
        report.forbidden = f"this user may not read {error.filename}"
        return report
    except ChangingError as error:
        report.unchecked = str(error)
        return report
    except NONSENSE as error:
        report.error("C8", f"the ledger makes no sense ({type(error).__name__}: {error})")
        return report
    report.counts |= {"samples": ledger.now.committed, "steps": steps, **_counts(ledger)}
    return report


def _check_all(
    ledger: Ledger, directory: Path, features: Path | None, passes: int | None, report: Report
) -> None:
    _check_counters(ledger, report)
    _check_prompts(ledger, report)
    steps = check_lineage(ledger, passes, report)
    _check_run(ledger, directory, features, report)
    report.counts |= {
        "samples": ledger.run["committed"],
        "steps": steps,
        **_counts(ledger, archived_samples=ledger.run["archived"]),
    }


def _check_run(ledger: AnyLedger, directory: Path, features: Path | None, report: Report) -> None:
    _check_states(ledger, report)
    check_folders(ledger, directory / "checkpoints", report)
    check_best(ledger, directory, report)
    _check_bytes(ledger, features, report)


def _counts(ledger: AnyLedger, **archived: int) -> dict[str, int]:
    return {
        "checkpoints": len(ledger.checkpoints),
        "head_step": ledger.head,
        **archived,
        "quarantined": sum(s.state == "quarantined" for s in ledger.samples.values()),
        "failed_prompts": sum(state == "failed" for state, *_ in ledger.prompts.values()),
    }


# -- C8: counters and prompts ------------------------------------------------------------------


def _check_counters(ledger: Ledger, report: Report) -> None:
    run, samples = ledger.run, ledger.samples
    if len(samples) + run["archived"] != run["committed"]:
        what = f"{run['committed']} samples were committed; {len(samples)} have rows, {run['archived']} are"
        report.error("C8", f"{what} archived")
    finished = sum(block[2] for block in ledger.blocks)
    last = max((block[1] for block in ledger.blocks), default=0)
    with_rows = sum(s.durable and s.step is not None and s.step <= last for s in samples.values())
    if finished - with_rows != run["archived"]:
        what = f"{run['archived']} samples are archived; the archive finishes {finished}, {with_rows} of them"
        report.error("C8", f"{what} have rows")
    odd = [s.sample_id for s in samples.values() if s.place < run["archived_place"] and _may_be_read(s)]
    if odd:
        report.error("C1", f"before place {run['archived_place']}, where no consumer reads any more", odd)
    oldest = min((step for step, *_ in ledger.checkpoints), default=0)
    if not last <= run["archived_step"] <= oldest:
        archived = f"steps are archived up to {last}, the counter says {run['archived_step']}"
        report.error("C8", f"{archived}, the oldest checkpoint is that of step {oldest}")
    used = max(chain(ledger.intents, (s.generation for s in samples.values())), default=0)
    if used >= run["next_generation"]:
        report.error("C9", f"generation {used} is in use, but {run['next_generation']} is the next")
    if run["lsn"] < ledger.starts:
        report.error("C8", f"the log number is {run['lsn']}, but roles were taken {ledger.starts} times")
    if not ledger.in_ordinal_order:
        outside = [s.place for s in samples.values() if not 0 <= s.place < run["committed"]]
        if outside:
            report.error("C8", f"{run['committed']} samples arrived, and one has place {outside[-1]}")


def _may_be_read(sample: Sample) -> bool:
    return (sample.state == "lost" and not sample.durable) or (sample.state == "present" and not sample.acked)


def _check_prompts(ledger: Ledger, report: Report) -> None:
    """A prompt without a row is done below `next_ordinal`, and pending from there on."""
    run, following = ledger.run, ledger.run["next_ordinal"]
    ends = [(0, 0), *ledger.source, (run["num_prompts"], 0)]
    if any(after[0] != before[0] + before[1] for before, after in pairwise(ends)):
        blocks = [f"{first} to {first + count - 1}" for first, count in ledger.source]
        what = f"{run['num_prompts']} prompts are known, but their blocks have a gap or an overlap"
        report.error("C8", what, blocks)
    if following > run["num_prompts"]:
        report.error("C8", f"prompt {following} comes next, but {run['num_prompts']} are known")
    late = [n for n in ledger.prompts if not 0 <= n < following]
    if late:
        report.error("C8", f"prompts have rows that were never leased (the next is {following})", late)
    if run["closed"] and any(state != "failed" and not again for state, again, _ in ledger.prompts.values()):
        report.error("C8", "the stream has ended, but prompts are still to be captured")
    if not ledger.in_ordinal_order:
        return
    misplaced = [s.sample_id for s in ledger.samples.values() if s.ordinal != s.place]
    if misplaced:
        report.error("C8", "places that are not the ordinals of the prompts", misplaced)
    done = following - len(ledger.prompts)
    failed_later = sum(
        s.state in ("lost", "quarantined") and ledger.prompts.get(s.place, ("", True, ""))[0] == "failed"
        for s in ledger.samples.values()
    )
    open_again = sum(is_again and state != "failed" for state, is_again, _ in ledger.prompts.values())
    have = run["committed"] - open_again - failed_later
    if have != done:
        report.error("C1", f"{done} prompts are done, but {have} of their samples are known")


# -- C1: what became of every sample -----------------------------------------------------------


def _check_states(ledger: AnyLedger, report: Report) -> None:
    head = ledger.head
    # Through a read-only connection SQLite does not check CHECK constraints.
    odd = [s.sample_id for s in ledger.samples.values() if s.state not in STATES]
    odd += [f"prompt {n}" for n, (state, *_) in ledger.prompts.items() if state not in PROMPT_STATES]
    if odd:
        report.error("C1", "in an unknown state", odd)
    for s in ledger.samples.values():
        if s.state == "quarantined" and not s.reason:
            report.error("C1", "quarantined without a reason", [s.sample_id])
        if s.state == "released" and not s.durable:
            report.error("C1", "its features were freed before a checkpoint covered it", [s.sample_id])
        if s.durable and ledger.checkpoints and s.step is not None and s.step > head:
            report.error("C1", f"durable by step {s.step}, but the head is {head}", [s.sample_id])
        if s.acked == 1 and s.step is not None and s.step <= head:
            what = f"acked by step {s.step}, which the head covers, but not durable"
            report.error("C1", what, [s.sample_id])
        if s.state == "lost" and s.ordinal is not None and not ledger.will_be_captured(s.ordinal):
            report.error("C1", "lost, and no producer will capture it again", [s.sample_id])
        if s.resident != (s.state == "present") and s.state != "quarantined":
            told = "should" if s.resident else "should not"
            report.error("C9", f"{s.state}, yet the feature store {told} hold its bytes", [s.sample_id])
    lost = [s.sample_id for s in ledger.samples.values() if s.state == "lost"]
    if lost:
        report.note(f"{len(lost)} samples wait to be captured again", lost)
    for s in ledger.samples.values():
        if s.state == "quarantined":
            report.note(f"quarantined: {s.sample_id}: {s.reason}")
    for number, (state, _, reason) in ledger.prompts.items():
        if state == "failed":
            report.note(f"failed prompt {reason or number}")
            if not reason:
                report.error("C1", "failed without a reason", [f"prompt {number}"])


# -- C9: bytes ---------------------------------------------------------------------------------


def _check_bytes(ledger: AnyLedger, folder: Path | None, report: Report) -> None:
    for generation, ids in ledger.shared_generations():
        report.error("C9", f"generation {generation} has two owners", ids)
    for s in ledger.samples.values():
        if s.generation and not (ledger.intents or {}).get(s.generation, ("", True))[1]:
            report.error("C9", f"generation {s.generation} is committed and still promised", [s.sample_id])
        ref = json.loads(s.ref)
        told = (ref["sample_id"], ref.get("generation", 0), ref["estimated_bytes"])
        if told != (s.sample_id, s.generation, s.num_bytes):
            report.error("C9", f"its ref tells of other bytes: {told}", [s.sample_id])
    if folder is None:
        return
    shared = (ledger.facts.get("features_lie") or {}).get("store")
    resident = [s.sample_id for s in ledger.samples.values() if s.resident]
    if shared is None and not folder.is_dir():
        if resident:
            report.note(f"there is no {folder}; captured again at the next start", resident)
    elif shared is None or store_in(folder) == shared:
        _check_slots(ledger, folder, report)
    elif resident:
        report.note(
            f"this host does not see the run's feature store in {folder}, so it was not looked at. If it is "
            "mounted elsewhere here: paceline fsck RUN.yaml, where features.directory says where. If it was "
            "removed, the next start captures its samples again"
        )


def _check_slots(ledger: AnyLedger, folder: Path, report: Report) -> None:
    if folder.lstat().st_uid != ledger.owner:
        report.note(f"{folder} belongs to another user than the ledger, and was not looked at")
        return
    slots, damaged = files_in_use(folder) if is_shared(folder) else slots_in_use(folder)
    resident = {s.sample_id: s for s in ledger.samples.values() if s.resident}
    by_generation = {s.generation: s for s in resident.values() if s.generation}
    held, left = set(), []
    for slot in slots:
        sample = resident.get(slot.sample_id or "")
        if slot.generation >= ledger.run["next_generation"] > 1:
            continue  # begun after the moment of the check
        owner = by_generation.get(slot.generation)
        if slot.sealed and owner is not None and slot.sample_id != owner.sample_id:
            what = f"{slot.name} holds {slot.sample_id} under the generation of"
            report.error("C9", what, [owner.sample_id])
        elif slot.sealed and sample is not None and sample.generation in (0, slot.generation):
            if sample.sample_id in held:
                report.error("C9", f"{slot.name} and another slot hold the same sample", [sample.sample_id])
            held.add(sample.sample_id)
        elif _is_orphan(ledger, slot):
            left.append(f"{slot.name} ({slot.sample_id or 'unreadable'})")
    gone = [sample_id for sample_id in resident if sample_id not in held]
    if gone:  # and not freed by a live run meanwhile
        still = ledger.residents_now()
        gone = [sample_id for sample_id in gone if sample_id in still]
    if gone:
        report.note(f"{len(gone)} samples have no sealed bytes; they will be captured again", gone)
    if left or damaged:
        report.note("slots without an owner, swept when a producer starts", [*left, *damaged])
    report.counts["slots"] = len(slots)


def _is_orphan(ledger: AnyLedger, slot: Slot) -> bool:
    """Whether the slot belongs to no live intent."""
    if ledger.intents is None:
        return False
    sample_id, revoked = ledger.intents.get(slot.generation, ("", True))
    return revoked or (slot.sealed and sample_id != slot.sample_id)


def _feature_folder(facts: dict[str, Any], directory: Path, mounted: Path | None) -> Path | None:
    """The folder where the run keeps its features, by its path on this host."""
    if lies := facts.get("features_lie"):
        if "master" in lies:
            return None
        folder = Path(lies["folder"])
        return folder if mounted is None or "store" not in lies else mounted / folder.name
    config = facts.get("config", {})
    if "features.directory" not in config or "run.name" not in config:
        return None
    place = sha256(str(directory.resolve()))[:8]
    return Path(config["features.directory"]) / f"paceline-{config['run.name']}-{place}"
