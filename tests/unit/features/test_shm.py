"""The shared memory store: two processes, crashes, recycling and the budget."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from paceline.errors import FeatureMissingError, StoreFullError
from paceline.features import codec
from paceline.features.stores.slots import HEADER_BYTES, Part, Slot, State, slot_bytes
from paceline.testing.feature_store_suite import MIB, assert_same, bulk, feature_ref, features
from paceline.testing.shared_memory import owner_of, put, reader_of, slot_files
from paceline.types import SampleRef, ref_from_json, ref_to_json

PEER = Path(__file__).with_name("shm_peer.py")


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


class Peer:
    """Another process with the same store open."""

    def __init__(self, directory: Path, role: str, kill_at: str = "") -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(PEER), str(directory), role, kill_at],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def ask(self, line: str) -> Any:
        """The peer's answer; None if it died instead."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        return json.loads(answer) if answer else None

    def put(self, number: int) -> SampleRef:
        return ref_from_json(json.dumps(self.ask(f"put s{number} {number}")))

    def close(self) -> int:
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        return self.process.wait()


@pytest.fixture
def peers() -> Iterator[list[Peer]]:
    started: list[Peer] = []
    yield started
    for peer in started:
        peer.process.kill()
        peer.close()


# -- two processes -------------------------------------------------------------------------


def test_a_reader_reads_and_frees_what_another_process_wrote(directory: Path, peers: list[Peer]) -> None:
    """Slots made after the reader opened the store are found; both sides see the same usage."""
    reader = reader_of(directory)
    assert reader.usage().resident_samples == 0
    writer = Peer(directory, "owner")
    peers.append(writer)
    refs = [writer.put(number) for number in range(5)]
    for number, ref in enumerate(refs):
        assert_same(reader.get(ref), features(number))
    late = writer.put(5)
    reader.free([("s0", 0)])
    reader.free([(late.sample_id, 0)])  # Freed by id alone: it was never read here.
    reader.free([("s0", 0)])
    usage = reader.usage()
    assert usage.resident_samples == 4
    assert writer.ask("usage") == {
        "resident_bytes": usage.resident_bytes,
        "resident_samples": 4,
        "budget_bytes": 8 * MIB,
        "is_current": True,
    }
    files = slot_files(directory)
    again = writer.put(6)
    assert slot_files(directory) == files
    assert_same(reader.get(again), features(6))
    for stale in (refs[0], late):
        with pytest.raises(FeatureMissingError):
            reader.get(stale)
    assert writer.close() == 0
    assert_same(reader.get(refs[1]), features(1))


def test_a_writer_and_a_reader_restart_independently(directory: Path, peers: list[Peer]) -> None:
    """What was sealed outlives its writer, and a new owner goes on in the same store."""
    writer = Peer(directory, "owner")
    peers.append(writer)
    ref = writer.put(0)
    assert writer.close() == 0
    owner = owner_of(directory)
    reader = Peer(directory, "reader")
    peers.append(reader)
    assert reader.ask("get " + ref_to_json(ref)) is True
    assert reader.ask("get " + ref_to_json(put(owner, 1))) is True
    assert put(owner, 0) == ref
    assert reader.ask("free s0") is True
    assert reader.ask("get " + ref_to_json(ref)) == {"error": "FeatureMissingError"}
    assert owner.usage().resident_samples == 1
    assert reader.ask("written") == {"error": "StoreError"}


@pytest.mark.parametrize("point", ["put.before_seal", "put.after"])
def test_a_killed_writer_leaves_whole_samples_and_reclaimable_slots(
    directory: Path, peers: list[Peer], point: str
) -> None:
    """SIGKILL in the second put: what was sealed is kept, what was not is room for the next sample."""
    writer = Peer(directory, "owner", f"features.{point}:2")
    peers.append(writer)
    ref = writer.put(0)
    assert writer.ask("put s1 1") is None
    assert writer.close() == -signal.SIGKILL
    assert reader_of(directory).usage().resident_samples == 2
    files = slot_files(directory)
    states = [Slot.open(path).state for path in files]
    assert states == [State.SEALED, State.WRITING if point == "put.before_seal" else State.SEALED]

    owner = owner_of(directory)
    kept = ["s0"] if point == "put.before_seal" else ["s0", "s1"]
    assert owner.usage().resident_samples == len(kept)
    assert_same(owner.get(ref), features(0))
    assert_same(owner.get(put(owner, 1)), features(1))
    assert slot_files(directory) == files
    owner.free([one for one in owner.written() if one[0] != "s0"])
    assert owner.usage().resident_samples == 1


