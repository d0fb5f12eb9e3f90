"""The stream of sample refs in the earlier API: channels, and a queue that makes batches of them.

`CommittedRefLog` reads refs straight from a store: the committed log is the stream, so there is no
second record that could disagree. `StreamingRefChannel` (streaming_channel.py) has the same interface
over a separate file. `StreamingRefQueue` makes batches of either.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from paceline.compat.stores import MetadataStore
from paceline.errors import LedgerError
from paceline.ledger.records import Fence
from paceline.types import SampleRef

PAGE = 256


class RefChannel(Protocol):
    """Append refs at one end, read them in the same order at the other, across processes."""

    def publish_many(self, refs: Sequence[SampleRef]) -> None: ...

    def close(self) -> None:
        """End the stream: readers end once they have drained the channel."""

    def is_closed(self) -> bool: ...

    def poll(self, max_n: int | None = None) -> list[SampleRef]:
        """The refs appended since this object's last poll; does not block."""

    def mark_consumed(self, n: int) -> None:
        """Count `n` more refs as consumed by this reader."""

    def consumed_remote(self) -> int: ...

    def in_flight_remote(self) -> int:
        """Published minus consumed refs, over all processes: the producer's backpressure signal."""

    def change_mark(self) -> int:
        """A number that differs after every change that a reader may wait for."""

    def wait(self, seen: int, timeout_s: float) -> int:
        """Block until `change_mark() != seen` or the timeout; returns the current mark."""


class CommittedRefLog:
    """A store's committed log, in commit order: every sample once."""

    distinct = True

    def __init__(self, store: MetadataStore, *, start: int = 0, fence: Fence | None = None) -> None:
        """`start`: the first place to read. `fence`: of the role that closes and reopens the log."""
        self.fence = fence
        self._store = store
        self._next = start

    def publish_many(self, refs: Sequence[SampleRef]) -> None:
        """Does nothing to publish: a commit to the store publishes its refs."""
        self._store.commit_samples(refs, fence=self.fence)

    def close(self) -> None:
        """Raises LedgerError while a prompt is still to be captured."""
        if not self._store.end_stream(self.fence, True):
            raise LedgerError(
                "The log was not closed: prompts are still to be captured.",
                why="Readers would end before those samples arrive.",
                next="commit or fail every registered prompt, then close the log.",
            )

    def reopen(self) -> None:
        """Open the closed log again, for more refs."""
        self._store.end_stream(self.fence, False)

    def is_closed(self) -> bool:
        return self._store.snapshot().closed

    def poll(self, max_n: int | None = None) -> list[SampleRef]:
        entries = self._store.read_committed(self._next, PAGE if max_n is None else max_n)
        if entries:
            self._next = entries[-1].place + 1
        return [entry.ref for entry in entries]

    def mark_consumed(self, n: int) -> None:
        """Does nothing: acked refs count as consumed, and the store holds the acks."""

    def consumed_remote(self) -> int:
        return self._store.committed_count() - self.in_flight_remote()

    def in_flight_remote(self) -> int:
        return self._store.snapshot().usage.waiting_samples

    def change_mark(self) -> int:
        return self._store.lsn()

    def wait(self, seen: int, timeout_s: float) -> int:
        return self._store.wait(seen, timeout_s)


class StreamingRefQueue:
    """Batches of refs from a channel, each sample once.

    Refs in `skip_ids` (already in the surviving weights) and second copies of a ref are dropped,
    however often the channel repeats them. They count as consumed, so `in_flight_remote` is exact
    from construction on.
    """

    def __init__(
        self,
        channel: RefChannel,
        *,
        poll_s: float = 0.1,
        idle_timeout_s: float | None = None,
        skip_ids: Collection[str] | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        on_wait: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`poll_s`: the longest time between checks of `should_stop` and the channel, in seconds.

        `on_wait` is called before each wait, for work that the producer may be waiting for.

        `idle_timeout_s`: how long `get` waits without any news before it raises TimeoutError.
        """
        self.channel = channel
        self.poll_s = poll_s
        self.idle_timeout_s = idle_timeout_s
        self._skip_ids = frozenset(skip_ids or ())
        # For a channel that cannot repeat a sample, the queue need not remember ids.
        self._seen: set[str] | None = None if getattr(channel, "distinct", False) else set()
        self._should_stop = should_stop
        self._on_wait = on_wait
        self._clock = clock
        self._ready: list[SampleRef] = []
        self._interrupted = False
        self.ended = False  # whether the last `get` reached the end of a closed stream
        # A new reader starts its own count: refs that its predecessor consumed but did not make
        # durable are in flight again.
        self.channel.mark_consumed(0)
        self._fill()

    def get(self, n: int) -> list[SampleRef]:
        """The next `n` refs, waiting for them; fewer only at the end of the stream (then `ended`).

        [] if asked to stop, or interrupted, before `n` have arrived; those that have stay for the next
        call. Raises TimeoutError after `idle_timeout_s` without a change.
        """
        last_news = self._clock()
        while not self._should_stop():
            mark = self.channel.change_mark()
            closed, interrupted = self.channel.is_closed(), self._interrupted
            news = self._fill()
            # `closed` was read before the channel, so no ref can have been missed.
            self.ended = closed and not news and len(self._ready) < n
            if self.ended or len(self._ready) >= n:
                taken, self._ready = self._ready[:n], self._ready[n:]
                return taken
            if news:
                last_news = self._clock()
                continue
            if interrupted:
                break
            self._check_idle(last_news)
            self._on_wait()
            self.channel.wait(mark, self.poll_s)
        return []

    def has(self, n: int) -> bool:
        """Whether `get(n)` would return `n` refs without waiting."""
        self._fill()
        return len(self._ready) >= n

    def interrupt(self) -> None:
        """The writer died without a close: deliver whole batches, then end."""
        self._interrupted = True

    def rearm(self) -> None:
        """Undo `interrupt`: a writer has started again."""
        self._interrupted = False

    def ack(self, refs: Sequence[SampleRef]) -> None:
        """Count the refs as consumed."""
        self.channel.mark_consumed(len(refs))

    def _fill(self) -> int:
        """Poll the channel; returns how many refs it yielded, dropped ones included."""
        refs = self.channel.poll()
        dropped = 0
        for ref in refs:
            if ref.sample_id in self._skip_ids or (self._seen is not None and ref.sample_id in self._seen):
                dropped += 1
                continue
            self._ready.append(ref)
            if self._seen is not None:
                self._seen.add(ref.sample_id)
        if dropped:
            self.channel.mark_consumed(dropped)
        return len(refs)

    def _check_idle(self, last_news: float) -> None:
        if self.idle_timeout_s is not None and self._clock() - last_news > self.idle_timeout_s:
            raise TimeoutError(
                f"No new sample for {self.idle_timeout_s:g} s and the stream is not closed. The producer "
                "may be dead; nothing is lost. Next: start it again with `paceline produce RUN.yaml`."
            )
