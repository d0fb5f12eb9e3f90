"""The shared memory store: damage is found, and the directory is this store's or refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import pytest
import torch

from paceline.errors import FeatureCorruptError, FeatureMissingError, StoreError
from paceline.features import codec
from paceline.features.ownership import WRITER_LOCK
from paceline.features.stores import identity
from paceline.features.stores.slots import Slot
from paceline.testing.feature_store_suite import MIB, assert_same, bulk, feature_ref, features
from paceline.testing.shared_memory import owner_of, put, reader_of, slot_files

TEXT_AT = 128  # Where a slot's description begins.


# -- damage --------------------------------------------------------------------------------


def test_a_flipped_bit_anywhere_is_found_or_harmless(directory: Path) -> None:
    """Each bit of the header, and bits all over the payload: right tensors or an error, never wrong ones."""
    owner = owner_of(directory)
    ref = put(owner, 3)
    (path,) = slot_files(directory)
    slot = Slot.open(path)

    def outcome() -> str:
        try:
            tensors = owner.get(ref)
        except (FeatureMissingError, FeatureCorruptError) as error:
            return type(error).__name__
        assert_same(tensors, features(3))
        return "harmless"

    outcomes: dict[int, set[str]] = {}
    for bit in range(8 * (TEXT_AT + len(slot.description))):
        slot._header[bit // 8] ^= 1 << (bit % 8)
        outcomes.setdefault(bit // 64, set()).add(outcome())
        slot._header[bit // 8] ^= 1 << (bit % 8)
    harmless, missing, corrupt = {"harmless"}, {"FeatureMissingError"}, {"FeatureCorruptError"}
    for word in (0, 1, 2):  # Magic, version and file size, which are looked at when the slot is opened.
        assert outcomes.pop(word) == harmless
    assert outcomes.pop(3) == corrupt  # State.
    for word in (4, 11):  # The generation, here 1, and its inverse: where they disagree the slot is free.
        assert outcomes.pop(word) == missing
    for word in (5, 6, 12):  # The generation freed, here 0: one bit frees the sample.
        assert outcomes.pop(word) == harmless | missing
    for word in range(13, TEXT_AT // 8):  # Unused.
        assert outcomes.pop(word) == harmless
    assert all(seen == corrupt for seen in outcomes.values())  # Sizes, digest, description.

    layout = codec.layout_of_specs(ref.sample_id, ref.feature_specs)
    for place in layout.places:
        for byte in range(place.offset, place.offset + place.num_bytes, 11):
            slot.payload[byte] ^= 1 << (byte % 8)
            assert outcome() == "FeatureCorruptError"
            slot.payload[byte] ^= 1 << (byte % 8)
    assert outcome() == "harmless"


def test_a_damaged_header_neither_stops_the_next_owner_nor_keeps_its_bytes(directory: Path) -> None:
    """Whichever header bit flips: the next owner opens, frees the rest, and puts again."""
    owner = owner_of(directory)
    for bit in range(0, 8 * 160, 7):
        put(owner, 1)
        path = slot_files(directory)[0]
        Slot.open(path)._header[bit // 8] ^= 1 << (bit % 8)
        owner = owner_of(directory)
        owner.free(owner.written())
        assert owner.usage().resident_bytes == 0
        assert_same(owner.get(put(owner, 1)), features(1))
        owner.free(owner.written())
        assert len(slot_files(directory)) == 1


@pytest.mark.parametrize("word", [4, 11])
@pytest.mark.parametrize("bit", [0, 45, 63])
def test_a_sample_with_a_damaged_generation_can_be_captured_again(
    directory: Path, word: int, bit: int
) -> None:
    """A high bit makes it look newer than any; a new owner neither keeps those bytes nor obeys them."""
    owner_of(directory).put("s1", features(1), generation=5)
    Slot.open(slot_files(directory)[0])._words[word] ^= 1 << bit
    owner = owner_of(directory)
    assert owner.written() == []
    assert owner.usage().resident_bytes == 0
    ref = feature_ref("s1", owner.put("s1", features(1), generation=101))
    assert_same(reader_of(directory).get(ref), features(1))
    assert len(slot_files(directory)) == 1


@pytest.mark.parametrize("word", [3, 10])
def test_a_sample_with_a_damaged_header_is_written_anew(directory: Path, word: int) -> None:
    """`put` does not call a sample sealed whose state or description is damaged."""
    owner = owner_of(directory)
    put(owner, 1)
    Slot.open(slot_files(directory)[0])._words[word] ^= 1 << 5
    assert_same(owner.get(put(owner, 1)), features(1))
    assert owner.usage().resident_samples == 1


# -- the directory -------------------------------------------------------------------------


def test_half_made_files_are_removed(directory: Path) -> None:
    """What a crash in the middle of making a file left is recognised and reclaimed."""
    owner = owner_of(directory)
    ref = put(owner, 1)
    owner.close()
    (directory / "slot-00000007.new").write_bytes(b"")
    (directory / "identity.new").write_bytes(b"half")
    (directory / "slot-00000008").write_bytes(b"")
    (directory / "slot-00000009").write_bytes(bytes(8192))
    assert reader_of(directory).usage().resident_samples == 1
    owner = owner_of(directory)
    assert sorted(path.name for path in directory.iterdir()) == [
        "identity",
        "slot-00000001",
        "writer.lock",
    ]
    assert_same(owner.get(ref), features(1))


def test_a_second_process_does_not_become_the_same_writer_while_the_first_lives(directory: Path) -> None:
    """It would free what the first one is writing."""
    directory.mkdir(mode=0o700)
    other = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(); input()"
    first = subprocess.Popen(
        [sys.executable, "-c", other, str(directory / WRITER_LOCK)], stdin=PIPE, stdout=PIPE, text=True
    )
    assert first.stdout is not None
    first.stdout.readline()
    (directory / "slot-00000001.new").write_bytes(b"half-written")
    with pytest.raises(StoreError, match="Another process is writer 0 of the feature store"):
        owner_of(directory)
    assert (directory / "slot-00000001.new").exists()
    first.kill()
    first.communicate()
    put(owner_of(directory), 1)


def test_a_directory_without_identity_yet_is_completed(directory: Path) -> None:
    """A crash before the identity was renamed into place leaves nothing to keep."""
    directory.mkdir()
    (directory / "identity.new").write_bytes(bytes(100))
    reader = reader_of(directory)
    owner = owner_of(directory)
    assert directory.stat().st_mode & 0o777 == 0o700
    assert_same(reader.get(put(owner, 1)), features(1))


def test_slot_names_are_not_used_twice(directory: Path) -> None:
    """A ref to an unlinked slot stays missing although its class is made again."""
    owner = owner_of(directory, budget_bytes=MIB)
    for number in range(6):
        owner.put(f"s{number}", bulk(number, num_bytes=(1 + number % 2) * MIB // 4))
        owner.free([(f"s{number}", 0)])
    owner.close()
    first = slot_files(directory)
    owner = owner_of(directory, budget_bytes=MIB)
    owner.free(owner.written())
    owner.put("large", bulk(9, num_bytes=3 * MIB // 5))
    assert slot_files(directory)[-1].name > first[-1].name


def test_the_store_of_another_boot_is_replaced(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a reboot nothing in it can be trusted: every old ref is missing."""
    owner = owner_of(directory)
    ref = put(owner, 1)
    owner.close()
    monkeypatch.setattr(identity, "_boot_id", lambda: b"0" * 36)
    reader = reader_of(directory)
    assert reader.usage().resident_samples == 0
    owner = owner_of(directory)
    assert owner.usage().resident_samples == 0
    for store in (owner, reader):
        with pytest.raises(FeatureMissingError):
            store.get(ref)
    assert_same(reader.get(put(owner, 1)), features(1))