def test_a_reader_beside_a_recycling_writer_never_reads_other_bytes(
    directory: Path, peers: list[Peer]
) -> None:
    """While every sample takes the slot of the last one, a read is right or missing, never wrong."""
    owner = owner_of(directory)
    reader = Peer(directory, "reader")
    peers.append(reader)
    assert reader.process.stdin is not None
    assert reader.process.stdout is not None
    for number in range(300):
        ref = put(owner, number)
        reader.process.stdin.write("get " + ref_to_json(ref) + "\n")
        reader.process.stdin.flush()
        if number % 3 == 0:
            # Every third is waited for; the others are freed while they are read.
            for _ in range(min(number, 2)):
                reader.process.stdout.readline()
            assert reader.process.stdout.readline() == "true\n"
        else:
            owner.free([(ref.sample_id, 0)])
    answers = [reader.process.stdout.readline() for _ in range(2)]
    assert set(answers) <= {"true\n", '{"error": "FeatureMissingError"}\n'}
    assert len(slot_files(directory)) <= 102  # A hundred samples were kept.


def test_a_slot_recycled_in_the_middle_of_a_read_is_missing(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The header is looked at again after the copy, before the digest is blamed."""
    owner = owner_of(directory)
    ref = put(owner, 1)
    read = codec.read

    def read_late(*arguments: Any) -> Any:
        owner.free([("s1", 0)])
        put(owner, 2)
        return read(*arguments)

    monkeypatch.setattr(codec, "read", read_late)
    with pytest.raises(FeatureMissingError):
        owner.get(ref)


def test_a_late_free_does_not_free_the_slots_next_sample(directory: Path) -> None:
    """A free names the generation it frees, so a reader that is behind harms nobody."""
    owner = owner_of(directory)
    put(owner, 1)
    (path,) = slot_files(directory)
    late = Slot.open(path)
    generation = late.generation
    owner.free([("s1", 0)])
    ref = put(owner, 2)
    late.free(generation, Part.READER)
    assert_same(owner.get(ref), features(2))
    assert owner.usage().resident_samples == 1


# -- recycling and the budget --------------------------------------------------------------


def test_slots_are_recycled(directory: Path) -> None:
    """A thousand samples come and go in one file, without a file descriptor or a memo left over."""
    owner, reader = owner_of(directory), reader_of(directory)
    put(owner, 0)
    reader.free([("s0", 0)])
    descriptors = open_files()
    for number in range(1, 1001):
        ref = put(owner, number)
        if number % 100 == 0:
            reader.get(ref)
        (owner if number % 2 else reader).free([(ref.sample_id, 0)])
    assert len(slot_files(directory)) == 1
    assert open_files() <= descriptors
    assert owner.usage().resident_bytes == reader.usage().resident_bytes == 0
    assert owner._arena is not None
    assert len(owner._arena._slot_of) == 1


def test_mapped_slots_hold_no_file_descriptors(directory: Path) -> None:
    """The number of open files does not grow with the number of samples."""
    owner = owner_of(directory)
    put(owner, 0)
    gc.collect()  # of earlier tests, which would close files in between
    before = open_files()
    for number in range(1, 50):
        put(owner, number)
    assert open_files() == before


def test_free_slots_of_other_sizes_make_room(directory: Path) -> None:
    """The budget counts free slots too; they are unlinked when a new size needs the bytes."""
    owner, reader = owner_of(directory, budget_bytes=MIB), reader_of(directory)
    for number in range(5):
        reader.get(feature_ref(f"s{number}", owner.put(f"s{number}", bulk(number))))
        reader.free([(f"s{number}", 0)])
        assert len(slot_files(directory)) == 1
    owner.put("s5", bulk(5))
    owner.put("s6", bulk(6))
    owner.free([("s5", 0)])
    large = bulk(7, num_bytes=MIB // 2 + MIB // 8)
    ref = feature_ref("large", owner.put("large", large))
    assert_same(reader.get(ref), large)
    assert sum(path.stat().st_size for path in slot_files(directory)) <= MIB
    kept = [path.name for path in slot_files(directory)]
    assert len(kept) == 2
    assert reader._arena is not None
    assert sorted(reader._arena.slots) == kept  # Unlinked slots are unmapped, or their pages stay.
    with pytest.raises(StoreFullError):
        owner.put("s8", bulk(8, num_bytes=MIB // 2))
    assert [path.name for path in slot_files(directory)] == kept


def test_slot_classes_waste_little() -> None:
    """Whole pages, room for header and payload, and less than a quarter of slack beyond small ones."""
    for payload in (0, 1, 4096, 4097, 100_000, MIB, 84_000_000, 10**9):
        size = slot_bytes(payload)
        assert size % 4096 == 0
        assert size >= HEADER_BYTES + payload
        if payload >= 100_000:
            assert size <= 1.26 * (HEADER_BYTES + payload)
        assert slot_bytes(size - HEADER_BYTES) == size


def test_a_failed_put_holds_nothing(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the copy itself fails, the slot is free again."""

    def fail(*_: Any) -> str:
        raise RuntimeError("the device is gone")

    owner = owner_of(directory)
    with monkeypatch.context() as patch:
        patch.setattr(codec, "write", fail)
        with pytest.raises(RuntimeError, match="device"):
            put(owner, 1)
    assert owner.usage().resident_bytes == 0
    assert_same(owner.get(put(owner, 1)), features(1))


def test_a_full_filesystem_is_an_error_with_advice(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC comes before the memory is mapped, leaves no file, and says what to do."""

    def no_space(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    owner = owner_of(directory)
    ref = put(owner, 0)
    files = sorted(directory.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", no_space)
        with pytest.raises(StoreFullError, match=r"Next: lower features\.budget_mib.*--shm-size"):
            put(owner, 1)
    assert sorted(directory.iterdir()) == files
    assert owner.usage().resident_samples == 1
    assert_same(owner.get(ref), features(0))
    assert_same(owner.get(put(owner, 1)), features(1))


FILL = """
import sys
from pathlib import Path
from paceline.errors import StoreFullError
from paceline.features.stores.shm import SharedMemoryFeatureStore
from paceline.testing.feature_store_suite import assert_same, bulk, feature_ref
store = SharedMemoryFeatureStore(Path(sys.argv[1]) / "store", budget_bytes=1 << 30, owner=True)
refs = []
try:
    while True:
        refs.append(feature_ref(str(len(refs)), store.put(str(len(refs)), bulk(len(refs)))))
except StoreFullError:
    for number, ref in enumerate(refs):
        assert_same(store.get(ref), bulk(number))
    sys.exit(20 + len(refs))
"""


def test_a_truly_full_filesystem_never_kills_the_process(tmp_path: Path) -> None:
    """On a tmpfs of 1 MiB (its own mount namespace) the seventh sample of 160 KiB is refused, no SIGBUS."""
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("no unshare(1) here")
    script = 'mount -t tmpfs -o size=1m none "$1" 2>/dev/null || exit 99; exec "$2" -c "$3" "$1"'
    done = subprocess.run(
        [unshare, "--mount", "sh", "-c", script, "sh", str(tmp_path), sys.executable, FILL],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 99 or "unshare failed" in done.stderr:
        pytest.skip("mounting is not permitted here")
    room = MIB - 4096  # The identity file takes a page.
    assert done.returncode == 20 + room // slot_bytes(MIB // 8), done.stderr
