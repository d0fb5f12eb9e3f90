"""One flipped bit at a time, in checkpoints, the ref channel and the slots of the feature store."""

from __future__ import annotations

from pathlib import Path

from paceline.testing.flipped_files import (
    FOUND,
    IDENTITY,
    SLOT,
    flip_channels,
    flip_checkpoints,
    flip_features,
)


def test_no_flipped_bit_of_a_checkpoint_is_believed(memory: Path) -> None:
    """In the manifest and in every file: refused on record, and never adopted off record."""
    counts = flip_checkpoints(memory, 0, flips=300)
    assert len(counts) == 4
    assert counts.total() == 300


def test_no_flipped_bit_of_the_ref_channel_is_believed(memory: Path) -> None:
    """A ref that was published is read or missed aloud; flips in notes and in a torn write harm nobody."""
    counts = flip_channels(memory, 0, flips=500)
    assert counts.total() == 500
    assert counts["refs.consumed: refused"] == 100
    assert counts["refs: refused"] > 300
    assert counts["refs: exact"] > 0


def test_no_flipped_bit_of_the_feature_store_is_believed(memory: Path) -> None:
    """Missing, corrupt, refused as a whole, or exactly what was sealed; other samples are not touched."""
    counts = flip_features(memory, 0, flips=300)
    assert counts.total() == 300
    assert {name.partition(":")[0] for name in counts} == SLOT.keys() | IDENTITY.keys()
    assert not any(counts[f"{name}: exact"] for name in FOUND)
