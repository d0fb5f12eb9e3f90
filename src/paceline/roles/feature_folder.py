"""Chooses the folder of a run's features, and finds feature folders that no run needs.

The folder's name follows from the run's name and directory. If another user took that name, the run chooses a
free one and keeps it. If the run was moved, or features.directory was changed, the run takes another folder,
and its producer frees the old one.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from paceline.config.run import RunConfig
from paceline.errors import StoreError
from paceline.features.ownership import (
    FolderLock,
    Owner,
    hold,
    is_strangers,
    owner_of,
    remove,
    sign,
    take,
)
from paceline.ledger.facts import COMPLETED_STEP, FEATURES_LIE, FEATURES_NAME, producers_in
from paceline.ledger.ledger import Ledger
from paceline.ledger.session import write_facts
from paceline.roles.feature_place import (
    is_on_several_hosts,
    is_seen,
    looks_elsewhere,
    name_on_all_hosts,
    on_another_host,
    owner_now,
    place_now,
    refuse_unmounted,
    would_move,
)
from paceline.roles.snapshot import has_ledger
from paceline.roles.workers import elsewhere, role_of, speaks, take_from


def folder_of(config: RunConfig, ledger: Ledger) -> Path:
    """The folder of the run's features; it need not exist yet."""
    usual = config.feature_folder
    if is_on_several_hosts(config):
        return usual.with_name(name_on_all_hosts(config, ledger))
    name = ledger.facts().get(FEATURES_NAME)
    if name is not None and name.startswith(usual.name) and not is_strangers(usual.with_name(name)):
        return usual.with_name(name)
    if config.features.in_directory and not is_strangers(usual):
        return usual
    chosen = {FEATURES_NAME: f"{usual.name}-{secrets.token_hex(4)}"}
    if name is None:  # the other role may settle it at the same time
        chosen = ledger.set_facts(None, chosen, settle=True)
    else:
        write_facts(ledger, chosen)
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

    Raises StoreError if live producers on another host keep the features where this one does not see them,
    or if the filesystem that holds them is not mounted here any more. Whether they live, it may have to wait
    for: `tell` says so. A producer that `joins` moves nothing.
    """
    folder, recorded = folder_of(config, ledger), ledger.facts().get(FEATURES_LIE)
    if recorded is None or not is_seen(config, folder, recorded):
        if joins and (recorded is not None or is_on_several_hosts(config)):
            raise would_move(config, recorded, folder)
        if recorded is not None:
            refuse_unmounted(config, recorded, folder)
            _take_from_silent(config, ledger, recorded, tell, should_stop)
            if not config.features.in_directory:
                if ledger.snapshot().committed:
                    tell(
                        "no live producer of this run is at the Mooncake master: what was captured and is "
                        "not yet in a checkpoint is captured again, unless other processes hold it"
                    )
            elif config.features.is_shared and ledger.snapshot().committed:
                tell(
                    f"the features of this run are not in {folder}: they were removed, features.directory "
                    "was changed, or the shared folder is not mounted here. A new store is made there, and "
                    "what was captured and is not yet in a checkpoint is captured again"
                )
            if Path(recorded["folder"]) != folder.absolute():
                _free_left(Path(recorded["folder"]), config.run.name, config.run.directory.absolute())
    if not joins or owner_of(folder) is None:
        sign(folder, owner_now(config))
    if not joins or recorded is None:
        record_place(config, ledger)
    return folder


def _take_from_silent(
    config: RunConfig,
    ledger: Ledger,
    recorded: dict[str, Any],
    tell: Callable[[str], None],
    should_stop: Callable[[], bool],
) -> None:
    """The run goes on here if no producer lives where its features lie. Raises StoreError if one does."""
    facts, timeout_s = ledger.facts(), config.machine.producer_timeout_s
    for worker in elsewhere(facts, config.run.directory):
        about = producers_in(facts)[worker]
        if not config.features.is_shared and about.get("boot") != recorded["boot"]:
            continue
        host = about.get("host", "?")
        tell(f"waiting up to {timeout_s:g} s for a sign of life of {role_of(worker)} on host {host}")
        if speaks(ledger, worker, timeout_s, should_stop):
            raise on_another_host(config, recorded["folder"], host)
        take_from(ledger, [worker], "it was not heard of, and the run goes on elsewhere")


def free_if_nothing_was_captured(config: RunConfig, ledger: Ledger) -> None:
    """Free the folder that a start made in vain. For the supervisor, once its roles have ended."""
    now = ledger.snapshot()
    if now.committed or (config.features.is_shared and elsewhere(now.facts, config.run.directory)):
        return
    if not is_strangers(folder := folder_of(config, ledger)):
        remove_unused(folder)


def _free_left(folder: Path, run: str, directory: Path) -> None:
    """Free the folder that the run used before it was moved; not that of a run of which this is a copy."""
    owner = None if is_strangers(folder) else owner_of(folder)
    if owner is None or owner.run != run:
        return
    if owner.directory == directory or not has_ledger(owner.directory):
        remove_unused(folder)


def remove_unused(folder: Path) -> bool:
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
    return config.features.memory / f"{config.feature_folder.name}-engine"


class EngineFolder:
    """That folder, in use from `take` to `close`; no process reads its files afterwards. For the producer."""

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
            remove_unused(self._folder)


# -- the same folder for all roles ----------------------------------------------------------


def record_place(config: RunConfig, ledger: Ledger) -> None:
    """Record where the producers keep the features. For a producer."""
    place = place_now(config, folder_of(config, ledger))
    if ledger.facts().get(FEATURES_LIE) != place:
        write_facts(ledger, {FEATURES_LIE: place})


def refuse_lost_place(config: RunConfig, ledger: Ledger, folder: Path) -> None:
    """Raise StoreError if the shared store went away since `take_folder`. For a producer that opens it.

    An engine may take minutes to start. A new store in an empty mount point would make every sample lost.
    """
    facts = ledger.facts()
    recorded = facts.get(FEATURES_LIE)
    if (
        not (config.features.is_shared and config.features.in_directory)
        or recorded is None
        or facts.get(COMPLETED_STEP) is not None
    ):
        return
    if not is_seen(config, folder, recorded):
        raise would_move(config, recorded, folder)


def refuse_other_place(config: RunConfig, ledger: Ledger) -> None:
    """Raise StoreError if this consumer looks for the features in another place than the producers'.

    At a Mooncake master nothing is there before a producer is: its store finds out when it reads.
    """
    if not config.features.in_directory:
        return
    theirs, folder = ledger.facts().get(FEATURES_LIE), folder_of(config, ledger)
    if theirs is None or is_seen(config, folder, theirs):
        return
    if not config.features.is_shared:
        ours = place_now(config, folder)
        # A record from another boot of the machine counts only by its folder.
        if theirs["folder"] == ours["folder"] and theirs["boot"] != ours["boot"]:
            return
    raise looks_elsewhere(config, theirs["folder"], folder)
