"""Several writers of one store in shared memory: none spoils, frees or hides what another one writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from paceline.errors import FeatureMissingError, StoreFullError
from paceline.features import codec
from paceline.features.stores.arena import UNSEALED
from paceline.features.stores.shm import SharedMemoryFeatureStore
from paceline.features.stores.slots import description_of
from paceline.testing.feature_store_suite import MIB, assert_same, bulk, feature_ref, features
from paceline.testing.shared_memory import owner_of, put, reader_of, slot_files


def begin(store: SharedMemoryFeatureStore, sample_id: str, generation: int) -> None:
    """The store's writer is in the middle of a `put`."""
    layout = codec.layout_of_tensors(sample_id, features(1))
    assert store._arena is not None
    store._arena.begin(description_of(sample_id, layout), layout.num_bytes, generation)


def test_a_reader_finds_the_samples_of_every_writer(directory: Path) -> None:
    """One address, one folder, and each writer in slots of its own."""
    first, second, reader = owner_of(directory), owner_of(directory, writer=1), reader_of(directory)
    one, other = put(first, 1), put(second, 2)
    assert one.feature_store_uri == other.feature_store_uri
    for store in (first, second, reader):
        assert_same(store.get(one), features(1))
        assert_same(store.get(other), features(2))
    assert [path.name for path in slot_files(directory)] == ["slot-00000001", "slot-1-00000002"]
    assert first.written() == second.written() == [("s1", 1), ("s2", 1)]
    assert first.usage() == second.usage() == reader.usage()


def test_the_budget_is_that_of_all_writers_together(directory: Path) -> None:
    """What one has written leaves less room to the other; the slots that one left free make room."""
    first, second = (owner_of(directory, budget_bytes=MIB, writer=n) for n in range(2))
    for number in range(3):
        first.put(f"s{number}", bulk(number, num_bytes=MIB // 5))
    second.put("s3", bulk(3, num_bytes=MIB // 10))
    with pytest.raises(StoreFullError):
        second.put("s4", bulk(4, num_bytes=MIB // 5))
    first.free([("s0", 0)])
    ref = feature_ref("s4", second.put("s4", bulk(4, num_bytes=MIB // 5)))
    assert_same(first.get(ref), bulk(4, num_bytes=MIB // 5))
    assert sum(path.stat().st_size for path in slot_files(directory)) <= MIB
    first.free([("s1", 0)])
    ref = feature_ref("s5", first.put("s5", bulk(5, num_bytes=MIB // 5)))
    assert_same(second.get(ref), bulk(5, num_bytes=MIB // 5))


def test_a_start_reclaims_its_own_half_written_slots_and_no_neighbours(directory: Path) -> None:
    """A neighbour may be in the middle of a sample; a dead one's bytes are freed by their generation."""
    first, second = owner_of(directory), owner_of(directory, writer=1)
    begin(first, "a", 5)
    begin(second, "b", 6)
    first = owner_of(directory)
    assert first.written() == [(UNSEALED, 6)]
    assert first.usage().resident_samples == 1
    first.free([("b", 7)])
    assert first.usage().resident_samples == 1, "another generation is somebody else's"
    first.free([("b", 6)])
    assert first.usage().resident_samples == second.usage().resident_samples == 0


def test_a_writer_that_goes_on_late_spoils_no_neighbours_sample(directory: Path) -> None:
    """It was held up while it filled a slot, and the bytes were freed: nobody else has written there."""
    late, other = owner_of(directory), owner_of(directory, writer=1)
    layout = codec.layout_of_tensors("a", features(1))
    description = description_of("a", layout)
    assert late._arena is not None
    slot = late._arena.begin(description, layout.num_bytes, 5)
    other.free([("a", 5)])
    ref = feature_ref("a", other.put("a", features(1), generation=6))
    slot.fill(description, layout, features(2))
    assert_same(other.get(ref), features(1))
    assert other.written() == [("a", 6)]


def test_a_late_free_leaves_what_a_neighbour_wrote_since(directory: Path) -> None:
    """A slot that its owner has filled again is judged by the generation in it."""
    first, second = owner_of(directory), owner_of(directory, writer=1)
    old = feature_ref("a", first.put("a", features(1), generation=5))
    second.free([("a", 5)])
    new = feature_ref("b", first.put("b", features(2), generation=6))
    assert slot_files(directory) == slot_files(directory)[:1], "the same slot"
    second.free([("a", 5)])
    assert_same(second.get(new), features(2))
    with pytest.raises(FeatureMissingError):
        second.get(old)


def test_a_slot_that_a_neighbour_removed_is_not_written(directory: Path) -> None:
    """Nobody else could read it."""
    first, second = owner_of(directory, budget_bytes=MIB), owner_of(directory, budget_bytes=MIB, writer=1)
    first.put("a", bulk(1, num_bytes=MIB // 2))
    first.free([("a", 0)])
    second.put("b", bulk(2, num_bytes=MIB // 2))
    second.free([("b", 0)])
    ref = feature_ref("c", first.put("c", bulk(3, num_bytes=MIB // 2)))
    assert_same(reader_of(directory).get(ref), bulk(3, num_bytes=MIB // 2))


def test_a_writers_next_process_goes_on_with_its_slots(directory: Path) -> None:
    """Its samples stay, and its free slots are filled again before new ones are made."""
    owner_of(directory)
    second = owner_of(directory, writer=1)
    kept = put(second, 1)
    put(second, 2)
    second.free([("s2", 0)])
    second = owner_of(directory, writer=1)
    assert_same(second.get(kept), features(1))
    put(second, 3)
    assert len(slot_files(directory)) == 2
