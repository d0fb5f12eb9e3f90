"""RedisView reads a ledger without holding a role and without writing.

It creates nothing on the server, and its user needs no more than the right to read:
`ACL SETUSER viewer on >PASSWORD ~{paceline:*}:* -@all +@read +@connection +eval_ro +evalsha_ro`.
"""

from __future__ import annotations

from collections.abc import Sequence

from paceline.ledger.records import SampleRecord, State, TrainedStep
from paceline.ledger.stores.redis.address import Address
from paceline.ledger.stores.redis.reading import Reading
from paceline.ledger.stores.redis.server import Server

PATIENCE_S = 10.0


class RedisView:
    def __init__(self, url: str, name: str, *, patience_s: float = PATIENCE_S) -> None:
        """Raises ConfigError if there is no such ledger, LedgerError if the server does not answer."""
        server = Server(Address(url), patience_s, lambda _: None)
        self._reading = Reading(server, name, durability="head")
        self._reading.know()
        self.snapshot, self.facts = self._reading.snapshot, self._reading.facts
        self.position, self.missing_since = self._reading.position, self._reading.missing_since
        self.close = self._reading.close

    def find(
        self, sample_ids: Sequence[str] | None = None, *, state: State | None = None
    ) -> dict[str, SampleRecord]:
        return self._reading.find(sample_ids, state=state)

    def failed(self) -> dict[int, str]:
        """Failed prompts by ordinal, and the reason of each."""
        return self._reading.failed()

    def history(self, *, step: int | None = None, sample_id: str | None = None) -> list[TrainedStep]:
        """That step, or the steps that contain the sample; archived ones too."""
        return list(self._reading.history(step=step, sample_id=sample_id))
