"""Reads the features of the next step while the current one trains.

Only bytes are read ahead; nothing is planned or recorded for a step that has not begun. If a sample is lost,
captured again or quarantined meanwhile, its step finds that out when it begins: bytes that were read for
another ref are dropped. At most one step's samples are held.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any

from paceline.errors import StoreError
from paceline.types import SampleRef

Sample = Mapping[str, Any]


@dataclass(frozen=True)
class _Part:
    """One sample of those that are read together."""

    together: Future[Sequence[Sample | StoreError]]
    number: int

    def cancel(self) -> None:
        self.together.cancel()

    def result(self) -> Sample:
        found = self.together.result()[self.number]
        if isinstance(found, StoreError):
            raise found
        return found


class ReadAhead:
    def __init__(
        self,
        read: Callable[[SampleRef], Sample],
        executor: Executor | None,
        read_many: Callable[[Sequence[SampleRef]], Sequence[Sample | StoreError]] | None = None,
    ) -> None:
        """`read` must be safe to call in the executor's thread. `executor` None: nothing is read ahead.

        `read_many`: the samples together, or why not, for a store that has several on their way at a time.
        """
        self._read, self._read_many = read, read_many
        self._executor = executor
        self._coming: dict[str, tuple[SampleRef, Future[Sample] | _Part]] = {}

    def start(self, refs: Sequence[SampleRef]) -> None:
        """Start to read these refs, and drop earlier bytes that were not used."""
        for _, future in self._coming.values():
            future.cancel()
        self._coming = {}
        if self._executor is not None and self._read_many is not None and refs:
            together = self._executor.submit(self._read_many, list(refs))
            self._coming = {ref.sample_id: (ref, _Part(together, n)) for n, ref in enumerate(refs)}
        elif self._executor is not None:
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
