"""LedgerView: what a process may ask of a ledger while it holds no role. It writes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from paceline.ledger.records import SampleRecord, Snapshot, State, TrainedStep


class LedgerView(Protocol):
    """Adapters: stores/*/view.py. Each question is answered from one state of the ledger; see ledger.py."""

    def snapshot(self) -> Snapshot: ...

    def facts(self) -> dict[str, Any]: ...

    def find(
        self, sample_ids: Sequence[str] | None = None, *, state: State | None = None
    ) -> dict[str, SampleRecord]: ...

    def failed(self) -> dict[int, str]:
        """Failed prompts by ordinal, and the reason of each."""

    def history(self, *, step: int | None = None, sample_id: str | None = None) -> list[TrainedStep]:
        """That step, or the steps that contain the sample; archived ones too."""

    def close(self) -> None:
        """End its connections, if it keeps any between two questions. Idempotent."""
