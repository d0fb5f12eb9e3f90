"""Which folder a run's features lie in, what is freed when that changes, and what no run needs any more."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from paceline.cli.clean import clean_folder
from paceline.config.load import load_run_config
from paceline.config.run import RunConfig
from paceline.errors import ConfigError
from paceline.features.ownership import FolderLock, Owner, hold, owner_of, sign
from paceline.ledger.locks import RoleLock
from paceline.roles import feature_folder
from paceline.roles.feature_folder import (
    EngineFolder,
    folder_of,
    take_folder,
)
from paceline.testing.tiny_run import TinyRun


class Run:
    """A run's configuration and ledger, in a folder that can be moved."""

    def __init__(self, folder: Path, memory: Path) -> None:
        self.memory = memory
        self.move(folder)

    def move(self, folder: Path) -> None:
        features = {"directory": str(self.memory)}
        tiny = TinyRun(folder, folder / "model", run={"name": "tiny"}, features=features)
        self.config: RunConfig = load_run_config(tiny.run_file)
        self.config.run.directory.mkdir(exist_ok=True)
        self.ledger = self.config.open_ledger()


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    (tmp_path / "memory").mkdir()
    return tmp_path / "memory"


@pytest.fixture
def run(tmp_path: Path, memory: Path) -> Run:
    return Run(tmp_path / "project", memory)


def test_a_run_keeps_to_its_usual_folder(run: Run, memory: Path) -> None:
    """It is signed with the run's name and directory."""
    folder = take_folder(run.config, run.ledger)
    assert folder == folder_of(run.config, run.ledger) == run.config.feature_folder
    assert folder.parent == memory
    assert owner_of(folder) == Owner("tiny", run.config.run.directory.absolute())


def test_where_a_stranger_took_the_name_the_run_takes_another(run: Run, tmp_path: Path) -> None:
    """Both roles take the same one, and keep to it when the stranger has gone."""
    run.config.feature_folder.symlink_to(tmp_path)
    consumers = folder_of(run.config, run.ledger)
    folder = take_folder(run.config, run.ledger)
    assert folder == consumers != run.config.feature_folder
    assert owner_of(folder) is not None
    run.config.feature_folder.unlink()
    assert take_folder(run.config, run.ledger) == folder
    shutil.rmtree(folder)
    folder.symlink_to(tmp_path)
    run.config.feature_folder.symlink_to(tmp_path)
    assert take_folder(run.config, run.ledger) not in (folder, run.config.feature_folder)


def test_a_run_that_moved_frees_its_old_folder(run: Run, tmp_path: Path) -> None:
    """Its name follows from the run's directory, so that it is another one now."""
    old = take_folder(run.config, run.ledger)
    run.ledger.close()
    (tmp_path / "project").rename(tmp_path / "moved")
    run.move(tmp_path / "moved")
    new = take_folder(run.config, run.ledger)
    assert new != old
    assert (new.exists(), old.exists()) == (True, False)


def test_the_copy_of_a_run_leaves_the_folder_of_the_original_alone(run: Run, tmp_path: Path) -> None:
    """It lives on where it was, side by side."""
    old = take_folder(run.config, run.ledger)
    shutil.copytree(tmp_path / "project", tmp_path / "copy")
    run.move(tmp_path / "copy")
    assert take_folder(run.config, run.ledger).exists()
    assert old.exists()


@pytest.mark.parametrize("in_use", [False, True])
def test_another_features_directory_frees_the_folder_in_the_old_one(
    run: Run, tmp_path: Path, in_use: bool
) -> None:
    """Unless a process uses it still."""
    old = take_folder(run.config, run.ledger)
    held = hold(old) if in_use else None
    run.memory = tmp_path / "other"
    run.memory.mkdir()
    run.move(tmp_path / "project")
    assert take_folder(run.config, run.ledger).parent == run.memory
    assert old.exists() == in_use
    if held is not None:
        held.close()


# -- paceline clean ------------------------------------------------------------------------


def cleaned(memory: Path, *, free: bool = False) -> str:
    text = io.StringIO()
    clean_folder(Console(file=text, width=400), memory, free=free)
    return text.getvalue()


def test_what_a_sleeping_run_needs_is_left(run: Run, memory: Path) -> None:
    """It can go on from it."""
    folder = take_folder(run.config, run.ledger)
    assert "left: run tiny" in cleaned(memory, free=True)
    assert folder.exists()


