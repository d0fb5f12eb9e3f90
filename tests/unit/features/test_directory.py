"""The feature store in a shared folder: several hosts at once, and what a network filesystem does to them."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from paceline.errors import (
    FeatureCorruptError,
    FeatureMissingError,
    FeatureStoreElsewhereError,
    StoreError,
    StoreFullError,
)
from paceline.features import ownership, sample_files
from paceline.features.stores import directory, sample_format
from paceline.features.stores.directory import DirectoryFeatureStore
from paceline.testing.feature_store_suite import MIB, assert_same, feature_ref, features
from paceline.types import SampleRef


class Pauses:
    """In place of `time.sleep`: what is done in the n-th pause."""

    def __init__(self, *acts: Callable[[], object]) -> None:
        self.acts, self.seconds = list(acts), list[float]()

    def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)
        if self.acts:
            self.acts.pop(0)()


def writer_of(folder: Path, sleep: Callable[[float], None] = lambda _: None) -> DirectoryFeatureStore:
    return DirectoryFeatureStore(folder, budget_bytes=8 * MIB, owner=True, patience_s=5.0, sleep=sleep)


def reader_of(folder: Path, sleep: Callable[[float], None] = lambda _: None) -> DirectoryFeatureStore:
    return DirectoryFeatureStore(folder, budget_bytes=8 * MIB, owner=False, sleep=sleep)


def put(store: DirectoryFeatureStore, number: int, generation: int) -> SampleRef:
    return feature_ref(f"s{number}", store.put(f"s{number}", features(number), generation=generation))


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def failing(code: int, times: int = 10**9) -> Callable[..., Any]:
    """A call that fails so often, and then does what `os.pwrite` does."""
    real, left = os.pwrite, [times]

    def call(*given: Any) -> int:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(code, os.strerror(code))
        return real(*given)

    return call


def test_a_reader_finds_the_samples_of_every_writer_wherever_the_folder_is_mounted(tmp_path: Path) -> None:
    """A reader that was there first, too. Writers know nothing of each other."""
    early = reader_of(tmp_path / "store")
    first, second = writer_of(tmp_path / "store"), writer_of(tmp_path / "store")
    refs = [put(first, 1, 3), put(second, 2, 4)]
    for store in (early, first, second):
        for number, ref in enumerate(refs, 1):
            assert_same(store.get(ref), features(number))
    assert first.written() == second.written() == [("s1", 3), ("s2", 4)]
    (tmp_path / "store").rename(tmp_path / "another place")
    assert_same(reader_of(tmp_path / "another place").get(refs[1]), features(2))


def test_any_program_that_knows_safetensors_reads_a_sample(tmp_path: Path) -> None:
    """Whatever the order and the sizes of its tensors."""
    tensors = {
        **features(1),
        "a_scalar": torch.tensor(2.5),
        "none": torch.empty(0, 3),
        "odd": torch.ones(3).bool(),
    }
    writer_of(tmp_path).put("s", tensors, generation=7)
    [name] = [name for name in files_in(tmp_path) if name.endswith(".safetensors")]
    assert name.startswith("00000000/7-")
    assert_same(load_file(tmp_path / name), tensors)


def test_no_folder_holds_more_than_a_thousand_samples_and_empty_ones_go(tmp_path: Path) -> None:
    """Also where another host writes into one that is just being removed."""
    first, second = writer_of(tmp_path), writer_of(tmp_path)
    refs = {n: put(first, n, n) for n in (1, 999, 1000, 2500)}
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["00000000", "00000001", "00000002"]
    first.free([("s1", 1), ("s999", 999), ("s2500", 2500)])
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["00000001", "00000002"]
    assert_same(second.get(put(second, 3, 3)), features(3))
    assert_same(second.get(refs[1000]), features(1000))


def test_who_does_not_find_a_file_looks_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client of a network filesystem may see it late, or by a handle that its server no longer knows."""
    ref = put(writer_of(tmp_path), 1, 5)
    real, errors = sample_files.open_regular, [errno.ENOENT, errno.ESTALE, errno.ESTALE, errno.ENOENT]

    def open_late(*given: Any) -> Any:
        if errors:
            code = errors.pop(0)
            raise OSError(code, os.strerror(code))
        return real(*given)

    monkeypatch.setattr(sample_files, "open_regular", open_late)
    pauses = Pauses()
    assert_same(reader_of(tmp_path, pauses).get(ref), features(1))
    assert pauses.seconds == [0.0, 0.1]
    assert len(files_in(tmp_path)) == 2, "nothing that a look has made is left"
    writer_of(tmp_path).free([("s1", 5)])
    with pytest.raises(FeatureMissingError):
        reader_of(tmp_path).get(ref)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Nothing half-written takes room meanwhile."""
    monkeypatch.setattr(os, "pwrite", failing(code, times=2))
    left: list[list[str]] = []
    pauses = Pauses(lambda: left.append(files_in(tmp_path)))
    store = writer_of(tmp_path, pauses)
    assert_same(store.get(put(store, 1, 5)), features(1))
    assert pauses.seconds == [1.0, 1.0]
    assert left == [["store-id"]]


def test_patience_with_a_full_disk_ends_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No sample is to blame. An error that is told when the file is closed counts as much."""
    store = writer_of(tmp_path)
    before = put(store, 1, 4)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing(errno.ENOSPC))
        with pytest.raises(StoreFullError, match=r"for 5 s.*make room") as caught:
            put(store, 2, 5)
        assert "no sample is to blame" in caught.value.why
    with monkeypatch.context() as patch:
        store = writer_of(tmp_path)
        patch.setattr(sample_files, "is_on_network", lambda _: True)
        patch.setattr(os, "fsync", failing(errno.EDQUOT))
        with pytest.raises(StoreFullError):
            put(store, 2, 5)
    assert store.written() == [("s1", 4)]
    assert_same(store.get(before), features(1))
    assert len(files_in(tmp_path)) == 2


