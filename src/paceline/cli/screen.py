"""Draws a run's status: the pipeline as it flows, for a terminal of any width, and as one line for a log."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from paceline.cli.plain import BARE, plain, table
from paceline.monitoring.doing import FIRST_WEIGHTS
from paceline.monitoring.schema import Process, RunStatus
from paceline.monitoring.waiting import MUCH, percent

BAR = 16  # characters
CURVE = 32
PROCESSES_SHOWN = 12  # more would push the rest out of the window
REASON_MAX = 300  # characters
HEIGHTS = "▁▂▃▄▅▆▇█"
STATE_STYLES = {
    "live": "bold green",
    "complete": "bold green",
    "failed": "bold red",
    "stopped": "bold yellow",
}


def screen(console: Console, s: RunStatus, problem: str = "", hint: str = "") -> RenderableType:
    """`problem`: why `s` is not of now. `hint`: what the reader may do."""
    draw = Drawing(ascii_only=console.options.ascii_only)
    flow = Table.grid(padding=(0, 2))
    flow.add_column(style="bold", min_width=10, no_wrap=True, overflow="fold")
    flow.add_column(overflow="fold")
    for name, text in draw.rows(s):
        flow.add_row(name, text)
    parts: list[RenderableType] = [_title(s)]
    if s.waiting.words:
        parts.append(plain(s.waiting.words, "" if s.waiting.limits == "nothing" else "yellow"))
    parts += [Text(), flow, Text(), _processes(s), Text()]
    parts += [plain(_shortened(line), style) for line, style in _remarks(s, problem)]
    return Group(*parts, *([plain(hint, "dim")] if hint else []))


def line(s: RunStatus) -> str:
    """The same for a log."""
    parts = [
        f"captured {part_of(s.prompts.done, s.prompts.planned)}",
        f"step {part_of(s.step.number, s.step.planned)}{_figures(s)}",
        f"features {amount(s.features.bytes)}",
        f"checkpoint {'-' if s.checkpoint.step is None else s.checkpoint.step}",
    ]
    if s.evaluation.curve:
        last = s.evaluation.curve[-1]
        parts.append(f"acceptance length {last.acceptance_length:.2f} at step {last.step}")
    if (best := s.evaluation.best) is not None and best.step != s.evaluation.curve[-1].step:
        parts.append(f"best {best.acceptance_length:.2f} at step {best.step}")
    counts = {
        "restarts": s.restarts,
        "failed prompts": s.prompts.failed,
        "quarantined": s.samples.quarantined,
    }
    parts += [f"{name} {count}" for name, count in counts.items() if count]
    if s.seconds_left is not None:
        parts.append(f"about {duration(s.seconds_left)} left")
    return " | ".join([*parts, *([s.waiting.words] if s.waiting.words else [])])


def _figures(s: RunStatus) -> str:
    length = s.step.acceptance_length
    estimate = "" if length is None else f", estimated acceptance length {length:.2f}"
    if s.step.loss is not None:
        return f": loss {s.step.loss:.3f}{estimate}"
    is_making = any(one.doing == FIRST_WEIGHTS for one in s.processes if one.role == "consumer")
    return f": the trainer {FIRST_WEIGHTS}" if is_making else ""


def is_live(console: Console) -> bool:
    """Whether a picture can be drawn anew in place there."""
    return console.is_terminal and not console.is_dumb_terminal


def _title(s: RunStatus) -> Text:
    left = "" if s.seconds_left is None else f"  about {duration(s.seconds_left)} left"
    return Text.assemble(plain(s.run, "bold"), "  ", (s.state, STATE_STYLES[s.state]), left)


class Drawing:
    """The rows of the pipeline, in its order."""

    def __init__(self, *, ascii_only: bool) -> None:
        self._full, self._empty = ("#", ".") if ascii_only else ("█", "░")
        self._heights = "_.-=^" if ascii_only else HEIGHTS

    def rows(self, s: RunStatus) -> Iterator[tuple[str, Text]]:
        p, f, m = s.prompts, s.features, s.samples
        told = f"{part_of(p.done, p.planned)} captured, {p.leased} being captured"
        yield (
            "prompts",
            self._with_bar(p.done, p.planned, told + (f", {p.failed} failed" if p.failed else "")),
        )
        yield "capture", plain(_capture(s.processes))
        room = amount(f.bytes) if f.budget_bytes is None else f"{amount(f.bytes)} of {amount(f.budget_bytes)}"
        yield "features", self._with_bar(f.bytes, f.budget_bytes, f"{room}, {f.samples} samples")
        lost = f", {m.lost} to capture again" if m.lost else ""
        yield "ledger", plain(f"{m.committed} committed, {m.waiting} wait to be trained{lost}")
        yield "training", self._with_bar(s.step.number, s.step.planned, _training(s))
        if s.step.losses:
            length = s.step.acceptance_length
            estimate = "" if length is None else f", estimated acceptance length {length:.2f}"
            yield "loss", plain(f"{self.curve(s.step.losses)} {s.step.losses[-1]:.3f}{estimate}")
        yield "checkpoint", plain(_checkpoint(s))
        if s.evaluation.curve:
            yield "acceptance", plain(self._acceptance(s))

    def _with_bar(self, part: int, whole: int | None, text: str) -> Text:
        if not whole:
            return plain(text)
        full = max(0, min(BAR, round(BAR * part / whole)))
        return Text.assemble(
            (self._full * full, "green"), (self._empty * (BAR - full), "dim"), " ", plain(text)
        )

    def _acceptance(self, s: RunStatus) -> str:
        points, best = s.evaluation.curve, s.evaluation.best
        lengths = [point.acceptance_length for point in points]
        told = f"{lengths[-1]:.2f} at step {points[-1].step}, on held-out prompts"
        if best is not None and best.step != points[-1].step:
            told += f"; best {best.acceptance_length:.2f} at step {best.step}"
        return f"{self.curve(lengths)} {told}" if len(lengths) > 1 else told

    def curve(self, values: Sequence[float], bounds: tuple[float, float] | None = None) -> str:
        """The values, or means of neighbours if they are many, as characters of that height.

        `bounds`: the values of the lowest and the highest character; by default those of the means.
        """
        size = -(-len(values) // CURVE)
        means = [sum(part) / len(part) for n in range(0, len(values), size) if (part := values[n : n + size])]
        low, high = bounds or (min(means), max(means))
        span = high - low
        top = len(self._heights) - 1
        return "".join(self._heights[round(top * (mean - low) / span) if span else 0] for mean in means)


def _capture(processes: Sequence[Process]) -> str:
    producers = [one for one in processes if one.role.startswith("producer") and one.state != "ended"]
    if not producers:
        return "no producer is live"
    samples = sum(one.samples_per_second or 0.0 for one in producers)
    tokens = sum(one.tokens_per_second or 0.0 for one in producers)
    count = f"{len(producers)} producer{'s' if len(producers) > 1 else ''}"
    return f"{count}: {samples:.1f} samples/s, {tokens:,.0f} tokens/s" if samples else f"{count}: none yet"


def _training(s: RunStatus) -> str:
    samples = sum(one.samples_per_second or 0.0 for one in s.processes if one.role == "consumer")
    rate = "" if s.step.per_second is None else f": {samples:.1f} samples/s, {s.step.per_second:.2f} steps/s"
    return f"step {part_of(s.step.number, s.step.planned)}{rate}"


def _checkpoint(s: RunStatus) -> str:
    if s.checkpoint.step is None:
        return "none yet"
    ahead = f"{s.samples.provisional} samples since" if s.samples.provisional else "covers everything trained"
    stall = s.checkpoint.stall_seconds
    stood = "" if stall is None else f" (training stood still {stall:.2f} s)"
    return f"step {s.checkpoint.step}, {ahead}{stood}"


def _processes(s: RunStatus) -> Table:
    shown = table("process", "id", "does", "waits", **BARE)
    for one in s.processes[:PROCESSES_SHOWN]:
        pid = "" if one.pid is None else str(one.pid)
        place = f"{pid} on {one.host}" if one.host else pid
        much = any(share is not None and share >= MUCH for share in (one.waiting_share, one.idle_share))
        shown.add_row(
            plain(one.role),
            plain(place),
            plain(one.doing),
            plain(_waits(one), "yellow" if much and one.state == "live" else ""),
        )
    more = len(s.processes) - PROCESSES_SHOWN
    if more > 0:
        shown.add_row(plain(f"and {more} more"))
    return shown


def _waits(one: Process) -> str:
    if one.waiting_share is None or one.state == "ended":
        return ""
    told = f"{percent(one.waiting_share)} for {'samples' if one.role == 'consumer' else 'room'}"
    return told + (f", {percent(one.idle_share)} for its turn" if one.idle_share else "")


def _remarks(s: RunStatus, problem: str) -> Iterator[tuple[str, str]]:
    if s.ranks:
        yield f"ranks: {s.ranks}", ""
    if s.waits_for:
        yield f"training waits for {s.waits_for}", "yellow"
    if s.restarts:
        yield f"{s.restarts} restarts", "yellow"
    if s.prompts.failed:
        yield (
            f"{s.prompts.failed} prompts failed; the first: {next(iter(s.failed_prompts.values()))}",
            "yellow",
        )
    for sample_id, reason in list(s.quarantined.items())[-3:]:
        yield f"quarantined {sample_id}: {reason}", "yellow"
    if s.error and s.state == "failed":
        yield s.error, "red"
    if s.stopped_flat:
        yield f"early stop: {s.stopped_flat}", "yellow"
    if problem:
        yield problem, "red"


def _shortened(text: str) -> str:
    return text if len(text) <= REASON_MAX else f"{text[:REASON_MAX]} ..."


def part_of(part: int, whole: int | None) -> str:
    return str(part) if whole is None else f"{part} of {whole}"


def amount(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
