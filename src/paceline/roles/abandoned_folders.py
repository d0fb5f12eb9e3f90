"""Finds feature folders that no run needs, and frees them: for `paceline clean`."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from paceline.errors import ConfigError, PacelineError
from paceline.features.ownership import (
    IDENTITY,
    STORE_ID,
    Owner,
    bytes_of,
    is_strangers,
    owner_of,
    store_id,
    take,
)
from paceline.ledger.facts import COMPLETED_STEP, FEATURES_LIE
from paceline.ledger.locks import live_holder
from paceline.ledger.place import Known
from paceline.roles.feature_folder import remove_unused
from paceline.roles.feature_place import MASTER, PREFIX, STORE
from paceline.roles.snapshot import has_ledger, open_run
from paceline.roles.workers import known_roles


@dataclass(frozen=True)
class FoundFolder:
    """`why`: what is known about its run; `abandoned`: no run needs it, so it may be freed."""

    folder: Path
    num_bytes: int
    why: str
    abandoned: bool


def feature_folders(base: Path) -> Iterator[FoundFolder]:
    """Every feature folder of this user in `base`. Raises ConfigError if it cannot be listed."""
    try:
        entries = sorted(path for path in base.iterdir() if path.name.startswith(PREFIX))
    except OSError as error:
        raise ConfigError(
            f"{base} cannot be listed ({error.strerror}).",
            why="Paceline looks for feature folders there.",
            next="pass the folder of features.directory; its default is /dev/shm.",
        ) from error
    for folder in entries:
        if not is_strangers(folder) and (
            owner_of(folder) or (folder / IDENTITY).exists() or (folder / STORE_ID).exists()
        ):
            why, abandoned = _judged(folder)
            yield FoundFolder(folder, bytes_of(folder), why, abandoned)


def free_abandoned(found: FoundFolder) -> bool:
    """Free the folder, unless a process began to use it; returns whether it is gone."""
    return _judged(found.folder)[1] and remove_unused(found.folder)


def _judged(folder: Path) -> tuple[str, bool]:
    owner = owner_of(folder)
    if owner is None:
        return "it does not name its run", False
    lock = take(folder)
    if lock is None:
        return f"run {owner.run} in {owner.directory} uses it", False
    with lock:
        if owner.ledger is not None:
            return _judged_by_ledger(folder, owner, owner.ledger)
        if owner.host not in ("", socket.gethostname()):
            return f"run {owner.run} in {owner.directory} is one of host {owner.host}", False
        return _judged_by_run(folder, owner)


def _judged_by_run(folder: Path, owner: Owner) -> tuple[str, bool]:
    run = f"run {owner.run} in {owner.directory}"
    if not has_ledger(owner.directory):
        return f"{run} is gone, or was moved", True
    if any(live_holder(owner.directory, role) is not None for role in known_roles(owner.directory)):
        return f"{run} is at work", False
    try:
        facts = open_run(owner.directory).facts()
    except (PacelineError, OSError) as error:
        return f"the ledger of {run} cannot be read: {error}", False
    return _judged_by_facts(folder, run, facts)


def _judged_by_ledger(folder: Path, owner: Owner, ledger: Mapping[str, Any]) -> tuple[str, bool]:
    """Of a run whose roles are on several hosts: what lies on this one tells nothing."""
    run = f"run {owner.run}"
    try:
        facts = msgspec.convert(ledger, Known).view(owner.directory).facts()
    except (PacelineError, OSError, msgspec.MsgspecError) as error:
        return f"the ledger of {run} cannot be read: {error}", False
    return _judged_by_facts(folder, run, facts)


def _judged_by_facts(folder: Path, run: str, facts: Mapping[str, Any]) -> tuple[str, bool]:
    if facts.get(COMPLETED_STEP) is not None:
        return f"{run} is complete", True
    lies: dict[str, Any] = facts.get(FEATURES_LIE) or {}
    if STORE in lies:
        try:
            here = store_id(folder)
        except (PacelineError, OSError) as error:
            return f"the store of {run} cannot be read: {error}", False
        if not here:
            return f"the store of {run} has no identity that can be read", False
        moved = lies[STORE] != here
    elif MASTER in lies:  # the folder holds nothing but its owner's name, wherever it lies on a host
        moved = Path(lies["folder"]).name != folder.name
    else:
        moved = bool(lies) and Path(lies["folder"]) != folder.absolute()
    if moved:
        return f"{run} keeps its features in {lies['folder']} now", True
    return f"{run} can go on from it", False
