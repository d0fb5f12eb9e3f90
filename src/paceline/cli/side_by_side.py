"""`paceline compare RUN RUN`: runs side by side, finished or live. Nothing is trained or changed."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from paceline.cli.named_run import directory_of
from paceline.cli.plain import BARE, out, plain, say, table
from paceline.cli.screen import Drawing
from paceline.durable_files import replace_file
from paceline.errors import ConfigError
from paceline.monitoring.reporting import read_report
from paceline.roles.snapshot import making_sense
from paceline.run_report.document import MeasuredCheckpoint, RunReport
from paceline.run_report.markdown import as_markdown
from paceline.run_report.tables import (
    DEFINITION,
    Part,
    acceptance,
    cost,
    figure,
    whole,
    whole_of,
)

OWN = ("run.name", "run.directory")  # of every run
POINTS_SHOWN = 10  # of the curves
TRAINING_OPTIONS = ("directory", "prompts", "tokens", "minutes")
NOT_CHECKED = "paceline fsck RUN checks it."


def compare_runs(runs: Sequence[Path], given: Mapping[str, Any]) -> None:
    """`given`: of COMPARE_OPTIONS, by name; `json` and `markdown`: files to write. Raises PacelineError."""
    _refuse(runs, given)
    reports = [_report(directory_of(run)) for run in runs]
    parts = list(parts_of(reports, Drawing(ascii_only=out.options.ascii_only)))
    for part in parts:
        _show(out, part)
    contents = {
        "json": json.dumps(document_of(reports), indent=1) + "\n",
        "markdown": "\n".join(line for part in parts for line in as_markdown(part)),
    }
    for name, content in contents.items():
        if given.get(name) is not None:
            replace_file(given[name], content.encode())
            say(out, f"report: {given[name]}")


def parts_of(reports: Sequence[RunReport], draw: Drawing) -> Iterator[Part]:
    """What is to be seen, in its order."""
    names = names_of(reports)
    yield Part("Runs", (), ("", *names), list(_runs(reports)))
    different = settings_that_differ(reports)
    rows = [(key, *map(_value, values)) for key, values in different.items()]
    told = () if rows else ("Every setting is the same, but for name and folder.",)
    yield Part("Settings that differ", told, ("setting", *names), rows)
    yield _curves(reports, names, draw)
    yield _acceptance(reports, names)
    rows = [(name, *row) for name, report in zip(names, reports, strict=True) for row in cost(report).rows]
    yield Part("What it cost", (), ("run", *cost(reports[0]).heads), rows)


def document_of(reports: Sequence[RunReport]) -> dict[str, Any]:
    """For scripts: `runs` as `paceline report --json` has them, and `settings` that differ, a value each."""
    return {
        "settings": settings_that_differ(reports),
        "comparable": are_comparable(reports),
        "runs": [msgspec.to_builtins(report, str_keys=True) for report in reports],
    }


def names_of(reports: Sequence[RunReport]) -> list[str]:
    """The run's name; its folder, too, where several have one name."""
    counts = Counter(report.run for report in reports)
    return [one.run if counts[one.run] == 1 else f"{one.run} ({one.directory})" for one in reports]


def settings_that_differ(reports: Sequence[RunReport]) -> dict[str, list[Any]]:
    """By key, the value of each run; null where a run has not recorded it."""
    keys = sorted({key for report in reports for key in report.settings} - set(OWN))
    values = {key: [report.settings.get(key) for report in reports] for key in keys}
    return {key: each for key, each in values.items() if any(value != each[0] for value in each)}


def are_comparable(reports: Sequence[RunReport]) -> bool | None:
    """Whether all newest measurements had the same conditions; None if fewer than two runs were measured."""
    found = [one.conditions for one in map(_newest, reports) if one is not None]
    return None if len(found) < 2 else len(set(found)) == 1 and bool(found[0])


def _refuse(runs: Sequence[Path], given: Mapping[str, Any]) -> None:
    if len(runs) < 2:
        raise ConfigError(
            f"{runs[0]} is one run, and there is none to compare it with.",
            next=f"paceline compare {runs[0]} ANOTHER_RUN; or name a run file and variants to train.",
        )
    if options := [name for name in TRAINING_OPTIONS if given.get(name) is not None]:
        raise ConfigError(
            f"--{options[0]} is for variants that are still to be trained, and {runs[0]} is a run that was.",
            why="Runs are shown side by side as they are; nothing is trained.",
            next="leave the option out, or name run files instead of runs' folders.",
        )


