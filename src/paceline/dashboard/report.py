"""A run as one HTML file that stands alone: what it is, its curves, what was measured, what was checked."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from paceline import __version__
from paceline.evaluation.curve import shape
from paceline.fsck.report import RULES, Report
from paceline.ledger.facts import CONFIG
from paceline.ledger.records import Snapshot
from paceline.monitoring.history import RunHistory
from paceline.monitoring.schema import RunStatus

STYLE = Path(__file__).parent / "page" / "page.css"
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 560, 220, 48, 10, 28  # of a drawing, in pixels
Line = Sequence[tuple[float, float]]


def report_page(
    status: RunStatus, now: Snapshot, history: RunHistory, evaluation: Mapping[str, Any], check: Report
) -> str:
    """The HTML. `evaluation`: as evaluation.json holds it; {} if nothing was measured at the end."""
    title = escape(f"{status.run}: report")
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(status.time))
    parts = [
        f"<h1>{escape(status.run)}</h1><p class='dim'>{escape(status.directory)}; {escape(status.state)}; "
        f"written {written} by paceline {__version__}</p>",
        _facts(status),
        _part("Curves", f"<div class='charts'>{_curves(history)}</div>"),
        _part("Acceptance on held-out prompts", _measured(evaluation)),
        _part("The guarantee", _checked(check)),
        _part("Lineage", _lineage(status, now)),
        _part("What it cost", _cost(history)),
        _part("Settings", _table(("setting", "value"), _settings(now))),
    ]
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{title}</title><style>{STYLE.read_text()}</style></head><body><main>{''.join(parts)}</main>"
        "</body></html>\n"
    )


def _part(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    shown = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    head = "".join(f"<th scope='col'>{escape(name)}</th>" for name in heads)
    return (
        f"<div class='card scroll'><table><thead><tr>{head}</tr></thead><tbody>{shown}</tbody></table></div>"
    )


def _facts(s: RunStatus) -> str:
    best = s.evaluation.best
    of = f" of {s.step.planned}" if s.step.planned else ""
    facts = {
        "steps": f"{s.step.number}{of}",
        "samples trained": str(s.samples.trained),
        "loss": _figure(s.step.loss),
        "best acceptance length": "-"
        if best is None
        else f"{best.acceptance_length:.2f} at step {best.step}",
        "restarts": str(s.restarts),
    }
    shown = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    why = f"<p class='problem'>{escape(s.error)}</p>" if s.error else ""
    return f"{why}<dl class='facts'>{shown}</dl>"


def _curves(history: RunHistory) -> str:
    loss = [(p.step, p.loss) for p in history.trained if p.loss is not None]
    chain = [(p.step, p.acceptance_length) for p in history.measured]
    return _drawn("Loss by step", loss, dots=False) + _drawn("Acceptance length by step", chain, dots=True)


def _drawn(title: str, line: Line, *, dots: bool) -> str:
    if not line:
        return (
            f"<figure class='card'><figcaption><strong>{title}</strong></figcaption><p>Nothing.</p></figure>"
        )
    xs, ys = zip(*line, strict=True)
    low, high = min(ys), max(ys)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    low, high = low - room, high + room

    def at(x: float, y: float) -> tuple[float, float]:
        right = (x - xs[0]) / ((xs[-1] - xs[0]) or 1) * (WIDTH - LEFT - 12)
        return LEFT + right, HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    points = [at(x, y) for x, y in line]
    grid = ""
    for y in (min(ys), max(ys)):
        height = at(xs[0], y)[1]
        grid += f"<line class='grid' x1='{LEFT}' x2='{WIDTH - 12}' y1='{height:.1f}' y2='{height:.1f}'/>"
        grid += f"<text x='{LEFT - 6}' y='{height + 4:.1f}' text-anchor='end'>{y:.4g}</text>"
    for x, anchor in {xs[0]: "start", xs[-1]: "end"}.items():
        grid += f"<text x='{at(x, ys[0])[0]:.1f}' y='{HEIGHT - 8}' text-anchor='{anchor}'>{x:g}</text>"
    drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    circles = "".join(f"<circle class='dot c0' cx='{x:.1f}' cy='{y:.1f}' r='3'/>" for x, y in points)
    told = f"{title}: from {ys[0]:.4g} to {ys[-1]:.4g}"
    shown = circles if dots or len(line) == 1 else ""
    return (
        f"<figure class='card'><figcaption><strong>{title}</strong></figcaption>"
        f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label='{told}'>{grid}"
        f"<polyline class='line c0' points='{drawn}'/>{shown}</svg></figure>"
    )


def _measured(found: Mapping[str, Any]) -> str:
    if not found:
        return "<p class='card'>Nothing was measured at the end of training: paceline evaluate RUN</p>"
    ways = [("draft", found["chain"])]
    if found["branching"] != 1:
        ways.append(("draft", found))
    if "lookup" in found:
        ways.append(("prompt lookup, no draft", found["lookup"]))
    rows = [
        (
            f"{name}, {shape(way)}",
            _with_interval(way, "acceptance_length"),
            _with_interval(way, "speed_up"),
            ", ".join(f"{100 * float(rate):.0f} %" for rate in way.get("acceptance_rate", ())),
        )
        for name, way in ways
    ]
    told = (
        f"Step {escape(str(found.get('checkpoint_step', '?')))}, {found['prompts']} prompts. In brackets: "
        "95 % intervals over prompts. Acceptance length is 1 + accepted / cycles; by position: the share of "
        "cycles in which that draft token is accepted."
    )
    heads = ("way to draft", "acceptance length", "speed-up over plain decoding", "by position")
    return f"<p class='dim'>{told}</p>{_table(heads, rows)}"


def _with_interval(way: Mapping[str, Any], name: str) -> str:
    interval = way.get(f"{name}_interval")
    if not isinstance(interval, list) or len(interval) != 2:
        return _figure(way.get(name))
    return f"{_figure(way.get(name))} [{_figure(interval[0])}, {_figure(interval[1])}]"


def _figure(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, int | float) and math.isfinite(value) else "-"


def _checked(check: Report) -> str:
    sound = not check.errors
    words = "Sound: every rule holds." if sound else f"UNSOUND: {len(check.errors)} errors."
    looked = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in check.counts.items())
    rows = [(rule, promise, "; ".join(check.errors_of(rule)) or "holds") for rule, promise in RULES.items()]
    style = "words" if sound else "problem"
    return (
        f"<p class='{style}'>{words}</p><p class='dim'>Checked by a program that shares no code with the "
        f"trainer: {escape(looked)}.</p>{_table(('rule', 'promise', 'verdict'), rows)}"
    )


def _lineage(s: RunStatus, now: Snapshot) -> str:
    head = now.head
    rows = [
        ("samples committed", s.samples.committed),
        ("trained", s.samples.trained),
        ("of these not yet in a checkpoint", s.samples.provisional),
        ("in quarantine", s.samples.quarantined),
        ("prompts that failed", s.prompts.failed),
        ("newest checkpoint", "none" if head is None else f"{head.name}, manifest {head.manifest_digest}"),
        ("hash of all plans up to it", "-" if head is None else head.chain),
    ]
    reasons = [(name, why) for name, why in (*s.quarantined.items(), *s.failed_prompts.items())]
    return _table(("what", "how many"), rows) + (_table(("left out", "why"), reasons) if reasons else "")


def _cost(history: RunHistory) -> str:
    rows: list[tuple[object, ...]] = []
    for role in history.timeline:
        seconds = sum(span.end - span.begin for span in role.spans)
        ends = [span.ended for span in role.spans]
        rows.append((role.role, len(ends), ends.count("killed"), _duration(seconds)))
    spans = [span for role in history.timeline for span in role.spans]
    if spans:
        whole = max(span.end for span in spans) - min(span.begin for span in spans)
        rows.append(("from first to last", "", "", _duration(whole)))
    return _table(("process", "starts", "killed", "time"), rows)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 3600:.2f} h"


def _settings(now: Snapshot) -> list[tuple[str, object]]:
    found = now.facts.get(CONFIG)
    return sorted((str(name), value) for name, value in found.items()) if isinstance(found, dict) else []
