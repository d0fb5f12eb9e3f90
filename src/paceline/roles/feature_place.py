"""Where a run's features lie, and whether this process sees them there.

In the memory of one host the place is a folder, its device and the host's boot. In a folder that hosts share
it is the store's identity, a file that the first start writes and that is recorded in the ledger. A role that
finds another one, or none, has not mounted what the others have, and must not go on. Each host may have
mounted it in a place of its own.

In the memory that producers give to a Mooncake master the place is a name, which the first role chooses in
the ledger, and the master that knows a live producer of that name.
"""

from __future__ import annotations

import json
import secrets
import shlex
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from paceline.config.run import RunConfig
from paceline.errors import ConfigError, StoreError
from paceline.features.ownership import Owner, make_private, make_store_id, store_id
from paceline.features.settings import MooncakeSection
from paceline.ledger.facts import FEATURES_NAME
from paceline.ledger.ledger import Ledger
from paceline.ledger.place import known
from paceline.mounts import look_anew, mount_of
from paceline.roles.question import ask
from paceline.roles.workers import boot_id

PREFIX = "paceline-"
STORE = "store"  # of a recorded place: the identity of a store in a folder that hosts share
MOUNT = "mount"  # and where the filesystem that holds it was mounted
MASTER = "master"  # of a recorded place: the Mooncake master


def is_on_several_hosts(config: RunConfig) -> bool:
    """Whether other hosts, with run folders of their own, may reach both features and ledger."""
    return config.features.is_shared and config.ledger.is_shared


def name_on_all_hosts(config: RunConfig, ledger: Ledger) -> str:
    """The name of the features' folder on every host; the first role that asks chooses it."""
    name: str | None = ledger.facts().get(FEATURES_NAME)
    if name is None:
        chosen = f"{PREFIX}{config.run.name}-{secrets.token_hex(4)}"
        name = str(ledger.set_facts(None, {FEATURES_NAME: chosen}, settle=True)[FEATURES_NAME])
    return name


def answers_place(
    config: RunConfig, features: Path, worker: str, *, repeats_bits: bool = False
) -> tuple[Path, str]:
    """The folder of the run's kept answers, and this process's name in it. Raises OSError, StoreError.

    A lost sample may be captured again by a producer of another host. So on several hosts they lie beside the
    features, or in the folder that the run file names, and the run's folder refers to them. Without such a
    folder each host keeps its own: an engine that repeats its bits writes the same answers anyway; another
    one is refused by a ConfigError.
    """
    own = config.run.directory / "answers"
    if not is_on_several_hosts(config):
        return own, ""
    beside = features.absolute().parent
    if isinstance(config.features, MooncakeSection):
        if config.features.answers is None:
            if not repeats_bits:
                raise _nowhere_for_answers()
            return own, ""
        beside = config.features.answers.absolute()
    shared = beside / f"{features.name}-answers"
    make_private(shared)
    if own.is_symlink() and own.readlink() != shared:
        before = {path.name for path in own.glob("*.answers")}
        if left := before - {path.name for path in shared.glob("*.answers")}:
            raise _answers_left(own.readlink(), shared, len(left))
        own.unlink(missing_ok=True)
    with suppress(FileExistsError):
        own.symlink_to(shared)
    return shared, f"{worker}-{secrets.token_hex(4)}"


def owner_now(config: RunConfig) -> Owner:
    """What this process writes into the folder of the run."""
    run, directory = config.run.name, config.run.directory.absolute()
    if not config.features.is_shared:
        return Owner(run, directory)
    place = known(config.run.directory) if config.ledger.is_shared else None
    ledger = None if place is None else {**asdict(place), "position": ""}
    return Owner(run, directory, socket.gethostname(), ledger)


def place_now(config: RunConfig, folder: Path) -> dict[str, Any]:
    """What a producer records. In a shared folder it makes a store if there is none. Raises StoreError."""
    try:
        device = config.features.directory.stat().st_dev
    except OSError:
        device = 0
    place = {"folder": str(folder.absolute()), "device": device, "boot": boot_id()}
    if isinstance(config.features, MooncakeSection):
        return {**place, MASTER: config.features.master}
    if not config.features.is_shared:
        return place
    try:
        return {**place, STORE: make_store_id(folder), MOUNT: mount_of(folder)[0]}
    except OSError as error:
        raise StoreError(
            f"The feature store in {folder} cannot be made ({error}).",
            why="Without it features cannot be stored.",
            next="check features.directory, its mount and this user's rights, and run the command again.",
        ) from error


def is_seen(config: RunConfig, folder: Path, recorded: Mapping[str, Any]) -> bool:
    """Whether this process sees the recorded place in its folder, or a live producer of it. Raises
    StoreError."""
    if isinstance(config.features, MooncakeSection):
        if MASTER not in recorded or Path(recorded["folder"]).name != folder.name:
            return False
        question = json.dumps({"features": config.features.model_dump(mode="json"), "store": folder.name})
        told = json.loads(ask("paceline.roles.mooncake_prober", question, "look at the Mooncake master"))
        return bool(told["seen"])
    if not config.features.is_shared:
        return dict(recorded) == place_now(config, folder)
    if STORE not in recorded:
        return False
    look_anew(folder)
    return bool(store_id(folder) == recorded[STORE])


