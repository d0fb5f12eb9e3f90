"""Figures are kept: benchmarks/results/DATE-NAME.json, with the commit that they were measured at."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def commit() -> str:
    git = ["git", "-C", str(RESULTS), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()


def place(name: str) -> Path:
    """Today's file of that name, whether it is there or not."""
    return RESULTS / f"{datetime.now(UTC).date()}-{name}.json"


def keep(name: str, report: Mapping[str, Any]) -> Path:
    """The file that was written; an earlier one of the same name and day is gone."""
    path = place(name)
    path.write_text(json.dumps(report, indent=1) + "\n")
    return path
