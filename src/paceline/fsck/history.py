"""The checker's rules for a history of calls, compared with the ledger that they produced.

A history is JSON lines, one written before each call and one after it:
{"op": "commit", "phase": "invoke" | "ok" | "fail" | "unknown", "actor": "producer", "epoch": 2,
"lsn": 17, "ids": [...]}. `actor` begins with its role ("producer", "consumer:3"); `epoch` is the actor's,
and after an `acquire` the new one; `lsn` is the ledger's log number, as an `ok` saw it. A call without a
result (its process was killed) may have happened, like an unknown one. A torn last line is ignored.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw

from paceline.fsck.artefacts import SCHEMA, Ledger
from paceline.fsck.report import Report

UNREADABLE = (AttributeError, LookupError, OSError, TypeError, ValueError)


def check_history(path: Path, directory: Path | None = None) -> Report:
    """Compare the history at `path` with the ledger in `directory` (default: the history's folder).

    C1: the ledger knows what was committed. C6: it does not know what only failed calls tried. C7: no call
    succeeded that began after a successor took the role. C8: the log number never goes back.
    """
    report, calls = Report(), list[dict[str, Any]]()
    try:
        calls += _lines(path)
        ledger = Ledger((directory or path.parent) / "ledger.db", report)
        if ledger.version != SCHEMA:
            report.unchecked = f"ledger.db has schema version {ledger.version}, this checker knows {SCHEMA}"
            return report
        _check_effects(calls, ledger, report)
        _check_epochs(calls, report)
        _check_log_numbers(calls, ledger.run["lsn"], report)
        ledger.close()
    except (apsw.Error, *UNREADABLE) as error:
        report.error("C8", f"ledger.db or history cannot be read ({type(error).__name__}: {error})")
    report.counts["calls"] = sum(call["phase"] == "invoke" for call in calls)
    return report


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


def _check_effects(calls: list[dict[str, Any]], ledger: Ledger, report: Report) -> None:
    states = {sample.sample_id: sample.state for sample in ledger.samples.values()}
    archived = {v.sample_id for step in ledger.steps() if step.archived for v in step.visits if v.finished}
    known = {
        "commit": states.keys() | archived,
        "quarantine": {i for i, s in states.items() if s == "quarantined"},
    }
    for op, ids in known.items():
        phases: dict[str, list[str]] = defaultdict(list)
        for call in calls:
            for sample_id in call.get("ids", []) if call["op"] == op else []:
                phases[sample_id].append(call["phase"])
        gone = [i for i, seen in phases.items() if "ok" in seen and i not in ids]
        if gone:
            report.error("C1", f"the {op} of samples returned, and the ledger does not know it", gone)
        # Every call failed, so none of them may have happened.
        failed = [i for i, seen in phases.items() if seen.count("fail") == seen.count("invoke") and i in ids]
        if failed:
            report.error("C6", f"every {op} of samples failed, and yet it happened", failed)


def _check_epochs(calls: list[dict[str, Any]], report: Report) -> None:
    newest: dict[str, int] = {}  # by role: the epoch of an acquire that has returned
    began: dict[tuple[str, int | None, str], int] = {}  # by call: the role's newest epoch at that time
    for call in calls:
        role = call["actor"].partition(":")[0]
        key = (call["actor"], call.get("epoch"), call["op"])
        if call["op"] == "acquire":
            if call["phase"] == "ok":
                if call["epoch"] <= newest.get(role, 0):
                    report.error("C7", f"{call['actor']} acquired epoch {call['epoch']} after a newer one")
                newest[role] = max(newest.get(role, 0), call["epoch"])
        elif call["phase"] == "invoke":
            began[key] = newest.get(role, 0)
        elif call["phase"] == "ok" and call.get("epoch") is not None and call["epoch"] < began.get(key, 0):
            what = f"{call['actor']} of epoch {call['epoch']} did {call['op']} after epoch {began[key]} began"
            report.error("C7", what, call.get("ids", []))


def _check_log_numbers(calls: list[dict[str, Any]], last: int, report: Report) -> None:
    highest = 0
    floor: dict[tuple[str, int | None, str], int] = {}  # by call: the log number known when it began
    for call in calls:
        key = (call["actor"], call.get("epoch"), call["op"])
        if call["phase"] == "invoke":
            floor[key] = highest
        elif call["phase"] == "ok" and call.get("lsn") is not None:
            if call["lsn"] < floor.get(key, 0):
                what = f"{call['actor']} saw log number {call['lsn']} after {floor[key]} had been seen"
                report.error("C8", what)
            highest = max(highest, call["lsn"])
    if last < highest:
        report.error("C8", f"the ledger ends at log number {last}, but {highest} had been seen")
