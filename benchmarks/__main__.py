"""`python -m benchmarks [--quick] [MODULE...]`: run the benchmarks, print a table, keep the figures.

Every module named here has `run(quick) -> rows`; a row's limit was measured in the same run. The rows go,
with date, device and commit, to benchmarks/results/DATE-benchmarks.json.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.record import commit, keep

MODULES = ("data_plane", "control_plane", "growth")
COLUMNS = ("value", "unit", "limit", "limit_name", "ratio", "goal", "note")


def device() -> str:
    """The processor's name, and how many of its cores this process may use."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.processor()])[0]}, {len(os.sched_getaffinity(0))} cores"


def cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """As Markdown."""
    lines = ["| what | " + " | ".join(COLUMNS).replace("_", " ") + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for row in rows:
        lines.append(f"| {row['name']} | " + " | ".join(cell(row.get(name)) for name in COLUMNS) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("modules", nargs="*", default=MODULES, metavar="MODULE")
    parser.add_argument("--quick", action="store_true", help="about a minute each")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in options.modules:
        found = import_module(f"benchmarks.{name}").run(options.quick)
        print(table(found), flush=True)
        rows += [{"module": name, **row} for row in found]
    date = datetime.now(UTC).isoformat(timespec="seconds")
    told = {"date": date, "device": device(), "commit": commit(), "quick": options.quick}
    path = keep("benchmarks", {**told, "rows": rows})
    print(f"\n{len(rows)} rows in {path}")


if __name__ == "__main__":
    main()
