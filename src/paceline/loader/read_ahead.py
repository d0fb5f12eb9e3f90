"""Reads the features of the next step while the current one trains.

Only bytes are read ahead; nothing is planned or recorded for a step that has not begun. If a sample is lost,
captured again or quarantined meanwhile, its step finds that out when it begins: bytes that were read for
another ref are dropped. At most one step's samples are held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from typing import Any

from paceline.errors import StoreError
from paceline.types import SampleRef

Sample = dict[str, Any]


class ReadAhead:
    def __init__(self, read: Callable[[SampleRef], Sample], executor: Executor | None) -> None:
        """`read` must be safe to call in the executor's thread. `executor` None: nothing is read ahead."""
        self._read = read
        self._executor = executor
        self._coming: dict[str, tuple[SampleRef, Future[Sample]]] = {}

    def start(self, refs: Sequence[SampleRef]) -> None:
        """Start to read these refs, and drop earlier bytes that were not used."""
        for _, future in self._coming.values():
            future.cancel()
        self._coming = {}
        if self._executor is not None:
            self._coming = {ref.sample_id: (ref, self._executor.submit(self._read, ref)) for ref in refs}

    def get(self, ref: SampleRef) -> Sample:
        """The sample's tensors, read now if they were not before. Raises what `read` raises."""
        known, future = self._coming.pop(ref.sample_id, (None, None))
        if future is not None and known == ref:
            try:
                return future.result()
            except StoreError:
                pass  # it may be readable by now
        return self._read(ref)
