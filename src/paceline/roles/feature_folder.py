"""Chooses the folder of a run's features, and finds feature folders that no run needs.

The folder's name follows from the run's name and directory. If another user took that name, the run chooses a
free one and keeps it. If the run was moved, or features.directory was changed, the run takes another folder,
and its producer frees the old one.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paceline.config.run import RunConfig
from paceline.errors import ConfigError, PacelineError, StoreError
from paceline.features.ownership import (
    IDENTITY,
    FolderLock,
    Owner,
    bytes_of,
    hold,
    is_strangers,
    owner_of,
    remove,
    sign,
    take,
)
from paceline.ledger.facts import COMPLETED_STEP, FEATURES_LIE, FEATURES_NAME, producers_in
from paceline.ledger.ledger import Ledger
from paceline.ledger.locks import live_holder
from paceline.roles.snapshot import has_ledger, open_run
from paceline.roles.workers import boot_id, elsewhere, known_roles, role_of, speaks, take_from

PREFIX = "paceline-"


def folder_of(config: RunConfig, ledger: Ledger) -> Path:
    """The folder of the run's features; it need not exist yet."""
    usual = config.feature_folder
    name = ledger.facts().get(FEATURES_NAME)
    if name is not None and name.startswith(usual.name) and not is_strangers(usual.with_name(name)):
        return usual.with_name(name)
    if not is_strangers(usual):
        return usual
    chosen = {FEATURES_NAME: f"{usual.name}-{secrets.token_hex(4)}"}
    if name is None:  # the other role may settle it at the same time
        chosen = ledger.set_facts(None, chosen, settle=True)
    else:
        ledger.set_facts(None, chosen)
    return usual.with_name(chosen[FEATURES_NAME])