@pytest.mark.parametrize("foreign", ["notes.txt", "identity", "slot-00000001"])
def test_a_directory_of_something_else_is_refused_and_kept(directory: Path, foreign: str) -> None:
    """Neither side reads or removes what it did not make."""
    directory.mkdir()
    (directory / foreign).write_bytes(b"x" * 4096)
    for make in (owner_of, reader_of):
        with pytest.raises(StoreError, match="Next:"):
            make(directory)
    assert (directory / foreign).read_bytes() == b"x" * 4096


def test_a_link_or_another_users_directory_is_refused(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shared memory lies in a directory that anyone may write to, so ownership is checked."""
    directory.symlink_to(tmp_path)
    for make in (owner_of, reader_of):
        with pytest.raises(StoreError, match="link"):
            make(directory)
    assert list(tmp_path.iterdir()) == []
    directory.unlink()
    owner_of(directory).close()
    user = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: user)
    with pytest.raises(StoreError, match=f"user {user}"):
        owner_of(directory)


def test_a_reader_follows_a_store_that_was_made_again(directory: Path) -> None:
    """If the directory is removed and the producer starts anew, the consumer finds the new store."""
    owner, reader = owner_of(directory), reader_of(directory)
    old = put(owner, 1)
    reader.get(old)
    shutil.rmtree(directory)
    assert reader.usage().resident_samples == 0
    new = put(owner_of(directory), 1)
    assert new.feature_store_uri != old.feature_store_uri
    assert_same(reader.get(new), features(1))
    reader.free([("s1", 0)])
    assert reader.usage().resident_bytes == 0
    with pytest.raises(FeatureMissingError):
        reader.get(old)


def test_files_deleted_in_use_are_noticed(directory: Path) -> None:
    """A deleted slot is not reused, since nobody else could read it; a deleted directory is an error."""
    owner, reader = owner_of(directory), reader_of(directory)
    put(owner, 1)
    slot_files(directory)[0].unlink()
    owner.free([("s1", 0)])
    assert_same(reader.get(put(owner, 1)), features(1))
    shutil.rmtree(directory)
    owner.free([("s1", 0)])
    with pytest.raises(StoreError, match="removed"):
        put(owner, 1)


def test_either_side_may_destroy(directory: Path) -> None:
    """The memory is given back by the one that ends the run; the other is not harmed."""
    owner, reader = owner_of(directory), reader_of(directory)
    put(owner, 1)
    reader.destroy()
    assert not directory.exists()
    owner.free([("s1", 0)])
    owner.destroy()
    with pytest.raises(StoreError, match="closed"):
        owner.usage()


def test_only_the_owner_writes(directory: Path) -> None:
    """A reader's put or list is refused, whether or not there is a store."""
    reader = reader_of(directory)
    for _ in range(2):
        with pytest.raises(StoreError, match="owner=True"):
            reader.put("a", {"x": torch.zeros(1)})
        with pytest.raises(StoreError, match="owner=True"):
            reader.written()
        owner_of(directory)


def test_long_ids_are_refused(directory: Path) -> None:
    """What does not fit into the header is an error, and no slot is taken for it."""
    owner = owner_of(directory)
    with pytest.raises(StoreError, match="header"):
        owner.put("x" * 5000, features())
    assert slot_files(directory) == []
