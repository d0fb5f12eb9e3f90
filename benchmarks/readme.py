"""The README's table of figures, made from the newest report: `python -m benchmarks.readme`.

A test compares the two, so that no figure in the README is older than what is kept or typed by hand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- figures: begin -->\n", "<!-- figures: end -->\n"

# A row's name in the report, and how the README calls it.
SHOWN = {
    "put 8 MB": "into the feature store, 8 MB samples, digested",
    "get, besides copy and digest": "out of it: what a call costs besides copy and digest",
    "stream 8 MB": "from process to process, 8 MB samples, ledger on",
    "stream 1 MB": "the same, 1 MB samples",
    "stream 8 MB: torch.multiprocessing queue": "instead: a torch.multiprocessing queue, 8 MB",
    "stream 8 MB: safetensors file per sample": "instead: a safetensors file per sample, 8 MB",
    "NORMAL, producer + consumer, batch 256": "lease, reserve, commit, plan and ack, two processes",
    "answer greedy, capture, put": "answer, capture and store, greedy",
    "answer sampled, capture, put": "the same, sampled",
    "training step": "unrolled EAGLE-3 step, depth 4",
    "staging 120 MB": "what training waits for at a checkpoint: a copy",
    "whole pipeline, the producer slower: samples captured": "whole run, producer the slower side",
    "whole pipeline, the consumer slower: samples trained": "whole run, consumer the slower side",
    "share of a step spent waiting for data, plan included": "share of a step that waits for data",
}


def newest() -> Path:
    return max(RESULTS.glob("*-benchmarks.json"))


def figures(report: dict[str, Any], name: str) -> str:
    """As Markdown. Raises KeyError if the report lacks a row that the README shows."""
    rows = {row["name"]: row for row in report["rows"]}
    lines = [
        f"`make bench` on {report['device']}, {report['date'][:10]}, commit {report['commit']}; every limit "
        f"was measured in the same run ([all rows](benchmarks/results/{name}.json), "
        f"[picture](benchmarks/results/{name}.svg)):",
        "",
        "| what | value | limit | ratio |",
        "|---|---|---|---|",
    ]
    for row_name, label in SHOWN.items():
        row = rows[row_name]
        limit = "" if row["limit"] is None else f"{number(row['limit'])} ({row['limit_name']})"
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        lines.append(f"| {label} | {number(row['value'])} {row['unit']} | {limit} | {ratio} |")
    return "\n".join(lines) + "\n"


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def with_figures(text: str, block: str) -> str:
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{block}{END}{after}"


def expected() -> str:
    """The README with the newest figures in it."""
    path = newest()
    return with_figures(README.read_text(), figures(json.loads(path.read_text()), path.stem))


if __name__ == "__main__":
    README.write_text(expected())
