"""benchmarks/results/reliability.json: of every suite its latest run, each with its own date and commit."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, commit

PATH = RESULTS / "reliability.json"


def record(results: Sequence[dict[str, Any]], scale: float, path: Path = PATH) -> list[str]:
    """Replace the records of these suites and no other; what was replaced, one line each."""
    suites = (
        {known["suite"]: known for known in json.loads(path.read_text())["suites"]} if path.exists() else {}
    )
    old = [suites[result["suite"]] for result in results if result["suite"] in suites]
    origin = {
        "date": str(datetime.now(UTC).date()),
        "commit": commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "scale": scale,
    }
    for result in results:
        suites[result["suite"]] = {"suite": result["suite"], **origin, **result}
    path.write_text(json.dumps(_with_totals(list(suites.values())), indent=1) + "\n")
    return [
        f"{known['suite']}: the record of {known['date']} was replaced "
        f"(commit {known['commit']}, scale {known['scale']:g}, seed {known['seed']})"
        for known in old
    ]


def _with_totals(suites: list[dict[str, Any]]) -> dict[str, Any]:
    violated = [suite["suite"] for suite in suites if "error" in suite]
    return {
        "benchmark": "reliability",
        "violations": len(violated),
        "violated": violated,
        "seconds": sum(suite.get("seconds", 0) for suite in suites),
        "suites": sorted(suites, key=lambda suite: str(suite["suite"])),
    }
