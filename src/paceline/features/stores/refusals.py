"""The errors of feature stores, worded once for all of them."""

from __future__ import annotations

from paceline.errors import FeatureCorruptError, FeatureMissingError, FeatureStoreElsewhereError, StoreError
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
        why="Either they are lost with that store, or the producer writes to another place.",
        next="give both roles the same features.directory, on the same machine.",
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
