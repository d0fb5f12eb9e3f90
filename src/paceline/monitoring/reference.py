"""Writes the tables of docs/status.md from the descriptions in schema.py."""

from __future__ import annotations

from typing import Any

import msgspec

from paceline.monitoring.metrics import METRICS
from paceline.monitoring.runs import FoundRun
from paceline.monitoring.schema import RunStatus
from paceline.run_report.document import RunReport

BEGIN = "<!-- from here on written by `make reference` -->\n"


def status_tables() -> str:
    """A table for the document, and one for each of its parts, in Markdown."""
    _, parts = msgspec.json.schema_components([RunStatus, FoundRun, RunReport], ref_template="{name}")
    names = ["RunStatus", *(name for name in parts if name != "RunStatus")]
    return "\n".join(_table(name, parts[name]) for name in names)


def metrics_table() -> str:
    rows = ["| `paceline_up` | gauge |  | 1 if the run could be read; 0 comes alone |"]
    rows += [
        f"| `{metric.sample_name}` | {metric.kind} | {', '.join(metric.labels)} | {metric.meaning} |"
        for metric in METRICS
    ]
    return "\n".join(["| metric | kind | labels | meaning |", "|---|---|---|---|", *rows, ""])


def _table(name: str, part: dict[str, Any]) -> str:
    rows = [
        f"| `{field}` | {_type(told)} | {told.get('description', '')} |"
        for field, told in part["properties"].items()
    ]
    described = part.get("description", "").strip()
    title = "The document" if name == "RunStatus" else f"`{name}`"
    head = [f"## {title}", "", *([described, ""] if described and name != "RunStatus" else [])]
    return "\n".join([*head, "| field | type | meaning |", "|---|---|---|", *rows, ""])


def _type(told: dict[str, Any]) -> str:
    if "anyOf" in told:
        return " or ".join(_type(one) for one in told["anyOf"])
    if "$ref" in told:
        return f"`{told['$ref']}`"
    if "prefixItems" in told:
        return f"({', '.join(map(_type, told['prefixItems']))})"
    if told.get("type") == "array":
        return f"list of {_type(told['items'])}"
    if told.get("type") == "object":
        return f"object of {_type(told.get('additionalProperties', {}))}"
    return str(told.get("type", "any"))