def take_folder(
    config: RunConfig,
    ledger: Ledger,
    tell: Callable[[str], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
    *,
    joins: bool = False,
) -> Path:
    """Create and sign the folder, and free the one that the run used before. For a producer.

    Raises StoreError if live producers on another host keep the features in that host's memory. Whether they
    live, it may have to wait for: `tell` says so. A producer that `joins` never moves the features.
    """
    folder, run = folder_of(config, ledger), config.run.directory.absolute()
    recorded = ledger.facts().get(FEATURES_LIE)
    if recorded is not None and recorded != _place(config, ledger):
        if joins:
            raise _would_move(recorded["folder"], folder)
        _take_from_silent(config, ledger, recorded, tell, should_stop)
    if recorded is not None and Path(recorded["folder"]) != folder.absolute():
        _free_left(Path(recorded["folder"]), config.run.name, run)
    record_place(config, ledger)
    sign(folder, Owner(config.run.name, run))
    return folder


def _take_from_silent(
    config: RunConfig,
    ledger: Ledger,
    recorded: dict[str, Any],
    tell: Callable[[str], None],
    should_stop: Callable[[], bool],
) -> None:
    """The run goes on here if nobody lives where its features lie. Raises StoreError if somebody does."""
    facts, timeout_s = ledger.facts(), config.machine.producer_timeout_s
    for worker in elsewhere(facts):
        about = producers_in(facts)[worker]
        if about.get("boot") != recorded["boot"]:
            continue
        host = about.get("host", "?")
        tell(f"waiting up to {timeout_s:g} s for a sign of life of {role_of(worker)} on host {host}")
        if speaks(ledger, worker, timeout_s, should_stop):
            raise _on_another_host(recorded["folder"], host)
        take_from(ledger, [worker], "it was not heard of, and the run goes on elsewhere")


def _would_move(theirs: str, ours: Path) -> StoreError:
    return StoreError(
        f"The features of this run lie in {theirs}, and this producer would keep its own in {ours}, "
        "another place or mount.",
        why="The consumer could not read them: each would be a lost sample, again and again.",
        next="join on the host of the run's other roles, with the run's own folder (containers: one shared "
        "/dev/shm). After a restart of that host start the run first: `paceline train RUN.yaml`.",
    )


def _on_another_host(folder: str, host: object) -> StoreError:
    return StoreError(
        f"The features of this run lie in {folder} on host {host}.",
        why="The consumer could not read what a producer of this host keeps in its own memory.",
        next="start this producer on that host, or choose a feature store that hosts share.",
    )


def free_if_nothing_was_captured(config: RunConfig, ledger: Ledger) -> None:
    """Free the folder that a start made in vain. For the supervisor, once its roles have ended."""
    if not ledger.snapshot().committed and not is_strangers(folder := folder_of(config, ledger)):
        _remove_unused(folder)


def _free_left(folder: Path, run: str, directory: Path) -> None:
    """Free the folder that the run used before it was moved; not that of a run of which this is a copy."""
    owner = None if is_strangers(folder) else owner_of(folder)
    if owner is None or owner.run != run:
        return
    if owner.directory == directory or not has_ledger(owner.directory):
        _remove_unused(folder)


def _remove_unused(folder: Path) -> bool:
    """Remove the folder; False if a process uses it."""
    lock = take(folder)
    if lock is None:
        return False
    with lock, suppress(OSError, StoreError):
        remove(folder)
    return not folder.exists()


# -- files of the engine ---------------------------------------------------------------------


def engine_folder(config: RunConfig) -> Path:
    """The folder for the files of the run's engine, if it has any; it need not exist yet."""
    return config.feature_folder.with_name(f"{config.feature_folder.name}-engine")


class EngineFolder:
    """That folder, in use from `take` to `close`; nobody reads its files afterwards. For the producer."""

    def __init__(self, config: RunConfig) -> None:
        self._folder = engine_folder(config)
        self._owner = Owner(config.run.name, config.run.directory.absolute())
        self._lock: FolderLock | None = None

    def take(self) -> Path:
        """Create and sign it. Raises StoreError, also if another user took its name.

        A producer that ends may remove it before this one holds it.
        """
        while self._lock is None or not self._lock.is_of(self._folder):
            sign(self._folder, self._owner)
            self._lock = hold(self._folder)
        return self._folder

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            _remove_unused(self._folder)


# -- the same folder for both roles ---------------------------------------------------------


def record_place(config: RunConfig, ledger: Ledger) -> None:
    """Record where the producer keeps the features. For the producer."""
    place = _place(config, ledger)
    if ledger.facts().get(FEATURES_LIE) != place:
        ledger.set_facts(None, {FEATURES_LIE: place})


def refuse_other_place(config: RunConfig, ledger: Ledger) -> None:
    """Raise StoreError if this consumer looks for the features in another place than the producer's.

    A record from another boot of the machine counts only by its folder.
    """
    theirs, ours = ledger.facts().get(FEATURES_LIE), _place(config, ledger)
    if theirs is None or theirs == ours:
        return
    if theirs["folder"] == ours["folder"] and theirs["boot"] != ours["boot"]:
        return
    mount = "" if theirs["folder"] != ours["folder"] else ", which is another mount there"
    raise StoreError(
        f"The producer keeps the features in {theirs['folder']}{mount}, and this consumer looks for them in "
        f"{ours['folder']}.",
        why="The consumer would find none of them. Nothing was trained, and no sample was quarantined.",
        next="give both roles the same features.directory (containers: one shared /dev/shm). If it was "
        "changed for both, start the producer first.",
    )


def _place(config: RunConfig, ledger: Ledger) -> dict[str, Any]:
    try:
        device = config.features.directory.stat().st_dev
    except OSError:
        device = 0
    return {"folder": str(folder_of(config, ledger).absolute()), "device": device, "boot": boot_id()}


# -- abandoned folders ---------------------------------------------------------------------


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
        if not is_strangers(folder) and (owner_of(folder) or (folder / IDENTITY).exists()):
            why, abandoned = _judged(folder)
            yield FoundFolder(folder, bytes_of(folder), why, abandoned)


def free_abandoned(found: FoundFolder) -> bool:
    """Free the folder, unless a process began to use it; returns whether it is gone."""
    return _judged(found.folder)[1] and _remove_unused(found.folder)


def _judged(folder: Path) -> tuple[str, bool]:
    owner = owner_of(folder)
    if owner is None:
        return "it does not name its run", False
    lock = take(folder)
    if lock is None:
        return f"run {owner.run} in {owner.directory} uses it", False
    with lock:
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
    if facts.get(COMPLETED_STEP) is not None:
        return f"{run} is complete", True
    lies = facts.get(FEATURES_LIE)
    if lies is not None and Path(lies["folder"]) != folder.absolute():
        return f"{run} keeps its features in {lies['folder']} now", True
    return f"{run} can go on from it", False