def refuse_unmounted(config: RunConfig, recorded: Mapping[str, Any], folder: Path) -> None:
    """Raise StoreError if the store was made on a filesystem that is not mounted here now.

    The folder is then one of the disk below the mount point, which no other host sees.
    """
    before, now = str(recorded.get(MOUNT, "")), mount_of(folder)[0]
    is_gone = now not in ("", before) and before.startswith(now)
    if not config.features.is_shared or recorded["folder"] != str(folder.absolute()) or not is_gone:
        return
    point = before.rstrip("/")
    raise StoreError(
        f"The features of this run lie on what was mounted at {point}, and nothing is mounted there now.",
        why=f"A new store in {folder} would be on the disk below, where no other host sees it. "
        "Nothing was changed.",
        next=f"mount it (`mount {shlex.quote(point)}`) and run the same command again; or, if it is gone for "
        "good, set features.directory to another folder: what is in no checkpoint is captured again there.",
    )


def would_move(config: RunConfig, recorded: Mapping[str, Any] | None, ours: Path) -> StoreError:
    """A producer that joins does not see the features that are there."""
    if recorded is None:
        return StoreError(
            "No producer of this run has begun to store features yet.",
            why="A producer that joins must store them where the others do, and cannot tell yet where.",
            next="once `paceline train` captures, run the same command again.",
        )
    theirs = recorded["folder"]
    if isinstance(config.features, MooncakeSection):
        return StoreError(
            f"The Mooncake master at {config.features.master} knows no live producer of this run.",
            why="The others store features at another master, or all of them are dead: the consumer might "
            "not read what this producer stored. Nothing was changed.",
            next=f"set features.master to that of the others (the start had {recorded.get(MASTER)}). If they "
            "are dead, start the run first: `paceline train RUN.yaml`.",
        )
    if config.features.is_shared:
        return StoreError(
            f"The features of this run lie in {theirs} on the host that started it, and the store in {ours} "
            "here is another one, or none.",
            why="The consumer could not read what this producer stored. Nothing was changed.",
            next=f"mount the same filesystem at {config.features.directory}, or set features.directory to "
            "where it is mounted here, and run the same command again.",
        )
    return StoreError(
        f"The features of this run lie in {theirs}, and this producer would keep its own in {ours}, "
        "another place or mount.",
        why="The consumer could not read them: each would be a lost sample, again and again.",
        next="join on the host of the run's other roles, with the run's own folder (containers: one shared "
        "/dev/shm). After a restart of that host start the run first: `paceline train RUN.yaml`. For several "
        "hosts: features: {store: directory, directory: ...}, docs/producers.md.",
    )


def _nowhere_for_answers() -> ConfigError:
    return ConfigError(
        "This engine does not repeat its bits, and the run's hosts have no folder for the tokens of answers.",
        why="A sample that another host captures again could have another answer than the one before.",
        next="set features.answers to a folder that every host mounts, in the same run file.",
    )


def _answers_left(before: Path, now: Path, count: int) -> StoreError:
    """features.directory was changed, and the answers are still where it was."""
    return StoreError(
        f"{count} files of the run's answers lie in {before} and not in {now}.",
        why="A lost sample must be captured again with the tokens that were written first. Nothing was "
        "captured.",
        next=f"`cp -p {shlex.quote(str(before))}/*.answers {shlex.quote(str(now))}/`, then run the same "
        "command again.",
    )


def on_another_host(config: RunConfig, folder: str, host: object) -> StoreError:
    """Live producers store features where this start does not see them."""
    if isinstance(config.features, MooncakeSection):
        return StoreError(
            f"A producer on host {host} is at work, and the Mooncake master at {config.features.master} does "
            "not know it.",
            why="The consumer could not read what both of them store. Nothing was changed.",
            next="give both the same features.master, or stop that producer first.",
        )
    if config.features.is_shared:
        return StoreError(
            f"A producer on host {host} is at work, and this host does not see its features in {folder}.",
            why="The consumer could not read what both of them store. Nothing was changed.",
            next=f"mount the same filesystem at {config.features.directory}, or stop that producer first.",
        )
    return StoreError(
        f"The features of this run lie in {folder} on host {host}.",
        why="The consumer could not read what a producer of this host keeps in its own memory.",
        next="start this producer on that host, or choose a feature store that hosts share "
        "(features: {store: directory}, docs/producers.md).",
    )


def looks_elsewhere(config: RunConfig, theirs: str, ours: Path) -> StoreError:
    """This consumer and the producers have different places."""
    mount = "" if theirs != str(ours.absolute()) else ", which is another mount there"
    advice = (
        "mount the same filesystem on both hosts, and set features.directory to where it is mounted here."
        if config.features.is_shared
        else "give both roles the same features.directory (containers: one shared /dev/shm)."
    )
    return StoreError(
        f"The producer keeps the features in {theirs}{mount}, and this consumer looks for them in "
        f"{ours.absolute()}.",
        why="The consumer would find none of them. Nothing was trained, and no sample was quarantined.",
        next=f"{advice} If it was changed for both, start the producer first.",
    )
