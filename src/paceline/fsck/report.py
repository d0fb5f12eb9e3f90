"""The checker's rules, and its report: which rule is broken, by which ids."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

RULES = {
    "C1": "every committed sample is trained, quarantined with a reason, or still to be trained",
    "C2": "no sample is trained more often than configured, or finished twice",
    "C3": "every checkpoint continues the one before, and its chain is the hash of its steps",
    "C4": "steps have no gaps, first visits follow the log, checkpoints contain the same steps",
    "C5": "checkpoints on disk are the ones recorded, byte for byte",
    "C8": "counters, prompts and archived history agree",
    "C9": "bytes have one owner, and no generation is used twice",
    "C10": "drafts that are held beyond their checkpoints, such as the best one, are as they were written",
}
SHOWN = 5  # ids in one line


@dataclass
class Report:
    """The findings.

    `errors` break the guarantee; each begins with its rule. `notes` are harmless. `counts`: how much was
    checked. `unchecked`: why the ledger was not checked at all. `forbidden`: what this user may not read.
    `newer`: checkpoints of later steps than the ledger knows. `is_resumable`: a recorded checkpoint is whole,
    or none was recorded yet.
    """

    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    unchecked: str = ""
    forbidden: str = ""
    newer: list[str] = field(default_factory=list)
    is_resumable: bool = True

    def error(self, rule: str, what: str, ids: Iterable[Any] = ()) -> None:
        self.errors.append(f"{rule} {what}{_named(ids)}")

    def error_once(self, rule: str, what: str) -> None:
        if f"{rule} {what}" not in self.errors:
            self.error(rule, what)

    def note(self, what: str, ids: Iterable[Any] = ()) -> None:
        self.notes.append(f"{what}{_named(ids)}")

    def errors_of(self, rule: str) -> list[str]:
        return [error.removeprefix(f"{rule} ") for error in self.errors if error.startswith(f"{rule} ")]


def _named(ids: Iterable[Any]) -> str:
    shown = [str(i) for i in ids]
    more = f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    return f": {', '.join(shown[:SHOWN])}{more}" if shown else ""