def test_another_error_of_the_disk_blames_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a miss nor damage, which would be counted against the sample."""
    store = writer_of(tmp_path)
    ref = put(store, 1, 4)
    monkeypatch.setattr(os, "pwrite", failing(errno.EIO))
    monkeypatch.setattr(os, "preadv", failing(errno.EIO))
    for act in (lambda: put(store, 2, 5), lambda: store.get(ref)):
        with pytest.raises(StoreError, match="place is at fault") as caught:
            act()
        assert not isinstance(caught.value, StoreFullError | FeatureMissingError | FeatureCorruptError)


def test_bytes_that_are_freed_while_they_are_written_never_appear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The right to write them was revoked; the ledger refuses the commit."""
    slow, successor = writer_of(tmp_path), writer_of(tmp_path)
    real = sample_format.write

    def write(*given: Any) -> str:
        digest = real(*given)
        assert successor.written() == [("", 5)]
        successor.free([("s1", 5)])
        return digest

    monkeypatch.setattr(sample_format, "write", write)
    ref = put(slow, 1, 5)
    assert successor.written() == []
    with pytest.raises(FeatureMissingError):
        slow.get(ref)


def test_what_a_kill_left_half_written_is_listed_without_an_id_and_can_be_freed(
    tmp_path: Path,
) -> None:
    """Only the header tells the id, and it is written last."""
    store = writer_of(tmp_path)
    kept = put(store, 1, 4)
    fd = store._files._create(store._files._paths("s2", 6)[1])
    os.close(fd)
    assert store.written() == [("s1", 4), ("", 6)]
    store.free([("", 4)])
    store.free([("", 6)])
    assert store.written() == [("s1", 4)]
    assert_same(store.get(kept), features(1))


def test_a_file_cut_off_anywhere_is_a_miss_and_not_listed(tmp_path: Path) -> None:
    """So its sample is captured again; the same file of a disk that lost the last writes."""
    store = writer_of(tmp_path)
    ref = put(store, 1, 5)
    [path] = tmp_path.rglob("*.safetensors")
    whole = path.read_bytes()
    for kept in (whole[:-1], whole[:200], whole[:7], b"", bytes(len(whole)), whole + b"\0"):
        path.write_bytes(kept)
        assert store.written() == []
        if len(kept) <= len(whole):
            with pytest.raises(FeatureCorruptError):
                store.get(ref)
    path.write_bytes(whole)
    assert_same(store.get(ref), features(1))


def test_foreign_files_and_links_neither_fool_nor_hang_nor_go(tmp_path: Path) -> None:
    """Nor do those stop the end that a network filesystem keeps for who has them open."""
    folder = tmp_path / "store"
    store, other = writer_of(folder), writer_of(tmp_path / "other")
    ref, block = put(store, 1, 5), folder / "00000000"
    put(other, 2, 6)
    [theirs], [ours] = (tmp_path / "other").rglob("*.safetensors"), folder.rglob("*.safetensors")
    for name, make in {
        "6-" + theirs.name[2:]: lambda path: path.symlink_to(theirs),
        "7-" + "0" * 24 + ".safetensors": os.mkfifo,
        "8-" + "0" * 24 + ".part": lambda path: path.mkdir(),
        ".nfs0000000000000001": lambda path: path.write_bytes(b"held"),
        "notes.txt": lambda path: path.write_bytes(b"mine"),
    }.items():
        make(block / name)
    assert [one for one in store.written() if one[0]] == [("s1", 5)]
    ours.unlink()
    os.mkfifo(ours)
    with pytest.raises(FeatureCorruptError, match="FIFO"):
        store.get(ref)
    (block / ("8-" + "0" * 24 + ".part")).rmdir()
    store.destroy()
    assert {path.name for path in block.iterdir()} == {".nfs0000000000000001", "notes.txt"}


