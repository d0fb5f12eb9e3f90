"""Features in a folder that hosts share: each host has a run folder and a mount of its own."""

from __future__ import annotations

import io
import os
import shutil
import socket
import subprocess
import uuid
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from paceline.cli.clean import clean_folder
from paceline.config.load import load_run_config
from paceline.config.run import RunConfig
from paceline.errors import ConfigError, StoreError
from paceline.features.ownership import owner_of, store_id
from paceline.ledger.facts import COMPLETED_STEP, CONFIG, FEATURES_LIE, producer_fact, producers_in
from paceline.ledger.ledger import Ledger
from paceline.ledger.place import known
from paceline.roles import feature_place, workers
from paceline.roles.feature_folder import (
    engine_folder,
    folder_of,
    free_if_nothing_was_captured,
    refuse_lost_place,
    refuse_other_place,
    take_folder,
)
from paceline.roles.feature_place import answers_place
from paceline.roles.workers import about_this_process, elsewhere, join
from paceline.testing.tiny_run import TinyRun
from paceline.testing.valkey_server import ValkeyServer


class Hosts:
    """Two hosts by name, on which one shared folder is mounted in different places."""

    def __init__(self, folder: Path, server: ValkeyServer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.server, self.monkeypatch = folder, server, monkeypatch
        self.name = f"hosts-{uuid.uuid4().hex[:8]}"
        self.shared = folder / "shared"
        self.shared.mkdir()

    def host(self, name: str, ledger: str = "redis") -> RunConfig:
        """From now on this process is on that host."""
        self.monkeypatch.setattr(socket, "gethostname", lambda: name)
        mount = self.folder / name / "mnt"
        mount.parent.mkdir(exist_ok=True)
        if not os.path.lexists(mount):
            mount.symlink_to(self.shared)
        where = {"store": "redis", "url": self.server.url} if ledger == "redis" else {"store": "sqlite"}
        run = TinyRun(
            self.folder / name / "run",
            self.folder / "model",
            run={"name": self.name},
            features={"store": "directory", "directory": str(mount)},
            ledger=where,
        )
        return load_run_config(run.run_file)

    def lose_mount(self, name: str) -> None:
        mount = self.folder / name / "mnt"
        mount.unlink()
        mount.mkdir()


@pytest.fixture
def hosts(tmp_path: Path, valkey: ValkeyServer, monkeypatch: pytest.MonkeyPatch) -> Hosts:
    return Hosts(tmp_path, valkey, monkeypatch)


def begun(hosts: Hosts) -> tuple[RunConfig, Ledger, Path]:
    """The run as `paceline train` has begun it on host a."""
    config = hosts.host("a")
    ledger = config.open_ledger()
    ledger.set_facts(None, {CONFIG: {"run.name": hosts.name}})
    return config, ledger, take_folder(config, ledger)


def cleaned(folder: Path) -> str:
    told = io.StringIO()
    clean_folder(Console(width=500, file=told), folder, free=True)
    return told.getvalue()


def test_a_producer_of_another_host_stores_where_the_first_one_does(hosts: Hosts) -> None:
    """Under the same name, wherever the folder is mounted there; what the first start wrote stays."""
    config, ledger, folder = begun(hosts)
    lies, owner = ledger.facts()[FEATURES_LIE], owner_of(folder)
    theirs = hosts.host("b")
    assert theirs.run.directory != config.run.directory
    joined = take_folder(theirs, theirs.open_ledger(joins=True), joins=True)
    assert joined != folder
    assert joined.resolve() == folder.resolve()
    assert store_id(joined) == lies["store"]
    assert (ledger.facts()[FEATURES_LIE], owner_of(folder)) == (lies, owner)
    refuse_other_place(theirs, ledger)
    assert engine_folder(theirs).parent == Path("/dev/shm"), "what only this host exchanges"


def test_who_has_not_mounted_the_shared_folder_neither_stores_nor_trains(hosts: Hosts) -> None:
    """An empty folder is there instead, which would take the features and show them to nobody."""
    config, ledger, folder = begun(hosts)
    theirs = hosts.host("b")
    hosts.lose_mount("b")
    with pytest.raises(StoreError, match="another one, or none") as caught:
        take_folder(theirs, ledger, joins=True)
    assert str(theirs.features.directory) in caught.value.next
    with pytest.raises(StoreError, match="mount the same filesystem"):
        refuse_other_place(theirs, ledger)
    assert list(theirs.features.directory.iterdir()) == []
    hosts.host("a")
    shutil.rmtree(folder)
    with pytest.raises(StoreError, match="Nothing was trained"):
        refuse_other_place(config, ledger)
    told, now = list[str](), replace(ledger.snapshot(), committed=1)
    hosts.monkeypatch.setattr(ledger, "snapshot", lambda: now)
    assert take_folder(config, ledger, told.append) == folder, "a start makes the store anew"
    assert "not mounted here" in told[0], "and says so: it may be on the disk below a missing mount"
    refuse_other_place(config, ledger)


def test_a_start_whose_mount_is_missing_makes_no_store_below_it(hosts: Hosts) -> None:
    """The ledger knows where the filesystem was mounted. Another folder is the user's choice."""
    config, ledger, folder = begun(hosts)
    recorded = ledger.facts()[FEATURES_LIE]
    point = f"{hosts.shared}/"
    lies = {**recorded, "mount": point}
    ledger.set_facts(None, {FEATURES_LIE: lies})
    shutil.rmtree(folder)
    with pytest.raises(StoreError, match="nothing is mounted there now") as caught:
        take_folder(config, ledger)
    assert f"`mount {hosts.shared}`" in caught.value.next
    assert not folder.exists()
    assert ledger.facts()[FEATURES_LIE] == lies
    hosts.monkeypatch.setattr(feature_place, "mount_of", lambda _: (point, "nfs4"))
    assert take_folder(config, ledger) == folder, "it is mounted again, and the store was removed"
    ledger.set_facts(
        None, {FEATURES_LIE: {**lies, "folder": "/elsewhere", "store": "gone", "mount": "/mnt/"}}
    )
    assert take_folder(config, ledger) == folder, "features.directory was changed"


def test_a_mount_that_went_away_while_an_engine_started_gets_no_new_store(hosts: Hosts) -> None:
    """In it every sample would be lost, and the consumer would not read what comes."""
    config, ledger, folder = begun(hosts)
    refuse_lost_place(config, ledger, folder)
    hosts.lose_mount("a")
    with pytest.raises(StoreError, match="another one, or none"):
        refuse_lost_place(config, ledger, folder)
    assert list(config.features.directory.iterdir()) == []
    ledger.set_facts(None, {COMPLETED_STEP: 3})
    refuse_lost_place(config, ledger, folder)


def test_answers_go_along_when_the_shared_folder_is_changed(hosts: Hosts, tmp_path: Path) -> None:
    """Without them lost samples would come back with other tokens."""
    config, _, folder = begun(hosts)
    before, _ = answers_place(config, folder, "0")
    (before / "00000000-0-a.answers").write_bytes(b"kept")
    (tmp_path / "mounted elsewhere").symlink_to(hosts.shared)
    answers_place(config, tmp_path / "mounted elsewhere" / folder.name, "0")
    changed = tmp_path / "other" / folder.name
    for _ in range(2):
        with pytest.raises(StoreError, match=r"^1 files of the run's answers lie in") as caught:
            answers_place(config, changed, "0")
    subprocess.run(caught.value.next.split("`")[1], shell=True, check=True)  # noqa: S602
    now, _ = answers_place(config, changed, "0")
    assert (now / "00000000-0-a.answers").read_bytes() == b"kept"
    assert (config.run.directory / "answers").resolve() == now


def test_nobody_joins_before_the_store_is_there(hosts: Hosts) -> None:
    """The first start makes it; one that joins could be the one that sees another folder."""
    config = hosts.host("b")
    with pytest.raises(StoreError, match="begun to store features"):
        take_folder(config, config.open_ledger(), joins=True)


def test_a_start_elsewhere_waits_for_producers_that_see_what_it_does_not(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is heard of keeps the features where they are."""
    config, ledger, _ = begun(hosts)
    ledger.set_facts(None, {producer_fact("0"): {**about_this_process(config.run.directory), "beat": 1}})
    theirs = hosts.host("b")
    hosts.lose_mount("b")
    with pytest.raises(StoreError, match="host a is at work"):
        take_folder(theirs, ledger, should_stop=lambda: True)


def test_two_hosts_that_join_at_once_take_different_names(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name is claimed in the ledger, which both see; the locks are each host's own."""
    config, ledger, _ = begun(hosts)
    first = join(config)
    theirs, real = hosts.host("b"), workers.elsewhere
    views = [[], None]  # b has read the facts before a's claim was there

    def elsewhere_late(facts: dict[str, object], directory: Path) -> list[str]:
        return views.pop(0) or [] if views else real(facts, directory)

    monkeypatch.setattr(workers, "elsewhere", elsewhere_late)
    monkeypatch.setattr(ledger.__class__, "facts", lambda self: {} if views else dict(self.snapshot().facts))
    second = join(theirs)
    assert (first.role, second.role) == ("producer-1", "producer-2")
    assert set(producers_in(ledger.snapshot().facts)) == {"1", "2"}


def test_a_producer_of_an_equally_named_host_is_told_apart_by_its_run_folder(hosts: Hosts) -> None:
    """Its lock is not in this folder, so nothing here says that it is dead."""
    config = hosts.host("a")
    other = {**about_this_process(config.run.directory), "directory": "/elsewhere/run"}
    facts = {producer_fact("1"): about_this_process(config.run.directory), producer_fact("2"): other}
    assert elsewhere(facts, config.run.directory) == ["2"]


def test_clean_asks_the_ledger_of_a_run_on_several_hosts(hosts: Hosts) -> None:
    """The run's folder is on another host, and its absence here tells nothing."""
    _, ledger, folder = begun(hosts)
    hosts.host("b")
    shutil.rmtree(hosts.folder / "a" / "run")
    assert "left: run" in (told := cleaned(hosts.shared)), told
    assert "can go on from it" in told
    assert folder.exists()
    ledger.set_facts(None, {COMPLETED_STEP: 3})
    assert "is complete" in cleaned(hosts.shared)
    assert not folder.exists()


def test_clean_leaves_a_folder_whose_ledger_it_cannot_ask(hosts: Hosts) -> None:
    """Or whose run has a ledger on another host alone."""
    _, _, folder = begun(hosts)
    with hosts.server.client() as client:
        client.delete(*client.keys(f"{{paceline:{hosts.name}}}*"))
    assert "cannot be read" in cleaned(hosts.shared)
    config = hosts.host("a", ledger="sqlite")
    (config.run.directory / "ledger.json").unlink()
    local = take_folder(config, config.open_ledger())
    assert "can go on from it" in cleaned(hosts.shared)
    hosts.host("b")
    assert "is one of host a" in cleaned(hosts.shared)
    assert folder.exists()
    assert local.exists()


def test_clean_leaves_a_store_whose_identity_it_cannot_read(hosts: Hosts) -> None:
    """It may be the run's own, behind a filesystem that fails."""
    _, _, folder = begun(hosts)
    identity = (folder / "store-id").rename(folder / "aside")
    (folder / "store-id").mkdir()
    assert "no identity that can be read" in cleaned(hosts.shared)
    (folder / "store-id").rmdir()
    identity.rename(folder / "store-id")
    assert folder.exists()


def test_a_start_in_vain_frees_its_folder_only_if_no_other_host_uses_it(hosts: Hosts) -> None:
    """A producer that joined may be about to store the first sample."""
    config, ledger, folder = begun(hosts)
    theirs = hosts.host("b")
    ledger.set_facts(None, {producer_fact("1"): about_this_process(theirs.run.directory)})
    hosts.host("a")
    free_if_nothing_was_captured(config, ledger)
    assert folder.exists()
    ledger.set_facts(None, {producer_fact("1"): None})
    free_if_nothing_was_captured(config, ledger)
    assert not folder.exists()
    assert folder_of(config, ledger) == folder


def test_the_section_needs_a_directory(hosts: Hosts) -> None:
    """There is no place that every host shares by default."""
    config = TinyRun(hosts.folder / "x", hosts.folder / "model", features={"store": "directory"})
    with pytest.raises(ConfigError, match=r"features\.directory"):
        load_run_config(config.run_file)
    assert known(hosts.folder / "x" / "run") is None