def gone(run: Run) -> None:
    shutil.rmtree(run.config.run.directory)


def complete(run: Run) -> None:
    run.ledger.set_facts(None, {"completed_step": 5})


def elsewhere(run: Run) -> None:
    run.ledger.set_facts(None, {"features_lie": {"folder": "/dev/shm/other"}})


@pytest.mark.parametrize("fate", [gone, complete, elsewhere])
def test_what_no_run_needs_is_listed_first_and_freed_when_asked(run: Run, memory: Path, fate: object) -> None:
    """With its size and the reason."""
    folder = take_folder(run.config, run.ledger)
    (folder / "slot-00000001").write_bytes(bytes(3 << 20))
    assert callable(fate)
    fate(run)
    listed = cleaned(memory)
    assert f"{folder}  3.0 MiB  abandoned: run tiny" in listed
    assert f"paceline clean {memory} --yes" in listed
    assert folder.exists()
    assert "freed: run tiny" in cleaned(memory, free=True)
    assert not folder.exists()
    assert "no feature folder that is abandoned" in cleaned(memory)


@pytest.fixture
def role_at_work(run: Run) -> Iterator[None]:
    lock = RoleLock(run.config.run.directory, "consumer")
    yield
    lock.release()


def test_what_a_live_role_uses_is_left(run: Run, memory: Path, role_at_work: None) -> None:
    """Even if its run counts as complete."""
    folder = take_folder(run.config, run.ledger)
    complete(run)
    assert "is at work" in cleaned(memory, free=True)
    assert folder.exists()


def test_what_an_open_store_uses_is_left_though_its_run_cannot_be_seen(run: Run, memory: Path) -> None:
    """A container shares the memory with its host, and not the disk."""
    folder = take_folder(run.config, run.ledger)
    held = hold(folder)
    gone(run)
    assert "uses it" in cleaned(memory, free=True)
    assert folder.exists()
    assert held is not None
    held.close()


def test_folders_of_strangers_and_of_nobody_are_left(memory: Path, tmp_path: Path) -> None:
    """A link, another program's folder, and a store that does not name its run."""
    sign(tmp_path / "real", Owner("gone", tmp_path / "nowhere"))
    (memory / "paceline-link").symlink_to(tmp_path / "real")
    (memory / "paceline-else").mkdir()
    (memory / "paceline-unsigned").mkdir()
    (memory / "paceline-unsigned" / "identity").write_bytes(b"")
    told = cleaned(memory, free=True)
    assert "it does not name its run" in told
    assert "link" not in told
    assert len(list(memory.iterdir())) == 3
    assert owner_of(tmp_path / "real") is not None


def test_a_place_that_cannot_be_listed_is_an_error_with_advice(tmp_path: Path) -> None:
    """Not an empty list."""
    with pytest.raises(ConfigError, match=r"features\.directory"):
        cleaned(tmp_path / "none")


def test_a_folder_that_another_producers_end_removes_is_made_again(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After this one has signed it, and before it holds it; or before the lock is on the new file."""
    other, place, real = EngineFolder(run.config), EngineFolder(run.config), feature_folder.hold
    folder = other.take()
    meanwhile = [lambda: None, lambda: (shutil.rmtree(folder), other.take()), other.close]

    def hold(folder: Path) -> FolderLock | None:
        before = real(folder) if len(meanwhile) == 2 else None
        if meanwhile:
            meanwhile.pop()()
        return before or real(folder)

    monkeypatch.setattr(feature_folder, "hold", hold)
    assert place.take() == folder
    other.close()
    assert owner_of(folder) is not None, "it is in use"
    place.close()
    assert not folder.exists()


def test_files_that_an_engine_has_left_go_with_their_folder(run: Run, memory: Path, tmp_path: Path) -> None:
    """At the producer's end; after a crash with `paceline clean`, but not while the engine works."""
    place = EngineFolder(run.config)
    folder = place.take()
    for name in ("cmpl-1.safetensors", "cmpl-1.safetensors.lock"):
        (folder / name).touch()
    place.close()
    assert not folder.exists()
    place.take()
    (folder / "cmpl-2.safetensors").touch()
    gone(run)
    assert "uses it" in cleaned(memory, free=True)
    del place
    assert "freed: run tiny" in cleaned(memory, free=True)
    assert not folder.exists()
