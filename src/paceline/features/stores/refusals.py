"""The errors of feature stores, worded once for all of them."""

from __future__ import annotations

import errno
from pathlib import Path

from paceline.errors import (
    FeatureCorruptError,
    FeatureMissingError,
    FeatureStoreElsewhereError,
    StoreError,
    StoreFullError,
)
from paceline.types import SampleRef


def missing(ref: SampleRef, because: str) -> FeatureMissingError:
    return FeatureMissingError(
        f"There are no features of {ref.sample_id!r} in {ref.feature_store_uri}: {because}.",
        why="The sample cannot be trained before they are captured again.",
        next="report it lost; `paceline produce RUN.yaml` captures it again.",
    )


def elsewhere(ref: SampleRef, here: str) -> FeatureStoreElsewhereError:
    return FeatureStoreElsewhereError(
        f"The features of {ref.sample_id!r} are in {ref.feature_store_uri}, but this process reads {here}.",
        why="Either the features are lost with that store, or the producer writes to another place.",
        next="give both roles the same features.directory, on one machine or a filesystem that they share.",
    )


def corrupt(ref: SampleRef, because: str) -> FeatureCorruptError:
    return FeatureCorruptError(
        f"The features of {ref.sample_id!r} in {ref.feature_store_uri} are damaged: {because}; "
        f"the ref says digest {ref.metadata.get('digest')}.",
        why="Training on damaged bytes would spoil the weights unnoticed.",
        next="report it lost; `paceline produce RUN.yaml` captures it again.",
    )


def stale(sample_id: str, generation: int, newer: int) -> StoreError:
    return StoreError(
        f"Bytes of {sample_id!r} of generation {generation} came after those of generation {newer}.",
        why="Another producer has captured the sample since; nothing was written.",
        next="stop this process; `paceline status RUN` names the current producer.",
    )


def no_room(directory: Path, size: int, error: OSError) -> StoreError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreFullError(
            f"No {size} bytes are left on the filesystem of {directory}.",
            why="The budget is larger than the shared memory that this machine or container gives.",
            next="lower features.budget_mib, or give more (`docker run --shm-size=8g`, `df -h /dev/shm`).",
        )
    return StoreError(
        f"No file of {size} bytes can be created in {directory} ({error}).",
        why="Features cannot be stored; the directory was removed in use or cannot be written.",
        next="check features.directory and run the same command again.",
    )


def other_format(directory: Path, because: str) -> StoreError:
    return StoreError(
        f"{directory} is not a feature store of this version: {because}.",
        why="Files that this version does not know must not be read or overwritten.",
        next="finish that run with the version that started it, or choose another run.name; "
        f"`rm -r {directory}` discards it (lost features are captured again).",
    )


def replaced(directory: Path) -> StoreError:
    return StoreError(
        f"The feature store in {directory} was removed or made anew while this process wrote to it.",
        why="What this process writes could not be read by others.",
        next="run the same command again: it opens the store that is there now.",
    )


def unmounted(directory: Path) -> StoreError:
    return StoreError(
        f"The feature store in {directory} is no longer there: it was removed, or is not mounted any more.",
        why="The place is at fault, not a sample: none was lost, failed or quarantined for it.",
        next="mount it again, then run the same command again. If it was removed, the command makes it "
        "anew, and the features are captured again.",
    )


def fails(directory: Path, error: OSError) -> StoreError:
    return StoreError(
        f"The feature store in {directory} cannot be used ({error}).",
        why="The place is at fault, not a sample: none was lost, failed or quarantined for it.",
        next="check that filesystem, its server and this user's rights, then run the same command again.",
    )


def no_disk(directory: Path, size: int, error: OSError, waited_s: float) -> StoreFullError:
    return StoreFullError(
        f"There was no room for {size} bytes in {directory} for {waited_s:g} s ({error.strerror}).",
        why="Others fill that filesystem, or the quota is below features.budget_mib. Nothing of the sample "
        "was stored, and no sample is to blame.",
        next="make room there (`df -h`, `quota`), or lower features.budget_mib, and run it again.",
    )


def over_budget(sample_id: str, size: int, where: Path | str, budget_bytes: int) -> StoreFullError:
    return StoreFullError(
        f"Sample {sample_id!r} of {size} bytes does not fit in {where}, which may hold {budget_bytes}.",
        why="A sample's bytes stay until a durable checkpoint covers it.",
        next="raise features.budget_mib, or lower checkpoint.interval_steps.",
    )


def reader_may_not(verb: str, where: Path | str) -> StoreError:
    return StoreError(
        f"This process may not {verb} in {where}: it opened the store as a reader.",
        why="Only a producer writes: the ledger gives it the generations. A reader has none.",
        next=f"{verb} in a producer, which opens the store with owner=True.",
    )
