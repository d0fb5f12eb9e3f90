"""RedisMetadataStore: the earlier API over a ledger on a server."""

from __future__ import annotations

from collections.abc import Sequence

from paceline.compat.stores import MetadataStore
from paceline.ledger.records import Fence
from paceline.ledger.stores.redis import Durability, RedisLedger


class RedisMetadataStore(MetadataStore, RedisLedger):
    """A store on a Redis or Valkey server, shared by every process that opens it under this name."""

    def __init__(self, url: str, name: str = "ledger", *, durability: Durability = "full") -> None:
        super().__init__(url, name, durability=durability)

    def record_ack(
        self, fence: Fence | None, /, sample_ids: Sequence[str], step: int | None, *, durable: bool
    ) -> None:
        self._call("record_ack", fence, list(sample_ids), step, 2 if durable else 1, final=durable)

    def acked(self, *, durable: bool) -> list[tuple[str, int | None]]:
        return [(sample_id, step) for sample_id, step in self._ask("acked", 2 if durable else 1)]
