"""A report's parts as plain text: sentences and tables. The page and the model card only set them.

So a figure that stands in both is made here once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from paceline.run_report.document import Check, Interval, MeasuredCheckpoint, MeasuredWay, RunReport

DEFINITION = (
    "The acceptance length is 1 + accepted guesses / cycles, as vLLM's counters give it. Emitted tokens "
    "leave out what was accepted beyond an answer's end. In brackets: 95 % over prompts."
)
Rows = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Part:
    """`told`: sentences before the table. `is_bad`: a reader must not miss them."""

    title: str
    told: Sequence[str] = ()
    heads: Sequence[str] = ()
    rows: Rows = ()
    is_bad: bool = False


def acceptance(measured: MeasuredCheckpoint, *, is_best: bool = False) -> Part:
    m = measured
    of = f"{m.prompts} held-out prompts of {m.prompts_file}"
    longest = "" if m.max_new_tokens is None else f", up to {m.max_new_tokens} tokens an answer"
    compared = "It was measured while training went on, without plain decoding beside it."
    if m.identical is not None:
        compared = f"{m.identical} answers are identical to plain decoding, token for token."
    best = ", the best one measured" if is_best else ""
    return Part(
        "Acceptance",
        (
            f"The draft of step {m.step}{best}: lossless decoding of {of}{longest}, in {m.dtype} on "
            f"{m.device}. {compared}",
            DEFINITION,
        ),
        (
            "guesses a cycle",
            "acceptance length",
            "emitted tokens a cycle",
            "kept at depth 1, 2, ...",
            "speed-up over plain decoding",
        ),
        [_way(way) for way in m.ways],
    )


def _way(way: MeasuredWay) -> Sequence[str]:
    return (
        way.guesses if way.name == "draft" else f"{way.name}: {way.guesses}",
        _with_interval(way.acceptance_length, way.acceptance_length_interval, 3),
        figure(way.emitted_per_cycle, 3),
        ", ".join(figure(rate, 3) for rate in way.acceptance_rate),
        _with_interval(way.speed_up, way.speed_up_interval, 2),
    )


def guarantee(check: Check) -> Part:
    title, counts = "The guarantee", check.looked_at
    if check.sound is None:
        return Part(title, (f"Not checked: {check.why}",), is_bad=True)
    looked = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())
    errors = sum(len(rule.errors) for rule in check.rules)
    verdict = "Sound: every rule holds." if check.sound else f"UNSOUND: {errors} errors."
    told = f"Checked by a program that shares no code with the trainer: {looked}."
    if check.notes:
        told += f" It also noted what is no error, such as what it did not look at: {check.notes}; "
        told += "paceline fsck says what."
    rows = [(rule.name, rule.promise, _errors(len(rule.errors))) for rule in check.rules]
    return Part(title, (verdict, told), ("rule", "promise", "verdict"), rows, is_bad=not check.sound)


def _errors(count: int) -> str:
    return "holds" if not count else f"{count} error{'s' * (count > 1)}"


def lineage(report: RunReport) -> Part:
    counts = report.samples
    rows = [
        ("steps", whole_of(report.steps, report.planned_steps)),
        ("samples committed", whole(counts["committed"])),
        ("trained", whole(counts["trained"])),
        ("of these not yet in a checkpoint", whole(counts["provisional"])),
        ("in quarantine", whole(counts["quarantined"])),
        ("prompts that failed", whole(counts["failed"])),
        ("newest checkpoint", report.checkpoint or "none"),
        ("hash of all plans up to it", report.plans or "-"),
    ]
    return Part("Lineage", (), ("what", "how many"), rows)


def cost(report: RunReport) -> Part:
    rows = [(one.role, whole(one.starts), whole(one.killed), duration(one.seconds)) for one in report.cost]
    if report.seconds is not None:
        rows.append(("from first to last", "", "", duration(report.seconds)))
    return Part("What it cost", (), ("process", "starts", "killed", "time"), rows)


# -- figures ---------------------------------------------------------------------------------


def figure(value: float | None, digits: int) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def whole(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def whole_of(value: int, planned: int | None) -> str:
    return whole(value) if planned is None else f"{whole(value)} of {whole(planned)}"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _with_interval(value: float | None, interval: Interval, digits: int) -> str:
    if value is None or interval is None:
        return figure(value, digits)
    return f"{figure(value, digits)} [{figure(interval[0], digits)}, {figure(interval[1], digits)}]"
