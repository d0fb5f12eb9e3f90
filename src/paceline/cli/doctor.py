"""`paceline doctor`: whether the machine, and a run on it, have what they need; each finding with a mend."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console

from paceline.cli.named_run import run_file_of
from paceline.cli.plain import out, plain, say, say_document, say_wrapped
from paceline.config.load import load_run_config
from paceline.errors import ConfigError
from paceline.roles.doctor import Diagnosis, examine
from paceline.roles.examined import Examined

STYLES = {"good": "green", "note": "bold yellow", "bad": "bold red"}


def examine_and_tell(run: Path | None, *, probe: bool, as_json: bool) -> None:
    """`run`: a run file or a run's directory. Raises typer.Exit if something is bad, ConfigError."""
    if probe and run is None:
        raise ConfigError("--probe needs a run.", next="paceline doctor RUN.yaml --probe")
    run_file = None if run is None else run_file_of(run)
    config = None if run_file is None else load_run_config(run_file)
    findings = []
    for finding in examine(config, run_file, probe=probe):
        findings.append(finding)
        if not as_json:
            show(out, finding)
    found = Diagnosis(run="" if config is None else config.run.name, findings=findings)
    if as_json:
        say_document({**found.model_dump(mode="json"), "healthy": found.healthy})
    else:
        bad = sum(finding.state == "bad" for finding in findings)
        say(out, f"{bad} to mend" if bad else "Nothing to mend.")
    if not found.healthy:
        raise typer.Exit(ConfigError.exit_code)


def show(console: Console, finding: Examined) -> None:
    label = plain(f"{finding.state:<6}", STYLES[finding.state]) + plain(f"{finding.topic:<11}")
    say_wrapped(console, label, finding.what)
    if finding.mend:
        say_wrapped(console, plain(f"{'mend:':>16} ", "bold"), finding.mend)
