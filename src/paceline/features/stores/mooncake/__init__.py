"""The feature store in the memory of many hosts, over Mooncake; see store.py."""

from paceline.features.stores.mooncake.store import MooncakeFeatureStore

__all__ = ["MooncakeFeatureStore"]
