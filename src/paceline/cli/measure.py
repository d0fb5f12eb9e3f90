"""Measures a run's checkpoint in a process of its own, and prints what was found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from paceline.cli.evaluate import MeasuringProgress, evaluation_request, show_report
from paceline.cli.named_run import run_file_of
from paceline.cli.plain import INTERRUPTED, out, say
from paceline.cli.progress import best_lines, evaluation_lines, final_line
from paceline.config.load import load_run_config
from paceline.config.run import RunConfig
from paceline.errors import ConfigError
from paceline.evaluation.marked import marked_words, read_samples
from paceline.evaluation.settings import EvaluationRequest, MarkRequest
from paceline.monitoring.lineage import sample_lives
from paceline.roles.snapshot import open_run, take_snapshot
from paceline.roles.supervisor import evaluate_run
from paceline.target.hub import local_target


def measure_as_asked(
    run: Path,
    suites: list[str],
    temperatures: list[str],
    max_prompts: int | None,
    step: int | None,
    report: Path | None,
) -> None:
    """As the options ask. Raises as `measure` does."""
    run_file = run_file_of(run)
    config = load_run_config(run_file)
    request = evaluation_request(config, suites, temperatures, max_prompts, step, report)
    measure(run_file, config, request)


def mark_as_asked(run: Path, samples: list[str], step: int | None, others: Sequence[object]) -> None:
    """Mark the tokens of these samples that the draft guesses. `others`: options, which say nothing here.

    Raises typer.Exit if the user stopped it, PacelineError.
    """
    if any(others):
        raise ConfigError(
            "--sample shows a training sample, and the other options measure prompts.",
            why="Nothing was measured.",
            next="give --sample alone, or with --step.",
        )
    run_file = run_file_of(run)
    config = load_run_config(run_file)
    local_target(config.target)  # the evaluator's process does not use the network
    view = open_run(config.run.directory)
    lives = [life for sample in samples for life in sample_lives(view, sample)]
    found = {life.ordinal: life.sample_id for life in lives if life.ordinal is not None}
    if not found:
        raise ConfigError(
            f"{samples[0]} was never captured.",
            why="It has no answer in which tokens could be marked.",
            next=f"paceline inspect {run} --sample {samples[0]} says what became of it.",
        )
    say(out, f"following {len(found)} answer{'s' * (len(found) > 1)} with the draft ...")
    request = MarkRequest(ordinals=tuple(found), step=step)
    if not evaluate_run(run_file, config, request, MeasuringProgress(out, config).look):
        say(out, "Stopped; nothing was changed.")
        raise typer.Exit(INTERRUPTED)
    marked = read_samples(config.run.directory, view.facts())
    for ordinal, sample_id in found.items():
        one = marked.find(ordinal)
        if one is not None:
            say(out, f"{sample_id}: {marked_words(one)}")
    say(out, f"paceline dashboard {run} shows them in the text.")


def measure(run_file: Path, config: RunConfig, request: EvaluationRequest | None = None) -> None:
    """As `request` asks; without one as at the end of training.

    Raises typer.Exit if the user stopped it, PacelineError.
    """
    local_target(config.target)  # the evaluator's process does not use the network
    what = "held-out prompts" if request is None else ", ".join(request.suites)
    say(out, f"measuring on {what}, by lossless decoding ...")
    if not evaluate_run(run_file, config, request, MeasuringProgress(out, config).look):
        say(out, "Stopped; nothing is lost. The same command measures the prompts that are left.")
        raise typer.Exit(INTERRUPTED)
    if request is None:
        _print_evaluation(config)
    else:
        show_report(out, request.report)


def _print_evaluation(config: RunConfig) -> None:
    snapshot = take_snapshot(config.run.directory, open_run(config.run.directory))
    if not snapshot.evaluation:
        raise ConfigError(
            f"{config.run.directory / 'evaluation.json'} is not what the evaluation wrote.",
            why="It was changed since; the run itself is untouched.",
            next=f"paceline evaluate {config.run.directory}",
        )
    for line in [*evaluation_lines(snapshot), *best_lines(snapshot), final_line(snapshot)]:
        say(out, line)
