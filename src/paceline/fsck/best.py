"""The checker's rule for the drafts in `checkpoints/best` (C10): each is whole, and a measured one is there.

Formats: training/held_drafts.py, evaluation/curve.py. A folder has the name of its checkpoint, the
checkpoint's manifest, whose digest ends the name, and of the manifest's files the draft, or all its parts.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paceline.fsck.artefacts import sha256
from paceline.fsck.files import open_file, read_file, size_of
from paceline.fsck.report import Report
from paceline.fsck.viewed import AnyLedger

NAME = re.compile(r"step-(\d{8,})-\d{6,}-[0-9a-f]+")
DRAFT = re.compile(r"draft(-\d{5}-of-\d{5})?\.safetensors")
UNREADABLE = (AttributeError, LookupError, OSError, TypeError, ValueError)


def check_best(ledger: AnyLedger, directory: Path, report: Report) -> None:
    """Compare every held draft with its manifest, and the curve with what is held."""
    folder = directory / "checkpoints" / "best"
    try:
        there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    except PermissionError as error:
        report.forbidden = f"this user may not read {error.filename}"
        return
    left = []
    for name in there:
        if not NAME.fullmatch(name):
            left.append(name)
            continue
        problems = list(_problems(ledger, folder / name, report))
        if problems and (folder / name).is_dir():  # not released by a live run meanwhile
            report.error("C10", f"the held draft of checkpoint {name}: {problems[0]}")
    if left:
        report.note("folders beside the held drafts, unfinished or swept by the next measurement", left)
    measured = _measured(directory / "evaluations.jsonl", ledger.facts)
    if measured and not measured & set(there):
        report.note("the drafts of all measured checkpoints are gone; an export takes the newest checkpoint")


def _problems(ledger: AnyLedger, folder: Path, report: Report) -> Iterator[str]:
    try:
        data = read_file(folder / "manifest.json")
        if not folder.name.endswith(sha256(data)[:16]):
            yield "its manifest is not the one that it was named after"
            return
        manifest = json.loads(data)
        files = {path.name for path in folder.iterdir()} - {"manifest.json"}
        if manifest["run_id"] != ledger.facts.get("run_id", manifest["run_id"]):
            yield f"it belongs to the run {manifest['run_id']}"
        if not files:
            yield "it holds no file but the manifest"
        for name in sorted(name for name in manifest["files"] if DRAFT.fullmatch(name)):
            if name not in files:
                yield f"{name} is missing"
        for name in sorted(files):
            yield from _compared(folder / name, manifest["files"][name])
    except PermissionError as error:
        report.forbidden = f"this user may not read {error.filename}"
    except UNREADABLE as error:
        yield f"it cannot be read ({type(error).__name__}: {error})"


def _compared(path: Path, expected: dict[str, Any]) -> Iterator[str]:
    if size_of(path) != expected["bytes"]:
        yield f"{path.name} is damaged: its size is not the recorded one"
        return
    with open_file(path) as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
            yield f"{path.name} is damaged"


def _measured(path: Path, facts: dict[str, Any]) -> set[str]:
    """The names of the run's measured checkpoints; a file or lines that cannot be read tell of none."""
    names = set()
    try:
        lines = read_file(path, 1 << 26).split(b"\n")
    except OSError:
        return set()
    for line in lines:
        try:
            point = json.loads(line)
            if point["began"] == facts.get("rendering_date", ""):
                names.add(str(point["checkpoint"]))
        except (*UNREADABLE, RecursionError):
            continue
    return names
