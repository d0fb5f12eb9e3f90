"""A run as one HTML file that stands alone: its report and the measured answers, set as a page."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path

from paceline.monitoring.texts import AnswerText, AnswerTexts, Piece
from paceline.run_report.document import Check, RunReport
from paceline.run_report.tables import Part, acceptance, cost, figure, guarantee, lineage, whole, whole_of
from paceline.terminal import printable

STYLE = Path(__file__).parent / "page" / "page.css"
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 560, 220, 48, 10, 28  # of a drawing, in pixels
ANSWERS_SHOWN = 8
Line = Sequence[tuple[float, float]]


def report_page(report: RunReport, answers: AnswerTexts | None) -> str:
    """The HTML. `answers`: of the newest measurement; None if none are kept."""
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(report.time))
    where = f"{report.directory}; {report.state}; written {written} by paceline {report.version}"
    parts = [
        f"<h1>{_text(report.run)}</h1><p class='dim'>{_text(where)}</p>",
        _facts(report),
        _section("Curves", f"<div class='charts'>{_curves(report)}</div>"),
        *(_part(part) for part in _acceptance(report)),
        _part(guarantee(report.check)) + _errors(report.check),
        _part(lineage(report)) + _left_out(report),
        *([_answers(answers)] if answers is not None and answers.ways else []),
        _part(cost(report)),
        _section("Settings", _table(("setting", "value"), _settings(report))),
    ]
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{_text(report.run)}: report</title><style>{STYLE.read_text()}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _text(value: object) -> str:
    return escape(printable(str(value)))


def _section(title: str, body: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{body}</section>"


def _part(part: Part) -> str:
    style = "problem" if part.is_bad else "told"
    told = "".join(f"<p class='{style}'>{_text(words)}</p>" for words in part.told)
    return _section(part.title, told + (_table(part.heads, part.rows) if part.heads else ""))


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    shown = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    head = "".join(f"<th scope='col'>{_text(name)}</th>" for name in heads)
    return (
        f"<div class='card scroll'><table><thead><tr>{head}</tr></thead><tbody>{shown}</tbody></table></div>"
    )


def _facts(r: RunReport) -> str:
    best = None if r.best_step is None else r.measured_at(r.best_step)
    length = "-" if best is None else f"{best.ways[0].acceptance_length:.2f} at step {whole(r.best_step)}"
    facts = {
        "steps": whole_of(r.steps, r.planned_steps),
        "samples trained": whole(r.samples["trained"]),
        "loss": figure(r.loss, 3),
        "best acceptance length": length,
        "restarts": whole(r.restarts),
    }
    shown = "".join(f"<div><dt>{name}</dt><dd>{_text(value)}</dd></div>" for name, value in facts.items())
    why = f"<p class='problem'>{_text(r.error)}</p>" if r.error else ""
    return f"{why}<dl class='facts'>{shown}</dl>"


def _settings(r: RunReport) -> Iterator[tuple[str, str]]:
    for key, value in r.settings.items():
        yield key, value if isinstance(value, str) else json.dumps(value)


def _acceptance(r: RunReport) -> Iterator[Part]:
    """Of the newest measured checkpoint, and of the best if that is another one."""
    steps = dict.fromkeys([*(one.step for one in r.measured[-1:]), r.best_step])
    measured = [one for step in steps if step is not None and (one := r.measured_at(step)) is not None]
    for one in measured:
        yield acceptance(one, is_best=one.step == r.best_step)
    if not measured:
        yield Part("Acceptance", ("No checkpoint was measured yet: paceline evaluate RUN",))


def _errors(check: Check) -> str:
    rows = [(rule.name, error) for rule in check.rules for error in rule.errors]
    return _table(("rule", "what is wrong"), rows) if rows else ""


def _left_out(r: RunReport) -> str:
    return _table(("left out", "why"), r.left_out.items()) if r.left_out else ""


# -- answers ---------------------------------------------------------------------------------


def _answers(found: AnswerTexts) -> str:
    way = found.ways[0]
    shown = way.answers[:ANSWERS_SHOWN]
    more = len(way.answers) - len(shown) + found.left_out
    told = (
        f"Held-out prompts, decoded with the draft of step {found.step} and a {way.guesses}. Each answer is "
        "the target's own, and shaded; underlined are the draft's tokens, which the target accepted."
    )
    rest = f"<p class='dim'>{more} more prompts are not shown.</p>" if more else ""
    return _section("Answers", f"<p class='told'>{_text(told)}</p>{''.join(map(_answer, shown))}{rest}")


def _answer(one: AnswerText) -> str:
    length = "" if one.acceptance_length is None else f"; acceptance length {one.acceptance_length:.2f}"
    counts = f"{one.drafted_tokens} of {one.answer_tokens} tokens are the draft's{length}"
    more = f" ... and {one.text.left_out} more tokens" if one.text.left_out else ""
    text = "".join(map(_piece, one.text.pieces)) + more
    return f"<h3>{_text(one.prompt_id)} <span class='dim'>{counts}</span></h3><pre>{text}</pre>"


def _piece(piece: Piece) -> str:
    if not piece.is_answer:
        return _text(piece.text)
    return f"<mark{' class=drafted' if piece.is_drafted else ''}>{_text(piece.text)}</mark>"


# -- curves ----------------------------------------------------------------------------------


def _curves(r: RunReport) -> str:
    chain = [(one.step, one.ways[0].acceptance_length) for one in r.measured]
    return _drawn("Loss by step", r.losses, dots=False) + _drawn(
        "Acceptance length of the chain by step", chain, dots=True
    )


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
