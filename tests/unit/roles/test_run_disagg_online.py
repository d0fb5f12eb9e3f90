"""run_disagg_online: producer behind, trainer in front; ends in every order of ending."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from paceline import StreamingRefChannel, StreamingRefQueue, run_disagg_online
from paceline.errors import PacelineError
from paceline.testing.samples import sample_ref


class DrainingTrainer:
    """Takes refs one by one, up to `max_steps`; then fails if told to."""

    def __init__(self, max_steps: int | None = None, error: Exception | None = None) -> None:
        self.max_steps, self.error = max_steps, error
        self.consumed: list[str] = []

    def fit(self, loader: StreamingRefQueue) -> int:
        while self.max_steps is None or len(self.consumed) < self.max_steps:
            refs = loader.get(1)
            if not refs:
                break
            self.consumed += [ref.sample_id for ref in refs]
        if self.error:
            raise self.error
        return len(self.consumed)


@pytest.fixture
def ends(tmp_path: Path) -> tuple[StreamingRefChannel, StreamingRefQueue]:
    path = tmp_path / "refs.log"
    return StreamingRefChannel(path), StreamingRefQueue(StreamingRefChannel(path), poll_s=0.01)


Drive = Callable[..., int]


def publisher(
    channel: StreamingRefChannel, count: int, *, close: bool = True, error: Exception | None = None
) -> Drive:
    """Publishes `count` refs, then waits to be told to stop if `count` is negative."""

    def drive(max_rounds: int | None = None, should_stop: Callable[[], bool] | None = None) -> int:
        assert should_stop is not None
        number = 0
        while not should_stop() and (count < 0 or number < count):
            channel.publish(sample_ref(number))
            number += 1
        if error:
            raise error
        if close:
            channel.close()
        return number

    return drive


def test_the_producer_ends_first(ends: tuple[StreamingRefChannel, StreamingRefQueue]) -> None:
    """The trainer drains what was published and returns its last step."""
    channel, queue = ends
    trainer = DrainingTrainer()
    step = run_disagg_online(
        trainer=trainer, loader=queue, drive_producer=publisher(channel, 5), channel=channel
    )
    assert step == 5
    assert trainer.consumed == [f"run0:s{n}" for n in range(5)]


def test_the_trainer_ends_first(ends: tuple[StreamingRefChannel, StreamingRefQueue]) -> None:
    """An endless producer is asked to stop as soon as the trainer is done."""
    channel, queue = ends
    trainer = DrainingTrainer(max_steps=3)
    drive = publisher(channel, -1)
    assert run_disagg_online(trainer=trainer, loader=queue, drive_producer=drive, channel=channel) == 3


def test_the_trainer_fails(ends: tuple[StreamingRefChannel, StreamingRefQueue]) -> None:
    """Its error comes out, and the producer is stopped."""
    channel, queue = ends
    trainer = DrainingTrainer(max_steps=2, error=RuntimeError("bad step"))
    with pytest.raises(RuntimeError, match="bad step"):
        run_disagg_online(
            trainer=trainer, loader=queue, drive_producer=publisher(channel, -1), channel=channel
        )
    assert "paceline-producer" not in {thread.name for thread in threading.enumerate()}


def test_the_producer_fails(ends: tuple[StreamingRefChannel, StreamingRefQueue]) -> None:
    """What was committed is trained, nothing hangs, and the producer's error comes out (hole B22)."""
    channel, queue = ends
    trainer = DrainingTrainer()
    drive = publisher(channel, 2, error=RuntimeError("engine died"))
    with pytest.raises(RuntimeError, match="engine died"):
        run_disagg_online(trainer=trainer, loader=queue, drive_producer=drive, channel=channel)
    assert trainer.consumed == ["run0:s0", "run0:s1"]
    assert not channel.is_closed()


def test_both_fail(ends: tuple[StreamingRefChannel, StreamingRefQueue]) -> None:
    """The producer's error is the cause; the trainer's is chained to it, so neither is lost."""
    channel, queue = ends
    trainer = DrainingTrainer(error=ValueError("starved"))
    drive = publisher(channel, 1, error=RuntimeError("engine died"))
    with pytest.raises(RuntimeError, match="engine died") as caught:
        run_disagg_online(trainer=trainer, loader=queue, drive_producer=drive, channel=channel)
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_producer_that_forgets_to_close_does_not_hang_the_trainer(
    ends: tuple[StreamingRefChannel, StreamingRefQueue],
) -> None:
    """Returning is enough: nothing can follow."""
    channel, queue = ends
    trainer = DrainingTrainer()
    drive = publisher(channel, 3, close=False)
    assert run_disagg_online(trainer=trainer, loader=queue, drive_producer=drive, channel=channel) == 3


def test_a_producer_that_does_not_stop_is_an_error(
    ends: tuple[StreamingRefChannel, StreamingRefQueue],
) -> None:
    """A live producer is never silently left behind."""
    channel, queue = ends
    release = threading.Event()

    def stuck(max_rounds: int | None = None, should_stop: Callable[[], bool] | None = None) -> int:
        channel.publish(sample_ref(0))
        release.wait(60)
        return 1

    trainer = DrainingTrainer(max_steps=1)
    with pytest.raises(PacelineError, match="did not stop within"):
        run_disagg_online(
            trainer=trainer, loader=queue, drive_producer=stuck, channel=channel, join_timeout_s=0.05
        )
    release.set()
