"""`python -m benchmarks [--quick] [MODULE...]`: run the benchmarks, print a table, keep the figures.

Every module named here has `run(quick) -> rows`; a row's limit was measured in the same run. The rows go,
with date, device and commit, to benchmarks/results/DATE-benchmarks.json, a picture of them beside it
(plot.py). With only some modules named, the rows of the others stay as they are if they are of the same
day, device, commit and thoroughness; else they go.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.plot import draw
from benchmarks.record import commit, keep, place

MODULES = (
    "start",
    "data_plane",
    "control_plane",
    "ledger_server",
    "prefix",
    "producers",
    "growth",
    "checkpoint",
    "training_step",
    "ledger_share",
    "long_samples",
    "trainers",
    "capture",
    "pipeline",
)
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


def earlier(told: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows kept today, if they were measured under the same conditions."""
    path = place("benchmarks")
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return kept["rows"] if all(kept.get(name) == value for name, value in told.items()) else []


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("modules", nargs="*", default=MODULES, metavar="MODULE")
    parser.add_argument("--quick", action="store_true", help="about a minute each")
    options = parser.parse_args()
    unknown = set(options.modules) - set(MODULES)
    if unknown:
        parser.error(f"no benchmark is called {sorted(unknown)[0]}; there are {', '.join(MODULES)}")
    date = datetime.now(UTC).isoformat(timespec="seconds")
    told = {"device": device(), "commit": commit(), "quick": options.quick}
    rows = [row for row in earlier(told) if row["module"] not in options.modules]
    for name in options.modules:
        found = import_module(f"benchmarks.{name}").run(options.quick)
        print(table(found), flush=True)
        rows += [{"module": name, **row} for row in found]
        rows.sort(key=lambda row: MODULES.index(row["module"]))
        path = keep("benchmarks", {"date": date, **told, "rows": rows})
    print(f"\n{len(rows)} rows in {path}, drawn in {draw(path)}")


if __name__ == "__main__":
    main()