def test_the_folder_of_another_user_or_open_to_others_is_refused(tmp_path: Path) -> None:
    """As in shared memory."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(StoreError, match="is a link"):
        writer_of(tmp_path / "link")
    (tmp_path / "real").chmod(0o777)
    with pytest.raises(StoreError, match="Other users may write"):
        reader_of(tmp_path / "real")


@pytest.mark.parametrize("has_links", [True, False])
def test_starts_at_one_moment_agree_on_the_stores_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    """The ledger records what one of them found; the other one must not replace it."""
    real, found = ownership.write_file, list[str]()

    def write(path: Path, data: bytes) -> None:
        real(path, data)
        if len(found) == 0:
            found.append("")
            found[0] = ownership.make_store_id(tmp_path)

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "no links here")

    if not has_links:
        monkeypatch.setattr(Path, "hardlink_to", refuse)
    monkeypatch.setattr(ownership, "write_file", write)
    assert ownership.make_store_id(tmp_path) == found[0] == ownership.store_id(tmp_path)
    assert files_in(tmp_path) == ["store-id"]
    (tmp_path / "store-id").write_bytes(b"")  # what a power failure may leave
    assert len(ownership.make_store_id(tmp_path)) == 32


def test_a_store_that_was_removed_under_its_writer_is_told(tmp_path: Path) -> None:
    """Nobody would read what it went on to write."""
    store = writer_of(tmp_path / "store")
    writer_of(tmp_path / "store").destroy()
    with pytest.raises(StoreError, match="was removed"):
        put(store, 1, 5)
    with pytest.raises(StoreError, match="as a reader"):
        put(reader_of(tmp_path / "store"), 1, 5)


def test_a_mount_that_went_away_makes_no_sample_a_miss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A miss is captured again, and quarantined if it stays one; and what a start does not list is lost."""
    folder, away = tmp_path / "mnt" / "store", tmp_path / "away"
    folder.parent.mkdir()
    writer = writer_of(folder)
    ref, reader = put(writer, 1, 5), reader_of(folder)
    folder.rename(away)
    with pytest.raises(StoreError, match="not mounted any more") as caught:
        reader.get(ref)
    assert not isinstance(caught.value, FeatureMissingError)
    with pytest.raises(StoreError, match="was removed"):
        writer.written()
    writer_of(folder)
    with pytest.raises(FeatureStoreElsewhereError):
        reader.get(ref)
    with pytest.raises(StoreError, match="was removed"):
        writer.written()
    shutil.rmtree(folder)
    away.rename(folder)
    assert_same(reader.get(ref), features(1))
    assert writer.written() == [("s1", 5)]
    writer.free([("s1", 5)])
    with pytest.raises(FeatureMissingError):
        reader.get(ref)


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
def test_a_file_that_cannot_be_looked_into_is_not_taken_for_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """At a start all that is not listed is captured again."""
    put(writer_of(tmp_path), 1, 5)
    real = directory.open_regular

    def fail(path: Path, flags: int = 0) -> Any:
        if path.suffix == ".safetensors":
            raise OSError(code, os.strerror(code))
        return real(path, flags)

    monkeypatch.setattr(directory, "open_regular", fail)
    with pytest.raises(StoreError, match="place is at fault"):
        writer_of(tmp_path).written()


def test_a_file_on_a_network_filesystem_is_on_its_server_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sample is committed afterwards. On a disk of this host nothing waits for that."""
    synced: list[list[str]] = []
    monkeypatch.setattr(
        os, "fsync", lambda _: synced.append([n for n in files_in(tmp_path) if "-" in n[:12]])
    )
    store = writer_of(tmp_path)
    synced.clear()
    put(store, 1, 5)
    assert synced == []
    monkeypatch.setattr(sample_files, "is_on_network", lambda _: True)
    put(writer_of(tmp_path), 2, 6)
    [names] = synced
    assert sum(name.endswith(".part") for name in names) == 1
