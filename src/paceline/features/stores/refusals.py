"""What a feature store refuses, worded once for every feature store."""

from __future__ import annotations

from paceline.errors import FeatureCorruptError, FeatureMissingError, FeatureStoreElsewhereError, StoreError
from paceline.types import SampleRef


def missing(ref: SampleRef, because: str) -> FeatureMissingError:
    return FeatureMissingError(
        f"No features of {ref.sample_id!r} lie under {ref.feature_store_uri}: {because}.",
        why="The sample cannot be trained before they are captured again.",
        next="report it lost; `paceline produce RUN.yaml` captures it again.",
    )


def elsewhere(ref: SampleRef, here: str) -> FeatureStoreElsewhereError:
    return FeatureStoreElsewhereError(
        f"The features of {ref.sample_id!r} lie in {ref.feature_store_uri}, and here is {here}.",
        why="Either they are lost with that store, or the producer keeps them in another place.",
        next="give both roles the same features.directory, on the same machine.",
    )


def corrupt(ref: SampleRef, because: str) -> FeatureCorruptError:
    return FeatureCorruptError(
        f"The features of {ref.sample_id!r} under {ref.feature_store_uri} are damaged: {because}; "
        f"the ref says digest {ref.metadata.get('digest')}.",
        why="Training on other bytes than those sealed would go unnoticed in the weights.",
        next="report it lost; `paceline produce RUN.yaml` captures it again.",
    )


def stale(sample_id: str, generation: int, newer: int) -> StoreError:
    return StoreError(
        f"Bytes of {sample_id!r} under generation {generation} come after those of generation {newer}.",
        why="Another producer has captured the sample since; nothing was written.",
        next="stop this process; `paceline status RUN` shows who the producer is.",
    )
