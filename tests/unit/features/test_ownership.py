"""Whose a feature folder is: nothing that a stranger planted is believed, and none of it hangs a reader."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from paceline.errors import StoreError
from paceline.features.ownership import Owner, hold, is_strangers, owner_of, remove, sign, take
from paceline.testing.feature_store_suite import assert_same, features
from paceline.testing.shared_memory import owner_of as opened_by_owner
from paceline.testing.shared_memory import put, reader_of, slot_files

RUN = Owner("night", Path("/runs/night"))


def test_a_signed_folder_says_which_run_it_serves(directory: Path) -> None:
    """Before and after a store lies in it; signing it again changes nothing."""
    assert owner_of(directory) is None
    sign(directory, RUN)
    assert owner_of(directory) == RUN
    ref = put(opened_by_owner(directory), 1)
    sign(directory, RUN)
    assert_same(reader_of(directory).get(ref), features(1))
    remove(directory)
    assert not directory.exists()


def test_two_roles_may_sign_a_folder_at_the_same_time(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Producers that start together do so for their engine's folder."""
    dump = json.dump

    def dump_after_another_has_signed(*content: Any) -> None:
        monkeypatch.setattr(json, "dump", dump)
        monkeypatch.setattr(os, "getpid", lambda: 1)
        sign(directory, RUN)
        dump(*content)

    monkeypatch.setattr(json, "dump", dump_after_another_has_signed)
    sign(directory, RUN)
    assert owner_of(directory) == RUN
    assert [path.name for path in directory.iterdir()] == ["owner.json"]


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"run": 1}', b"[" * 60_000])
def test_a_damaged_owner_file_names_no_run(directory: Path, content: bytes) -> None:
    """Nor does it stop the store."""
    sign(directory, RUN)
    (directory / "owner.json").write_bytes(content)
    assert owner_of(directory) is None
    put(opened_by_owner(directory), 1)


@pytest.mark.parametrize("name", ["owner.json", "slot-00000007"])
def test_a_fifo_in_the_folder_holds_no_reader_up(directory: Path, name: str) -> None:
    """It is opened without waiting for a writer, and then it is no file."""
    sign(directory, RUN)
    owner = opened_by_owner(directory)
    ref = put(owner, 1)
    (directory / name).unlink(missing_ok=True)
    os.mkfifo(directory / name)
    assert_same(reader_of(directory).get(ref), features(1))
    assert owner_of(directory) == (None if name == "owner.json" else RUN)
    assert take(directory) is None or name != "owner.json"


def test_a_slot_that_others_may_write_to_is_not_believed(directory: Path) -> None:
    """Its bytes could change between the digest and the training."""
    ref = put(opened_by_owner(directory), 1)
    slot_files(directory)[0].chmod(0o666)
    with pytest.raises(StoreError):
        reader_of(directory).get(ref)
    opened_by_owner(directory)
    assert slot_files(directory) == []


def test_a_reader_refuses_a_folder_that_others_may_write_to(directory: Path) -> None:
    """Its owner makes it private again."""
    ref = put(opened_by_owner(directory), 1)
    directory.chmod(0o777)
    with pytest.raises(StoreError, match="mode 777"):
        reader_of(directory)
    opened_by_owner(directory)
    assert_same(reader_of(directory).get(ref), features(1))


def test_a_link_or_a_file_in_the_folders_place_is_a_strangers(directory: Path, tmp_path: Path) -> None:
    """Whatever it leads to."""
    assert not is_strangers(directory)
    directory.symlink_to(tmp_path)
    assert is_strangers(directory)
    with pytest.raises(StoreError, match="link"):
        sign(directory, RUN)
    directory.unlink()
    directory.write_bytes(b"")
    assert is_strangers(directory)
    directory.unlink()


def test_a_folder_in_use_cannot_be_taken(directory: Path) -> None:
    """An open store holds it, on either side, until it is closed."""
    sign(directory, RUN)
    stores = [opened_by_owner(directory), reader_of(directory)]
    for store in stores:
        assert take(directory) is None
        store.close()
    lock = take(directory)
    assert lock is not None
    lock.close()
    held = hold(directory)
    assert held is not None
    assert take(directory) is None
    held.close()
