"""`paceline export` and `paceline serve`: draft folders for inference servers, and the servers' commands."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import msgspec
import typer
from msgspec.structs import replace
from rich.console import Console

from paceline.cli.fsck import checked
from paceline.cli.named_run import file_in_memory, run_file_of
from paceline.cli.plain import INTERRUPTED, out, say
from paceline.config.load import load_run_config
from paceline.config.run import RunConfig
from paceline.errors import ConfigError, PacelineError
from paceline.exports.serving import Served, commands
from paceline.exports.settings import ExportSection
from paceline.exports.table import EXPORTS
from paceline.fsck.report import Report as Findings
from paceline.monitoring.reporting import read_report
from paceline.roles.export_request import note_path, read_notes
from paceline.roles.snapshot import making_sense
from paceline.roles.supervisor import export_run

NOT_CHECKED = "it could not be when the draft was exported; paceline fsck tells its owner why."
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def export_request(
    config: RunConfig,
    formats: list[str],
    directory: Path | None = None,
    step: int | None = None,
    dtype: str | None = None,
    target_name: str | None = None,
) -> ExportSection:
    """The run file's export section with what the command line says instead. Raises ConfigError."""
    section = config.export
    given = {
        "formats": [name for text in formats for name in text.split(",")] or section.formats,
        "directory": directory or section.directory,
        "step": step or section.step,
        "dtype": DTYPES.get(dtype or "", dtype) or section.dtype,
        "target_name": target_name or section.target_name,
    }
    request = ExportSection.parse(given)
    if not request.formats:
        raise ConfigError(
            "No format to export to is named.",
            why="Neither --to nor the run file's export section names a format.",
            next=f"paceline export RUN --to FORMAT DIR; formats: {', '.join(EXPORTS.names())}",
        )
    unknown = [name for name in request.formats if name not in EXPORTS.names()]
    if unknown:
        EXPORTS.find(unknown[0])  # raises the error with advice
    return request


def export_as_asked(
    run: Path,
    formats: list[str],
    directory: Path | None,
    step: int | None,
    dtype: str | None,
    target_name: str | None,
) -> None:
    """As the options ask. Raises as `write_exports` does."""
    run_file = run_file_of(run)
    config = load_run_config(run_file)
    write_exports(run_file, config, export_request(config, formats, directory, step, dtype, target_name))


def write_exports(run_file: Path, config: RunConfig, request: ExportSection) -> None:
    """Raises typer.Exit if the user stopped it, PacelineError."""
    if not export_checkpoint(out, run_file, config, request):
        say(out, f"Stopped; nothing is lost. Export again with: paceline export {config.run.directory}")
        raise typer.Exit(INTERRUPTED)


def export_checkpoint(console: Console, run_file: Path, config: RunConfig, request: ExportSection) -> bool:
    """Export and say where the folders are; False if the user stopped it."""
    say(console, f"exporting for {', '.join(request.formats)}, with a self-check ...")
    if not export_run(run_file, config, request, report_file(config)):
        return False
    notes = read_notes(config.run.directory)
    for name, folder in request.folders(config.run.directory).items():
        note = notes.get(str(folder), {})
        say(console, f"{name}: {folder}, step {note.get('step', '?')} ({note.get('why', 'unknown why')})")
        for told in note.get("refusals", []):
            say(console, f"note: {told}")
    return True


def report_file(config: RunConfig) -> Path:
    """What the model card tells of the run, for the exporter, without what is no business of its readers.

    That the run cannot be checked is no reason to export nothing.
    """
    directory = config.run.directory
    try:
        found: Findings | str = checked(directory, config.features.directory)
    except (PacelineError, OSError):  # which names files of this machine
        found = NOT_CHECKED
    with making_sense(directory):
        report = read_report(directory, found)
    told = replace(report, directory="", error="", losses=(), left_out={}, settings={})
    text = json.dumps(msgspec.to_builtins(told, str_keys=True), ensure_ascii=False)
    # A path may hold what UTF-8 cannot say.
    return file_in_memory("the run's report", text.encode(errors="replace"))


def serving_command(directory: Path, server: str | None, folder: Path | None, host: str) -> list[str]:
    """The command that serves the run's newest export (of that server, in that folder).

    Raises ConfigError if the run has none, or if the note of it is of another version.
    """
    notes = read_notes(directory)
    is_foreign = not notes and os.path.lexists(note_path(directory))
    for path, entry in reversed(notes.items()):
        if (folder is not None and str(folder.absolute()) != path) or not Path(path).is_dir():
            continue
        lines = _commands(path, entry, host)
        is_foreign |= lines is None
        name = server or next(iter(lines or {}), "")
        if lines and name in lines:
            return lines[name]
    again = f"paceline export {directory} --to {server or 'vllm'} DIR"
    if is_foreign:
        raise ConfigError(
            f"{note_path(directory)} is not what this version of Paceline notes of an export.",
            why="Another version wrote it, or it was changed; the exported folders themselves are untouched.",
            next=f"export again: {again}",
        )
    raise ConfigError(
        f"The run in {directory} has no export{f' for {server}' if server else ''}"
        f"{f' in {folder}' if folder else ''}.",
        why="A server loads an exported folder, not a checkpoint.",
        next=again,
    )


def _commands(path: str, entry: dict[str, Any], host: str) -> dict[str, list[str]] | None:
    """The commands of an entry; None if it is not what an export of this version noted."""
    try:
        target, revision = str(entry["target"]), str(entry["revision"])
        served = Served(target, path, str(entry["method"]), int(entry["chain"]), host, revision)
        name = str(entry["format"])
    except (KeyError, TypeError, ValueError):
        return None
    return commands(name, served)


def serve_run(console: Console, command: list[str], *, run: bool) -> None:
    """Print the command, or become the server. Raises ConfigError if the server is not installed."""
    if not run:
        say(console, shlex.join(command))
        return
    program = shutil.which(command[0])
    if program is None:
        raise ConfigError(
            f"There is no {command[0]} on the path.",
            why="Paceline does not install inference servers.",
            next=f"install it, or run where it is: {shlex.join(command)}",
        )
    os.execv(program, command)  # noqa: S606 (no shell)
