"""One picture of a report: ratios against their goals, our ways against the usual ones, and curves.

    python -m benchmarks.plot benchmarks/results/DATE-benchmarks.json

Bars: every row with a goal. Beside it: rows that name what they are an alternative to (`instead_of`), and
rows that are a point of a curve (`curve`, `x`), one small axis for each curve, x logarithmic.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Rows = Sequence[dict[str, Any]]
REACHED, MISSED, USUAL, INK = "#2a7f62", "#d08c2f", "#9aa5b1", "#222222"
INCHES_A_BAR = 0.27
LONGEST_BAR = 1.5  # a ratio beyond is cut there, and written


def ratios(axes: Axes, rows: Rows) -> None:
    """Value over the limit of the same run; a tick where the goal is."""
    for place, row in enumerate(rows):
        reached = row["ratio"] >= row["goal"]
        axes.barh(place, min(row["ratio"], LONGEST_BAR), color=REACHED if reached else MISSED, height=0.66)
        axes.plot([row["goal"]] * 2, [place - 0.42, place + 0.42], color=INK, linewidth=1.6)
        axes.text(
            min(row["ratio"], LONGEST_BAR) + 0.02, place, f"{row['ratio']:.2f}", va="center", fontsize=7
        )
    axes.set_yticks(range(len(rows)), [f"{row['name']}  [{row['limit_name']}]" for row in rows], fontsize=7)
    axes.set_xlim(0, LONGEST_BAR + 0.2)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_title("ratio to the limit in brackets, measured in the same run; tick: the goal", fontsize=9)


def alternatives(axes: Axes, ours: dict[str, Any], others: Rows) -> None:
    """One value and what a user would otherwise pick, in the same unit."""
    shown = sorted([ours, *others], key=lambda row: -float(row["value"]))
    for place, row in enumerate(shown):
        axes.barh(place, row["value"], color=REACHED if row is ours else USUAL, height=0.66)
        axes.text(row["value"], place, f" {row['value']:.3g}", va="center", fontsize=7)
    names = ["Paceline" if row is ours else row["name"].rpartition(": ")[2] for row in shown]
    axes.set_yticks(range(len(shown)), names, fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_title(f"{ours['name']}, {ours['unit']}", fontsize=9)


def curve(axes: Axes, name: str, rows: Rows) -> None:
    axes.plot([row["x"] for row in rows], [row["value"] for row in rows], "o-", color=REACHED, markersize=4)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_title(f"{name}, {rows[0]['unit']}", fontsize=9)
    axes.tick_params(labelsize=7)


def picture(report: dict[str, Any]) -> Figure:
    """Of the report that the runner keeps."""
    bars = [row for row in report["rows"] if row["ratio"] is not None and row["goal"] is not None]
    by_name = {row["name"]: row for row in report["rows"]}
    usual, curves = defaultdict(list), defaultdict(list)
    for row in report["rows"]:
        if row.get("instead_of") in by_name and row["value"]:
            usual[row["instead_of"]].append(row)
        if "curve" in row:
            curves[row["curve"]].append(row)
    panels = len(usual) + len(curves)
    figure = Figure(figsize=(13, max(4.0, INCHES_A_BAR * len(bars), 1.9 * panels)), layout="constrained")
    [[left, right]] = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.35, 1.0))
    ratios(left.subplots(), bars)
    if panels:
        axes = list(right.subplots(panels, 1, squeeze=False)[:, 0])
        for name, others in usual.items():
            alternatives(axes.pop(0), by_name[name], others)
        for name, points in curves.items():
            curve(axes.pop(0), name, points)
    when = f"{report['date'][:10]}, {report['device']}, {report['commit']}"
    figure.suptitle(f"Paceline benchmarks: {when}{', quick' if report['quick'] else ''}", fontsize=10)
    return figure


def draw(path: Path) -> Path:
    """Write the picture of the report in `path` beside it; its path."""
    out = path.with_suffix(".svg")
    with mpl.rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "none"}):
        picture(json.loads(path.read_text())).savefig(out, metadata={"Date": None})
    return out


if __name__ == "__main__":
    print(draw(Path(sys.argv[1])))
