"""When the producer must wait: bytes and samples in the feature store, with hysteresis.

Features stay until a checkpoint covers them, so a producer that waits for room may wait for a distant
checkpoint. It therefore asks for an early one whenever that would free something. The check at the
start guarantees that this suffices: after such a checkpoint at most one unfinished batch is resident,
and a capture group fits beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic

from paceline.errors import ConfigError
from paceline.features.store import FeatureStore
from paceline.ledger.facts import CHECKPOINT_WANTED
from paceline.ledger.producer_session import ProducerSession
from paceline.ledger.records import Budget, SampleRecord
from paceline.telemetry import BlockedTime

LOW = 0.75
WAIT_S = 1.0


@dataclass(frozen=True)
class Watermarks:
    """Pause when the next group would not fit into a budget; resume below `low` of it.

    The budget of bytes always applies, that of samples unless it is None. `window_samples`: how many samples
    the consumer must collect before it can go on; `window_bytes`: how many bytes, if it is less than so many
    of the largest samples.
    """

    budget_bytes: int
    group_bytes: int
    low: float = LOW
    budget_samples: int | None = None
    group_samples: int = 1
    window_samples: int = 0
    window_bytes: int | None = None

    @property
    def resume_bytes(self) -> int:
        """The most bytes that may be resident when a paused producer goes on."""
        return min(int(self.low * self.budget_bytes), self.budget_bytes - self.group_bytes)

    @property
    def groups_ahead(self) -> int:
        """How many groups from the settled prefix on several producers may capture at the same time.

        So many that a group fits, whatever the others hold, as soon as the consumer has freed all but the
        samples that it collects. At least 1, if `check_feasible` allows these budgets.
        """
        size, window = self.group_bytes // max(1, self.group_samples), self.window_bytes
        window = self.window_samples * size if window is None else window
        ahead = (self.resume_bytes - window) // self.group_bytes
        if self.budget_samples is not None:
            ahead = min(ahead, (self.resume_samples - self.window_samples) // self.group_samples)
        return max(0, ahead) + 1

    @property
    def resume_samples(self) -> int:
        """The same in samples; only where a budget of samples is set."""
        assert self.budget_samples is not None
        return min(int(self.low * self.budget_samples), self.budget_samples - self.group_samples)


def check_feasible(
    *,
    budget_bytes: int,
    sample_bytes: int,
    group_size: int,
    window_size: int,
    budget_samples: int | None = None,
    window_bytes: int | None = None,
) -> None:
    """Raise ConfigError if producer and consumer could deadlock within these budgets.

    `sample_bytes` is the largest one sample can be; `window_bytes`: see `Watermarks`. Needed at once: one
    capture group, the samples the consumer must collect before it can go on, and the slack of the low
    watermark.
    """
    least_samples = math.ceil((group_size + window_size) / LOW) + 1
    if budget_samples is not None and budget_samples < least_samples:
        raise ConfigError(
            f"features.budget_samples is {budget_samples}, but a group of {group_size} and the "
            f"{window_size} samples the consumer collects need {least_samples}.",
            why="With fewer, producer and consumer could wait for each other for ever.",
            next=f"set features.budget_samples to {least_samples}, or lower capture.group_size.",
        )
    collected = window_size * sample_bytes if window_bytes is None else window_bytes
    needed = int((group_size * sample_bytes + collected) / LOW) + 1
    if needed > budget_bytes:
        what = f"{window_size} samples" if window_bytes is None else f"{window_bytes >> 20} MiB"
        or_lower = "" if window_bytes is None else " or training.tokens_per_step"
        raise ConfigError(
            f"features.budget_mib gives {budget_bytes >> 20} MiB, but a group of {group_size} and the "
            f"{what} the consumer collects, of up to {sample_bytes >> 10} KiB a sample, need "
            f"{(needed >> 20) + 1} MiB.",
            why="With less, producer and consumer could wait for each other for ever.",
            next=f"set features.budget_mib to {(needed >> 20) + 1}, or lower capture.group_size{or_lower}.",
        )


class Backpressure:
    def __init__(
        self,
        features: FeatureStore,
        session: ProducerSession,
        marks: Watermarks,
        *,
        report: Callable[..., None] = lambda *_, **__: None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """`blocked` counts the waits for room; `idle` those for prompts that other producers hold."""
        self._features = features
        self._store_counts = features.usage().is_current
        self._session = session
        self._marks = marks
        self._paused = False
        self.blocked = BlockedTime(report, clock)
        self.idle = BlockedTime(
            lambda _, blocked_seconds: report("idle", idle_seconds=blocked_seconds), clock
        )

    def consumer_can_go_on(self, records: Sequence[SampleRecord]) -> bool:
        """Whether these samples are certainly more than it must collect."""
        samples, num_bytes = self._marks.window_samples, self._marks.window_bytes
        if num_bytes is not None and sum(record.ref.estimated_bytes for record in records) > num_bytes:
            return True
        return 0 < samples < len(records)

    @property
    def budget(self) -> Budget:
        """The limits that the ledger enforces, over all workers, when one reserves bytes."""
        return Budget(self._marks.budget_bytes, self._marks.budget_samples)

    @property
    def sample_bytes(self) -> int:
        """Bytes to reserve for one sample before its size is known."""
        return self._marks.group_bytes // max(1, self._marks.group_samples)

    def wait_for_credit(
        self,
        should_stop: Callable[[], bool],
        on_wait: Callable[[], None] = lambda: None,
    ) -> bool:
        """Block until a group fits; False if asked to stop first. Never busy-polls.

        `on_wait` is called before each wait, because the consumer may need something meanwhile.
        """
        with self.blocked:
            while not self.has_credit():
                if should_stop():
                    return False
                self.blocked.waiting()
                self._ask_for_checkpoint()
                mark = self._session.lsn()  # before the last look, so that no release is missed
                on_wait()
                if not self.has_credit():
                    self._session.wait(mark, WAIT_S)
        return True

    def has_credit(self) -> bool:
        """Whether a group fits now. Once it did not, only below the low watermark."""
        marks, ledger = self._marks, self._session.snapshot().usage
        # The ledger also counts bytes that are only reserved; the store also counts its slack.
        promised = ledger.resident_bytes + ledger.reserved_bytes
        stored = self._features.usage().resident_bytes if self._store_counts else 0
        resident = max(stored, promised)
        limit = marks.resume_bytes if self._paused else marks.budget_bytes - marks.group_bytes
        full = resident > limit
        if marks.budget_samples is not None:
            most = marks.resume_samples if self._paused else marks.budget_samples - marks.group_samples
            full = full or ledger.resident_samples + ledger.reserved_samples > most
        self._paused = full
        return not full

    def _ask_for_checkpoint(self) -> None:
        now = self._session.snapshot()
        if now.usage.provisional_samples and not now.facts.get(CHECKPOINT_WANTED):
            self._session.set_facts({CHECKPOINT_WANTED: True})
