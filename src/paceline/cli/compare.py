"""`paceline compare` and `paceline sweep`: what they are asked for, and what was found as a table."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from paceline.cli.plain import INTERRUPTED, out, plain, say
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


@dataclass(frozen=True)
class Options:
    """What the command line says beside the variants."""

    directory: Path | None
    prompts: int | None
    tokens: int | None
    minutes: float | None
    reports: tuple[Path, ...]

    def comparison(self, config: RunConfig, variants: Sequence[Variant]) -> Comparison:
        """Raises ConfigError for options or variants that do not fit."""
        for path in self.reports:
            if path.suffix not in (".json", ".md"):
                raise ConfigError(
                    f"The report {path} ends neither in .json nor in .md.",
                    why="The ending says whether all figures or the table are written.",
                    next=f"--json {path}.json, or --markdown {path}.md",
                )
            if kind_of(path.absolute().parent) != "folder":
                raise ConfigError(
                    f"The report cannot be written to {path}: there is no folder {path.absolute().parent}.",
                    why="Nothing was captured or trained.",
                    next="make the folder, or name another file.",
                )
        comparison = Comparison.parse(
            {
                "directory": (self.directory or config.run.directory / "comparison").absolute(),
                "variants": [variant.model_dump() for variant in variants],
                "prompts": self.prompts,
                "tokens": self.tokens,
                "minutes": self.minutes,
            }
        )
        for number in range(len(variants)):
            comparison.config_of(config, number)  # raises the error before anything is loaded
        return comparison


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

RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run file.", readable=False)]
Directory = Annotated[Path | None, typer.Option(help="Where features and drafts are kept.")]
Prompts = Annotated[int | None, typer.Option(help="Only the first N prompts of the data.", min=1)]
Tokens = Annotated[int | None, typer.Option(help="Train each variant on so many tokens.", min=1)]
Minutes = Annotated[float | None, typer.Option(help="Train each variant for so long.")]
Reports = Annotated[
    list[Path] | None,
    typer.Option("--json", "--markdown", help="All figures as FILE.json, or the table as FILE.md."),
]


def compare(
    run_file: RunFile,
    variants: Annotated[
        list[Path] | None,
        typer.Argument(metavar="VARIANT.yaml", help="Overrides of method and training; or a run file."),
    ] = None,
    directory: Directory = None,
    prompts: Prompts = None,
    tokens: Tokens = None,
    minutes: Minutes = None,
    reports: Reports = None,
) -> None:
    """Train several methods or settings on the same features, captured once, and measure each.

    The run file is the first variant, and gives target, data and evaluation to all.
    """
    config = load_run_config(run_file)
    for note in foreign_parts(config, variants or []):
        say(out, f"note: {note}")
    options = Options(directory, prompts, tokens, minutes, tuple(reports or ()))
    found = variants_of_files(config, run_file, variants or [])
    _run(run_file, config, options, options.comparison(config, found))


def sweep(
    run_file: RunFile,
    settings: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE,...", help="A setting's values; repeatable.")
    ],
    metric: Annotated[str, typer.Option(help="What the table is sorted by.")] = "acceptance",
    directory: Directory = None,
    prompts: Prompts = None,
    tokens: Tokens = None,
    minutes: Minutes = None,
    reports: Reports = None,
) -> None:
    """Compare every combination of some settings' values, the best first."""
    config = load_run_config(run_file)
    options = Options(directory, prompts, tokens, minutes, tuple(reports or ()))
    comparison = options.comparison(config, swept(config, settings))
    _run(run_file, config, options, comparison, metric_of(metric))


def _run(
    run_file: Path,
    config: RunConfig,
    options: Options,
    comparison: Comparison,
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
    show(out, comparison, found, options)


def show(console: Console, comparison: Comparison, found: Sequence[Outcome], options: Options) -> None:
    """Print the table in the given order, and write the files that are asked for."""
    rows = [(outcome, _cells(outcome)) for outcome in found]
    console.print(_table(rows))
    told = f"{_budget(comparison)}; {DEFINITION}. "
    say(console, told + WARNING)
    obstacles = {outcome.found["obstacle"] for outcome in found if outcome.found} - {""}
    for obstacle in obstacles:
        say(console, f"only simulated, not decoded: {obstacle}")
    evaluated = [outcome.found["evaluation"] or {} for outcome in found if outcome.found]
    for note in {each.get("prompts_not_measured", "") for each in evaluated} - {""}:
        say(console, f"note: {note}")
    for outcome in found:
        if outcome.failed:
            say(console, f"{outcome.name} failed: {outcome.failed} The same command tries it again.")
    for path in options.reports:
        if path.suffix == ".json":
            replace_file(path, (json.dumps(_report(comparison, found), indent=1) + "\n").encode())
        else:
            replace_file(path, _markdown([cells for _, cells in rows], told + WARNING).encode())
        say(console, f"report: {path}")


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


def _table(rows: Sequence[tuple[Outcome, list[str]]]) -> Table:
    table = Table()
    for number, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if number in (0, 2) else "right")
    for _, cells in rows:
        table.add_row(*(plain(cell) for cell in cells))
    return table


def _markdown(rows: Sequence[Sequence[str]], told: str) -> str:
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped) + f"\n{told}\n"


def _budget(comparison: Comparison) -> str:
    if comparison.tokens is not None:
        return f"Each variant trained on {comparison.tokens:,} tokens"
    if comparison.minutes is not None:
        return f"Each variant trained for {comparison.minutes:g} minutes"
    return "Each variant trained as long as a run does"
