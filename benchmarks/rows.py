"""The rows that every benchmark returns, and how a value is set against a limit of the same run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


def row(name: str, value: float, unit: str, **more: Any) -> Row:
    empty = {"limit": None, "limit_name": None, "ratio": None, "goal": None}
    return {"name": name, "value": value, "unit": unit, **empty, **more}


def against(name: str, values: Sequence[float], limits: Sequence[float], unit: str, **more: Any) -> Row:
    """Of values and limits measured in pairs: medians, and the median of the ratios."""
    ratio = statistics.median(value / limit for value, limit in zip(values, limits, strict=True))
    middle = statistics.median
    return row(name, middle(values), unit, limit=middle(limits), ratio=ratio, **more)
