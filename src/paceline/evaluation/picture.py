"""A picture of a report on suites, as SVG: acceptance length and speed-up of each way, with its interval."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from xml.sax.saxutils import escape

COLOURS = {"tree": "#2a7f62", "chain": "#6fb59b", "lookup": "#9aa5b1"}
INK = "#222222"
LABEL, CHART, GAP, ROW, TOP = 230, 300, 40, 18, 46  # pixels
FIGURES = (
    ("acceptance_length", "acceptance length: 1 + accepted / cycles"),
    ("speed_up", "speed-up over plain decoding"),
)


def picture_of(report: Mapping[str, Any]) -> str:
    """The groups of every part below each other; a bar begins at 1, where nothing is gained."""
    rows = list(_rows(report))
    height = TOP + ROW * len(rows) + 30
    width = LABEL + len(FIGURES) * (CHART + GAP)
    title = f"{report['run']}, checkpoint of step {report['checkpoint_step']}; lines: 95 % over prompts"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(8, 16, title),
    ]
    for place, (label, name, _) in enumerate(rows):
        parts.append(_text(LABEL - 8, TOP + ROW * place + 12, f"{label} {name}", "end"))
    for column, (key, heading) in enumerate(FIGURES):
        left = LABEL + column * (CHART + GAP)
        parts.append(_text(left, 34, heading))
        parts += _bars(rows, key, left)
    return "\n".join([*parts, "</svg>", ""])


def _rows(report: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for part in report["suites"]:
        for group in part["groups"]:
            place = part["suite"].rpartition("/")[2]
            category = "" if group["category"] == "all" else f", {group['category']}"
            for name, figures in group["ways"].items():
                yield f"{place}{category}, t={part['temperature']:g}:", name, figures


def _bars(rows: list[tuple[str, str, Mapping[str, Any]]], key: str, left: int) -> Iterator[str]:
    known = [(place, name, figures) for place, (_, name, figures) in enumerate(rows) if figures[key]]
    ends = [max([figures[key], *(figures[f"{key}_interval"] or ())]) for _, _, figures in known]
    low = min([0.9, *(figures[key] for _, _, figures in known)])
    scale = CHART / (max([1.1, *ends]) - low)

    def x(value: float) -> float:
        return float(left + max(0.0, value - low) * scale)

    bottom = TOP + ROW * len(rows)
    for place, name, figures in known:
        y, value, interval = TOP + ROW * place, figures[key], figures[f"{key}_interval"]
        first, last = sorted((x(1.0), x(value)))
        yield _rectangle(first, y + 3, last - first, COLOURS.get(name, INK))
        if interval:
            yield _line(x(interval[0]), y + 9, x(interval[1]), y + 9)
        yield _text(max(x(value), x(interval[1]) if interval else 0) + 4, y + 12, f"{value:.2f}")
    yield _line(x(1.0), TOP, x(1.0), bottom)
    yield _text(x(1.0), bottom + 14, "1", "middle")


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{INK}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{INK}"/>'


def _rectangle(x: float, y: float, width: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="12" fill="{colour}"/>'
