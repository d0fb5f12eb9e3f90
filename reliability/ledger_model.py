"""The SQLite ledger against the specification: seeded random runs of every call, in any order."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

from paceline.testing.ledger_machine import DisagreementError
from paceline.testing.ledger_plays import play_at_random
from paceline.testing.ledger_subjects import SQLiteSubject

RUNS = 1500
MOVES = 90
MEMORY = Path("/dev/shm")  # noqa: S108 (the ledger itself is what is tested, not the disk)


def run(scale: float, seed: int) -> dict[str, int]:
    """Raises DisagreementError, naming the run's seed and its calls, at the first difference."""
    counts: Counter[str] = Counter()
    for number in range(max(1, int(RUNS * scale))):
        with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
            one = seed * 1_000_000 + number
            try:
                counts += play_at_random(SQLiteSubject(Path(folder) / "ledger.db"), one, MOVES)
            except DisagreementError as found:
                raise DisagreementError(f"play_at_random(subject, {one}, {MOVES}): {found}") from found
        counts["runs"] += 1
    calls = sum(n for name, n in counts.items() if name.endswith((" done", " refused")))
    met = {name.removeprefix("met: "): n for name, n in sorted(counts.items()) if name.startswith("met: ")}
    return {"runs": counts["runs"], "calls": calls, **met}
