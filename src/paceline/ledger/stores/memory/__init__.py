"""The metadata store in plain dictionaries; see store.py."""

from paceline.ledger.stores.memory.store import InMemoryMetadataStore

__all__ = ["InMemoryMetadataStore"]
