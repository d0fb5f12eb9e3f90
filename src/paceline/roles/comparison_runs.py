"""Runs a comparison's stages, each in a process of its own, and collects what they found. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paceline.config.run import RunConfig
from paceline.errors import TrainingError
from paceline.ledger.locks import RoleLock
from paceline.roles.child import RoleFailedError
from paceline.roles.comparison import RESULT, Comparison, prepared
from paceline.roles.plan import events_path
from paceline.roles.supervisor import run_comparer
from paceline.telemetry import NewEvents

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """What a variant gave (comparer.py); `failed`: why it gave nothing; `kept`: since an earlier call."""

    name: str
    found: dict[str, Any] | None
    failed: str = ""
    kept: bool = False


class ComparisonStopped(Exception):  # noqa: N818 (no error)
    """The user stopped the comparison; what is kept stays."""


def run_comparison(
    run_file: Path, config: RunConfig, comparison: Comparison, tell: Tell
) -> Iterator[Outcome]:
    """Each variant's outcome when it is known, in order. Raises ComparisonStopped, or the error of a stage.

    A variant whose training fails is an outcome; the others are compared all the same.
    """
    lock = RoleLock(comparison.directory, "comparison")
    try:
        _stage(run_file, config, comparison, tell)
        told = prepared(comparison.directory)
        tell(
            f"features: {len(told['samples'])} samples, {told['tokens']:,} tokens to learn, "
            f"{told['bytes'] / 1e6:,.0f} MB in {comparison.directory / told['features']}"
        )
        for number, variant in enumerate(comparison.variants):
            path = comparison.folder_of(config, number, told["features"]) / RESULT
            is_kept = path.exists()
            tell(f"{number + 1} of {len(comparison.variants)}: {variant.name}{' (kept)' if is_kept else ''}")
            try:
                if not is_kept:
                    _stage(run_file, config, comparison, tell, number)
            except RoleFailedError as error:
                if error.exit_code != TrainingError.exit_code:
                    raise
                yield Outcome(variant.name, None, error.what)
                continue
            yield Outcome(variant.name, json.loads(path.read_bytes()), kept=is_kept)
    finally:
        lock.release()


def _stage(
    run_file: Path, config: RunConfig, comparison: Comparison, tell: Tell, number: int | None = None
) -> None:
    events = NewEvents(events_path(config, "comparer"))

    def look() -> None:
        for event in events.read():
            if line := _line(event):
                tell(line)

    arguments = [comparison.model_dump_json(), *([] if number is None else [str(number)])]
    if not run_comparer(run_file, config, look, *arguments):
        raise ComparisonStopped
    look()


def _line(event: dict[str, Any]) -> str:
    name = event.get("event")
    if name == "note":
        return f"note: {event.get('message')}"
    if name == "group":
        return f"captured a group of {event.get('samples')} samples in {event.get('seconds', 0):.0f} s"
    if name == "replayed":
        return f"step {event.get('step')} of {event.get('steps')}: loss {event.get('loss', 0):.3f}"
    return "measuring by lossless decoding" if name == "measuring" else ""
