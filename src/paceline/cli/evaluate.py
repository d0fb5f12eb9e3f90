"""`paceline evaluate`: what it is asked for, and its report as a table."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from paceline.cli.plain import plain, say, table
from paceline.config.run import RunConfig
from paceline.errors import ConfigError
from paceline.evaluation.settings import EvaluationRequest
from paceline.evaluation.suites import HELD_OUT, find_suite
from paceline.regular_files import kind_of
from paceline.roles.plan import events_path
from paceline.telemetry import read_events

REPORT = "evaluation-suites.json"
TELL_EVERY_S = 15.0


def evaluation_request(
    config: RunConfig,
    suites: list[str],
    temperatures: list[str],
    max_prompts: int | None,
    step: int | None,
    report: Path | None,
) -> EvaluationRequest | None:
    """What the options ask for beside the run file; None without any. Raises ConfigError."""
    if not suites and not temperatures and max_prompts is None and step is None and report is None:
        return None
    path = (report or config.run.directory / REPORT).absolute()
    if kind_of(path.parent) != "folder":
        raise ConfigError(
            f"The report cannot be written to {path}: there is no folder {path.parent}.",
            why="Nothing was measured.",
            next="make the folder, or name another file with --json.",
        )
    if path.suffix != ".json":
        raise ConfigError(
            f"The report {path} does not end in .json.",
            why="Its picture gets the same name with the ending .svg.",
            next=f"--json {path}.json",
        )
    request = EvaluationRequest.parse(
        {
            "suites": suites or [HELD_OUT],
            "temperatures": [part for text in temperatures for part in text.split(",")] or [0.0],
            "max_prompts": max_prompts,
            "step": step,
            "report": path,
        }
    )
    for name in request.suites:
        find_suite(name, config.evaluation.prompts)  # raises the error before anything is loaded
    return request


class MeasuringProgress:
    """Tells at intervals how many prompts the evaluator has measured."""

    def __init__(self, console: Console, config: RunConfig) -> None:
        self._console, self._path = console, events_path(config, "evaluator")
        self._began = round(time.time(), 3)  # as events have it
        self._next = time.monotonic() + TELL_EVERY_S

    def look(self) -> None:
        if time.monotonic() < self._next:
            return
        self._next += TELL_EVERY_S
        events = [event for event in read_events(self._path) if event.get("event") == "measured"]
        if events and events[-1].get("time", 0) >= self._began:
            newest, self._began = events[-1], events[-1]["time"] + 0.001  # each is told once
            say(self._console, f"measured {newest['prompts']} of {newest['of']} prompts: {newest['what']}")


def show_report(console: Console, path: Path) -> None:
    """Print the table of a report, what does not beat the lookup, and where report and picture lie."""
    report = json.loads(path.read_bytes())
    console.print(_table(report))
    for part in report["suites"]:
        for line in _remarks(part):
            say(console, line)
    say(console, f"report: {path}, with the figures of every prompt; picture: {path.with_suffix('.svg')}")


def _table(report: Mapping[str, Any]) -> Table:
    title = f"checkpoint of step {report['checkpoint_step']}; in brackets: 95 % over prompts"
    shown = table(
        "suite",
        "prompts",
        "guesses",
        "acceptance length:\n1 + accepted / cycles",
        "kept at depth 1, 2, ...",
        "speed-up over\nplain decoding",
        "ms a cycle:\ndraft, target, rest",
        right=["prompts"],
        title=plain(title),
        title_justify="left",
    )
    for part in report["suites"]:
        for group in part["groups"]:
            category = "" if group["category"] == "all" else f", {group['category']}"
            name = f"{part['suite']}{category}, t={part['temperature']:g}"
            for way, found in group["ways"].items():
                cells = [name, str(group["prompts"]), f"{way} of {found['num_draft_tokens']}"]
                shown.add_row(*(plain(cell) for cell in [*cells, *_figures(found)]))
                name = ""
    return shown


def _figures(found: Mapping[str, Any]) -> list[str]:
    return [
        with_interval(found, "acceptance_length"),
        ", ".join(f"{share:.2f}" for share in found["acceptance_rate"]),
        "-" if found["speed_up"] is None else with_interval(found, "speed_up"),
        ", ".join(f"{found['cycle_ms'][part]:.1f}" for part in ("draft", "target", "rest")),
    ]


def with_interval(found: Mapping[str, Any], name: str) -> str:
    """A figure with two digits, and its interval if it has one."""
    return f"{found[name]:.2f}{_bounds(found, name, '.2f')}"


def _bounds(found: Mapping[str, Any], name: str, digits: str) -> str:
    """The interval of a figure in brackets; empty without one (a file may hold anything)."""
    bounds = found.get(f"{name}_interval")
    if not (isinstance(bounds, list) and [type(value) for value in bounds] == [float, float]):
        return ""
    return f" [{bounds[0]:{digits}}, {bounds[1]:{digits}}]"


def _remarks(part: Mapping[str, Any]) -> list[str]:
    where = f"{part['suite']}, temperature {part['temperature']:g}"
    whole, lines = part["groups"][0], []
    if part["temperature"] <= 0:
        for name, found in whole["ways"].items():
            if found["identical"] < found["prompts"]:
                lines.append(
                    f"{where}: {found['prompts'] - found['identical']} of {found['prompts']} answers of the "
                    f"{name} differ from plain decoding: this type's sums depend on the number of rows here"
                )
    for group in part["groups"]:
        place = where if group["category"] == "all" else f"{where}, {group['category']}"
        best = next(iter(group["against_lookup"]))
        lines.append(verdict(place, best, group["against_lookup"][best]))
    if part["also_trained"]:
        lines.append(
            f"{where}: {part['also_trained']} training prompts of the run are among these: the figures do "
            "not hold for new prompts"
        )
    if part["left_out"]:
        name, reason = next(iter(part["left_out"].items()))
        lines.append(f"{where}: {len(part['left_out'])} prompts are left out, the first: {name}: {reason}")
    return lines


def verdict(place: str, way: str, against: Mapping[str, Any]) -> str:
    """Whether the draft accepts more than prompt lookup does, in words."""
    told = f"by {against['gain']:+.2f}{_bounds(against, 'gain', '+.2f')} in acceptance length"
    bounds = against.get("gain_interval") if _bounds(against, "gain", "+.2f") else None
    if bounds and bounds[0] > 0:
        verb = "beats prompt lookup"
    elif against["gain"] > 0:
        verb = "is not shown to beat prompt lookup, which needs no training"
    else:
        verb = "DOES NOT BEAT prompt lookup, which needs no training"
    slower = "it is" if against["speed_ratio"] >= 1 else "it is SLOWER,"
    speed = f"{slower} {against['speed_ratio']:.2f} times as fast{_bounds(against, 'speed_ratio', '.2f')}"
    return f"{place}: the draft's {way} {verb} ({told}; {speed})"
