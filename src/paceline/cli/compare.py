"""`paceline compare` and `paceline sweep`: what they are asked for, and what was found as a table."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from paceline.cli.plain import INTERRUPTED, out, plain, say, table
from paceline.cli.side_by_side import compare_runs
from paceline.config.load import load_run_config
from paceline.config.run import RunConfig
from paceline.durable_files import replace_file
from paceline.errors import ConfigError
from paceline.regular_files import kind_of
from paceline.roles.comparison import Comparison, Variant, foreign_parts, swept, variants_of_files
from paceline.roles.comparison_runs import ComparisonStopped, Outcome, run_comparison
from paceline.target.hub import local_target

DEFINITION = "acceptance length: 1 + accepted draft tokens / cycles, as servers count it"
WARNING = (
    "Acceptance length alone misorders methods: a draft whose guesses cost more time may be the slower one "
    "although more of them are kept. The speed-up decides, measured where the draft will serve."
)


FILES = ("json", "markdown")


# -- figures -----------------------------------------------------------------------------------

Figure = Callable[[Mapping[str, Any]], float | None]


def _evaluated(name: str, way: str = "") -> Figure:
    def figure(found: Mapping[str, Any]) -> float | None:
        part = found["evaluation"] or {}
        value: float | None = (part.get(way) or {} if way else part).get(name)
        return value

    return figure


METRICS: dict[str, Figure] = {
    "acceptance": _evaluated("acceptance_length"),
    "chain": _evaluated("acceptance_length", "chain"),
    "speed-up": _evaluated("speed_up"),
    "chain-speed-up": _evaluated("speed_up", "chain"),
    "simulated": lambda found: found["simulated_acceptance_length"],
}


def metric_of(name: str) -> Figure:
    """Raises ConfigError for a name that is none."""
    if name not in METRICS:
        raise ConfigError(
            f"There is no metric {name!r}.", next=f"choose one with --metric: {', '.join(METRICS)}."
        )
    return METRICS[name]


def _number(value: float | None) -> float:
    return float("-inf") if value is None else value


# -- commands ------------------------------------------------------------------------------------


def compare(run_file: Path, variants: Sequence[Path] = (), **given: Any) -> None:
    """Train variants; or show runs, if one of them is named by its folder.

    `given`: of COMPARE_OPTIONS, by name. Raises typer.Exit if the user stopped it, PacelineError.
    """
    if any(kind_of(path) == "folder" for path in (run_file, *variants)):
        compare_runs([run_file, *variants], given)
        return
    config = load_run_config(run_file)
    for note in foreign_parts(config, variants):
        say(out, f"note: {note}")
    found = variants_of_files(config, run_file, variants)
    _run(run_file, config, _comparison(config, found, given), given)


def sweep(run_file: Path, settings: Sequence[str], metric: str = "acceptance", **given: Any) -> None:
    """`settings`: KEY=VALUE,... texts; `given`, raises: as above."""
    config = load_run_config(run_file)
    comparison = _comparison(config, swept(config, settings), given)
    _run(run_file, config, comparison, given, metric_of(metric))


def _comparison(config: RunConfig, variants: Sequence[Variant], given: Mapping[str, Any]) -> Comparison:
    """What is asked for. Raises ConfigError for options or variants that do not fit."""
    for path in (given.get(name) for name in FILES):
        if path is not None and kind_of(path.absolute().parent) != "folder":
            raise ConfigError(
                f"The report cannot be written to {path}: there is no folder {path.absolute().parent}.",
                why="Nothing was captured or trained.",
                next="make the folder, or name another file.",
            )
    comparison = Comparison.parse(
        {
            **{name: given.get(name) for name in ("prompts", "tokens", "minutes")},
            "directory": (given.get("directory") or config.run.directory / "comparison").absolute(),
            "variants": [variant.model_dump() for variant in variants],
        }
    )
    for number in range(len(variants)):
        comparison.config_of(config, number)  # raises the error before anything is loaded
    return comparison


def _run(
    run_file: Path,
    config: RunConfig,
    comparison: Comparison,
    given: Mapping[str, Any],
    key: Figure | None = None,
) -> None:
    local_target(config.target)  # the comparer's process does not use the network
    try:
        found = list(run_comparison(run_file, config, comparison, partial(say, out)))
    except ComparisonStopped as stopped:
        say(out, "Stopped; nothing is lost. The same command goes on with the variants that are left.")
        raise typer.Exit(INTERRUPTED) from stopped
    if key is not None:
        found.sort(key=lambda outcome: -_number(None if outcome.found is None else key(outcome.found)))
    show(out, comparison, found)
    write_reports(comparison, found, given)


def show(console: Console, comparison: Comparison, found: Sequence[Outcome]) -> None:
    """Print the table in the given order, and what cannot be read in it."""
    console.print(_table(found))
    say(console, _told(comparison))
    obstacles = {outcome.found["obstacle"] for outcome in found if outcome.found} - {""}
    for obstacle in obstacles:
        say(console, f"only simulated, not decoded: {obstacle}")
    evaluated = [outcome.found["evaluation"] or {} for outcome in found if outcome.found]
    for note in {each.get("prompts_not_measured", "") for each in evaluated} - {""}:
        say(console, f"note: {note}")
    for outcome in found:
        for remark in _remarks(outcome):
            say(console, f"{outcome.name} {remark}")


def _remarks(outcome: Outcome) -> list[str]:
    if outcome.found is None:
        return [f"failed: {outcome.failed} The same command tries it again."]
    evaluation = outcome.found["evaluation"] or {"identical": 0, "prompts": 0}
    different = evaluation["prompts"] - evaluation["identical"]
    told = f"gave {different} of {evaluation['prompts']} answers that differ from plain decoding"
    return [f"{told}: this type's sums depend on the number of rows here"] if different else []


def write_reports(comparison: Comparison, found: Sequence[Outcome], given: Mapping[str, Any]) -> None:
    """Write the files that are asked for. Raises OSError."""
    contents = {
        "json": json.dumps(_report(comparison, found), indent=1) + "\n",
        "markdown": _markdown(found, _told(comparison)),
    }
    for path, content in ((given.get(name), contents[name]) for name in FILES):
        if path is not None:
            replace_file(path, content.encode())
            say(out, f"report: {path}")


def _report(comparison: Comparison, found: Sequence[Outcome]) -> dict[str, Any]:
    return {
        "comparison": comparison.model_dump(mode="json"),
        "acceptance_length_is": DEFINITION,
        "note": WARNING,
        "variants": [
            {"name": outcome.name, "failed": outcome.failed, **(outcome.found or {})} for outcome in found
        ],
    }


# -- the table -----------------------------------------------------------------------------------

COLUMNS = (
    "variant",
    "acceptance length",
    "kept at depth 1, 2, ...",
    "speed-up",
    "chain",
    "its speed-up",
    "simulated",
    "parameters",
    "tokens",
    "steps",
    "seconds",
    "step ms",
)


def _cells(outcome: Outcome) -> list[str]:
    found = outcome.found
    if found is None:
        return [outcome.name, "failed", *[""] * (len(COLUMNS) - 2)]
    figures = {name: _shown(figure(found)) for name, figure in METRICS.items()}
    rates = (found["evaluation"] or {}).get("acceptance_rate", [])
    return [
        outcome.name,
        figures["acceptance"],
        ", ".join(f"{share:.2f}" for share in rates) or "-",
        figures["speed-up"],
        figures["chain"],
        figures["chain-speed-up"],
        figures["simulated"],
        f"{found['parameters'] / 1e6:.1f} M",
        f"{found['tokens']:,}",
        f"{found['steps']:,}",
        f"{found['seconds']:.0f}",
        f"{found['step_ms']:.1f}",
    ]


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _table(found: Sequence[Outcome]) -> Table:
    shown = table(*COLUMNS, right={*COLUMNS} - {COLUMNS[0], COLUMNS[2]})
    for outcome in found:
        shown.add_row(*(plain(cell) for cell in _cells(outcome)))
    return shown


def _markdown(found: Sequence[Outcome], told: str) -> str:
    lines = [COLUMNS, ["---"] * len(COLUMNS), *map(_cells, found)]
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped) + f"\n{told}\n"


def _told(comparison: Comparison) -> str:
    how_long = "as long as a run does"
    if comparison.tokens is not None:
        how_long = f"on {comparison.tokens:,} tokens"
    if comparison.minutes is not None:
        how_long = f"for {comparison.minutes:g} minutes"
    return f"Each variant trained {how_long}; {DEFINITION}. {WARNING}"