def _report(directory: Path) -> RunReport:
    with making_sense(directory):
        return read_report(directory, NOT_CHECKED)


def _newest(report: RunReport) -> MeasuredCheckpoint | None:
    return report.measured[-1] if report.measured else None


def _runs(reports: Sequence[RunReport]) -> Iterator[Sequence[str]]:
    yield "state", *(one.state for one in reports)
    yield "steps", *(whole_of(one.steps, one.planned_steps) for one in reports)
    yield "samples trained", *(whole(one.samples["trained"]) for one in reports)
    yield "loss", *(figure(one.loss, 3) for one in reports)
    yield "restarts", *(whole(one.restarts) for one in reports)
    yield "left out", *(whole(one.samples["failed"] + one.samples["quarantined"]) for one in reports)


def _curves(reports: Sequence[RunReport], names: Sequence[str], draw: Drawing) -> Part:
    """Each curve as a picture of characters, then figures at the same steps."""
    every = [loss for report in reports for _, loss in report.losses]
    told = ["The losses are drawn on one scale."] if every else []
    for name, report in zip(names, reports, strict=True):
        if losses := [loss for _, loss in report.losses]:
            told.append(f"{draw.curve(losses, (min(every), max(every)))} loss of {name}")
    steps = sorted({step for report in reports for step, _ in report.losses})
    shown = steps[:: -(-len(steps) // POINTS_SHOWN)] if steps else []
    measured = sorted({one.step for report in reports for one in report.measured})
    rows = [
        ("loss", whole(step), *(figure(_loss_at(one.losses, step), 3) for one in reports)) for step in shown
    ]
    for step in measured[-POINTS_SHOWN:]:
        lengths = [one.measured_at(step) for one in reports]
        told_of = [figure(None if m is None else m.ways[0].acceptance_length, 3) for m in lengths]
        rows.append(("acceptance length, chain", whole(step), *told_of))
    return Part("Curves", told, ("curve", "step", *names), rows)


def _loss_at(losses: Sequence[tuple[int, float]], step: int) -> float | None:
    """Of the newest point up to the step; None if the run has none, or has not come so far."""
    place = bisect_right(losses, step, key=lambda point: point[0])
    return losses[place - 1][1] if place and step <= losses[-1][0] else None


def _acceptance(reports: Sequence[RunReport], names: Sequence[str]) -> Part:
    rows, heads = [], acceptance(EMPTY).heads
    for name, report in zip(names, reports, strict=True):
        for step in dict.fromkeys([one.step for one in report.measured[-1:]] + [report.best_step]):
            measured = None if step is None else report.measured_at(step)
            if measured is not None:
                best = " (best)" if step == report.best_step else ""
                rows += [(f"{name}, step {step}{best}", *row) for row in acceptance(measured).rows]
    told = {
        None: ("Fewer than two of the runs were measured: paceline evaluate RUN",),
        True: (
            DEFINITION,
            "Where intervals overlap, the difference may be chance. Speed-ups are those of the machine that "
            "measured them.",
        ),
        False: (
            "NOT COMPARABLE: they were measured with another target, on other prompts, with other lengths "
            "or with other guesses.",
            "paceline evaluate --suite measures both on the same file of prompts.",
        ),
    }[comparable := are_comparable(reports)]
    return Part("Acceptance", told, ("run", *heads), rows, is_bad=comparable is False)


EMPTY = MeasuredCheckpoint(step=0, prompts=0, prompts_file="", dtype="", device="", ways=())


def _value(value: object) -> str:
    return "-" if value is None else value if isinstance(value, str) else json.dumps(value)


def _show(console: Console, part: Part) -> None:
    console.print(plain(part.title, "bold"))
    for words in part.told:
        console.print(plain(words, "bold red" if part.is_bad else ""))
    if part.rows:
        shown = table(*map(plain, part.heads), **BARE)
        for row in part.rows:
            shown.add_row(*map(plain, row))
        console.print(shown)
    console.print()
