"""Writes an exported folder aside, has it checked, and gives it its name. It replaces only its like."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from paceline import durable_files
from paceline.errors import ConfigError
from paceline.exports.export import FolderContent

NOTE = "paceline.json"  # names every file of the folder with its digest
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"

Finish = Callable[[Path], tuple[str, dict[str, Any]]]


def write_folder(folder: Path, content: FolderContent, finish: Finish) -> None:
    """Write the folder durably; on any error nothing but the old folder is left.

    `finish` is called with the folder as written aside: it checks it, raising an error that stops the
    export, and returns the model card and the values for the folder's note. Raises ConfigError for a folder
    that holds anything else than an export, OSError if the disk fails.
    """
    refuse_foreign(folder)
    durable_files.make_folder(folder.parent)
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.new")
    try:
        aside.mkdir()
        save_file(dict(content.tensors), aside / WEIGHTS, metadata={"format": "pt"})
        (aside / CONFIG).write_text(_json(content.config))
        card, values = finish(aside)
        (aside / CARD).write_text(card)
        files = {name: _digest(aside / name) for name in (CONFIG, WEIGHTS, CARD)}
        (aside / NOTE).write_text(_json({**values, "files": files}))
        for path in aside.iterdir():
            path.chmod(0o644)
            durable_files.sync_folder(path)  # a file is synced in the same way
        durable_files.sync_folder(aside)
        _replace(folder, aside)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def refuse_foreign(folder: Path) -> None:
    """Raise ConfigError unless `folder` is missing, empty, or holds just what an export wrote, unchanged."""
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise _not_ours(folder, "it is not a folder")
    names = {path.name for path in folder.iterdir()}
    if not names:
        return
    try:
        written: dict[str, str] = dict(json.loads((folder / NOTE).read_text())["files"])
    except (OSError, ValueError, LookupError, TypeError):
        raise _not_ours(folder, f"it has files and no {NOTE} of an export") from None
    if foreign := sorted(names - {*written, NOTE}):
        raise _not_ours(folder, f"it also holds {foreign[0]}")
    changed = [name for name in sorted(names & {*written}) if _digest(folder / name) != written[name]]
    if changed:
        raise _not_ours(folder, f"its {changed[0]} was changed since")


def _not_ours(folder: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"{folder} is not overwritten: {reason}.",
        why="An export replaces only a folder that an export wrote.",
        next="choose another folder, or move that one away.",
    )


def _replace(folder: Path, aside: Path) -> None:
    old = aside.with_suffix(".old")
    if folder.exists():
        folder.rename(old)
    aside.rename(folder)
    durable_files.sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"
