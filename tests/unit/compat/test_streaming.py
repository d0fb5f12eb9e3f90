"""StreamingRefChannel, CommittedRefLog and StreamingRefQueue: every ref once, counters exact."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from paceline import DataFlowController, SQLiteMetadataStore, StreamingRefChannel, StreamingRefQueue
from paceline.compat.channel import CommittedRefLog
from paceline.errors import FencedError, LedgerError
from paceline.testing.samples import sample_ref
from paceline.types import SampleRef

REFS = [sample_ref(number) for number in range(8)]
IDS = [ref.sample_id for ref in REFS]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "channel" / "refs.log"


def drain(queue: StreamingRefQueue) -> list[str]:
    taken = []
    while refs := queue.get(1):
        taken += [ref.sample_id for ref in refs]
        queue.ack(refs)
    return taken


def test_refs_arrive_whole_and_in_order(path: Path) -> None:
    """What one end publishes, the other polls, equal and in order."""
    writer, reader = StreamingRefChannel(path), StreamingRefChannel(path)
    assert reader.poll() == []
    writer.publish_many(REFS[:3])
    assert reader.poll(max_n=2) == REFS[:2]
    assert reader.poll() == REFS[2:3]
    assert reader.poll() == []


def test_a_torn_last_line_is_never_read(path: Path, tmp_path: Path) -> None:
    """Cut anywhere, the last record is not there until its newline is; then it is, once."""
    source = StreamingRefChannel(tmp_path / "source")
    source.publish_many(REFS[:2])
    data = source.path.read_bytes()
    last = data.index(IDS[1].encode())
    for cut in range(data.rindex(b"\n", 0, last) + 1, data.index(b"\n", last) + 1):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data[:cut])
        reader = StreamingRefChannel(path)
        assert reader.poll() == REFS[:1]
        with path.open("ab") as file:
            file.write(data[cut:])
        assert reader.poll() == REFS[1:2]


def test_a_torn_line_does_not_swallow_the_next_record(path: Path) -> None:
    """A writer that comes after a torn write ends the fragment before it appends (hole B7)."""
    StreamingRefChannel(path).publish_many(REFS[:2])
    path.write_bytes(path.read_bytes()[:-20])
    StreamingRefChannel(path).publish_many(REFS[1:3])
    assert StreamingRefChannel(path).poll() == REFS[:3]
    assert StreamingRefChannel(path).published == 3


def test_a_published_ref_that_is_damaged_is_an_error(path: Path) -> None:
    """Whoever reads or counts is told where, every time; what came before it was given out."""
    writer = StreamingRefChannel(path)
    writer.publish_many(REFS[:2])
    reader = StreamingRefChannel(path)
    assert reader.poll() == REFS[:2]
    writer.publish_many(REFS[2:4])
    data = bytearray(path.read_bytes())
    at = data.index(IDS[2].encode())
    data[at] ^= 1
    path.write_bytes(data)
    writer.publish_many(REFS[4:5])
    first, end = data.rindex(b"\n", 0, at) + 1, data.index(b"\n", at)
    for _ in range(2):
        for look in (reader.poll, reader.in_flight_remote, StreamingRefChannel(path).poll):
            with pytest.raises(LedgerError, match=f"bytes {first} to {end} are not as published"):
                look()


def test_a_torn_write_before_whole_refs_waits_for_a_writer_and_hides_nothing(path: Path) -> None:
    """A power failure may tear the middle of a write. Nothing was promised of it: the next writer decides."""
    StreamingRefChannel(path).publish_many(REFS[:1])
    StreamingRefChannel(path).publish_many(REFS[1:4])
    data = bytearray(path.read_bytes())
    torn = data.index(IDS[2].encode())
    data[torn : torn + 40] = bytes(40)
    path.write_bytes(data[: data.rindex(b"\n\n") + 1])  # the note after the sync never came
    reader = StreamingRefChannel(path)
    assert reader.poll() == REFS[:2]
    assert reader.poll() == []
    StreamingRefChannel(path).publish_many(REFS[1:3])
    assert reader.poll() == [REFS[3], REFS[1], REFS[2]]
    assert reader.published == 5


def test_closing_decides_about_a_torn_write(path: Path) -> None:
    """No writer will come any more: what is whole behind it is read, and the stream ends."""
    StreamingRefChannel(path).publish_many(REFS[:1])
    with path.open("ab") as file:
        file.write(b"\ntorn\n")
    reader = StreamingRefChannel(path)
    assert reader.poll() == REFS[:1]
    writer = StreamingRefChannel(path)
    writer.close()
    writer.close()
    assert drain(StreamingRefQueue(reader, poll_s=0.0)) == []
    assert drain(StreamingRefQueue(StreamingRefChannel(path), poll_s=0.0)) == IDS[:1]


def test_a_channel_of_an_earlier_version_is_read(path: Path) -> None:
    """Without notes: whole lines are refs, a torn one is decided by the next writer."""
    path.parent.mkdir()
    records = [line for line in _lines_of(path.parent / "new", REFS[:2]) if b"@" not in line]
    path.write_bytes(records[0] + b"\n" + records[1][:50] + b"\n" + records[1] + b"\n")
    reader = StreamingRefChannel(path)
    assert reader.poll() == REFS[:1]
    StreamingRefChannel(path).publish_many(REFS[2:3])
    assert reader.poll() == REFS[1:3]


def _lines_of(path: Path, refs: list[SampleRef]) -> list[bytes]:
    StreamingRefChannel(path).publish_many(refs)
    return [line for line in path.read_bytes().split(b"\n") if line]


def test_tensors_are_not_published(path: Path) -> None:
    """The channel carries metadata only."""
    import dataclasses

    class Tensor:
        dtype, shape, device = "float32", (1,), "cpu"

    with pytest.raises(TypeError, match="metadata only"):
        StreamingRefChannel(path).publish(dataclasses.replace(REFS[0], metadata={"x": Tensor()}))
    assert StreamingRefChannel(path).poll() == []


def test_a_closed_channel_takes_no_more_refs(path: Path) -> None:
    """Readers may have ended, so publishing after close is an error that says so."""
    channel = StreamingRefChannel(path)
    assert not channel.is_closed()
    channel.close()
    channel.close()
    assert StreamingRefChannel(path).is_closed()
    with pytest.raises(LedgerError, match="closed"):
        channel.publish(REFS[0])


def test_a_disk_that_fails_says_which_refs_to_publish_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a failed fsync nobody knows what is on the disk; a second copy of a ref does no harm."""
    channel, fsync = StreamingRefChannel(path), os.fsync

    def fail(fd: int) -> None:
        monkeypatch.setattr(os, "fsync", fsync)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(LedgerError, match="publish the same refs again"):
        channel.publish_many(REFS[:2])
    channel.publish_many(REFS[:2])
    channel.close()
    assert drain(StreamingRefQueue(StreamingRefChannel(path), poll_s=0.0)) == IDS[:2]


def test_counters_survive_a_restart_of_either_end(path: Path) -> None:
    """Both counters are read from disk, so a new object of either end knows them (hole B10)."""
    StreamingRefChannel(path).publish_many(REFS[:5])
    reader = StreamingRefChannel(path)
    queue = StreamingRefQueue(reader, poll_s=0.0)
    queue.ack(queue.get(2))
    restarted_writer = StreamingRefChannel(path)
    assert restarted_writer.consumed_remote() == 2
    assert restarted_writer.in_flight_remote() == 3
    restarted_writer.publish_many(REFS[5:6])
    assert restarted_writer.in_flight_remote() == 4


def test_an_empty_consumed_counter_only_slows_the_producer_down(path: Path) -> None:
    """It counts as nothing consumed; nothing crashes (hole B9)."""
    channel = StreamingRefChannel(path)
    channel.publish_many(REFS[:3])
    queue = StreamingRefQueue(channel, poll_s=0.0)
    queue.ack(queue.get(2))
    path.with_name("refs.log.consumed").write_bytes(b"")
    assert StreamingRefChannel(path).in_flight_remote() == 3


def test_a_damaged_consumed_counter_is_an_error_until_a_reader_starts(path: Path) -> None:
    """Taken for nothing consumed it could stop the producer for ever; a new reader writes it anew."""
    channel = StreamingRefChannel(path)
    channel.publish_many(REFS[:3])
    queue = StreamingRefQueue(channel, poll_s=0.0)
    queue.ack(queue.get(2))
    sidecar = path.with_name("refs.log.consumed")
    sidecar.write_bytes(sidecar.read_bytes().replace(b" 2", b" 3"))
    with pytest.raises(LedgerError, match="start the trainer again"):
        channel.in_flight_remote()
    StreamingRefQueue(StreamingRefChannel(path), poll_s=0.0, skip_ids=set(IDS[:2]))
    assert channel.in_flight_remote() == 1


def test_skipped_refs_are_dropped_and_counted_consumed(path: Path) -> None:
    """in_flight_remote is exact from the construction of the new queue to the end."""
    writer = StreamingRefChannel(path)
    writer.publish_many(REFS)
    first = StreamingRefQueue(StreamingRefChannel(path), poll_s=0.0)
    first.ack(first.get(6))
    assert writer.in_flight_remote() == 2
    # The consumer dies; only two of its six samples were durable.
    queue = StreamingRefQueue(StreamingRefChannel(path), poll_s=0.0, skip_ids=set(IDS[:2]))
    assert writer.in_flight_remote() == 6
    writer.close()
    assert drain(queue) == IDS[2:]
    assert writer.consumed_remote() == 8
    assert writer.in_flight_remote() == 0


def test_second_copies_are_never_trained(path: Path) -> None:
    """A producer that published everything again repeats neither skipped nor new refs (hole B1)."""
    writer = StreamingRefChannel(path)
    writer.publish_many(REFS[:5])
    StreamingRefChannel(path).publish_many(REFS)
    writer.close()
    queue = StreamingRefQueue(StreamingRefChannel(path), poll_s=0.0, skip_ids=set(IDS[:3]))
    assert drain(queue) == IDS[3:]
    assert writer.in_flight_remote() == 0


def test_all_skipped_and_closed_terminates(path: Path) -> None:
    """A queue whose every ref is already trained ends instead of waiting."""
    writer = StreamingRefChannel(path)
    writer.publish_many(REFS[:3])
    writer.close()
    queue = StreamingRefQueue(StreamingRefChannel(path), poll_s=0.0, skip_ids=set(IDS))
    assert queue.get(1) == []
    assert writer.consumed_remote() == 3


def test_get_returns_the_tail_at_the_end_of_the_stream(path: Path) -> None:
    """The last batch may be short; no committed sample is thrown away (hole B20)."""
    writer = StreamingRefChannel(path)
    writer.publish_many(REFS[:5])
    writer.close()
    queue = StreamingRefQueue(StreamingRefChannel(path), poll_s=0.0)
    assert [len(queue.get(3)), len(queue.get(3)), len(queue.get(3))] == [3, 2, 0]


def test_get_waits_for_the_producer(path: Path) -> None:
    """A reader that is ahead waits until a record arrives, however long its poll interval."""
    queue = StreamingRefQueue(StreamingRefChannel(path), poll_s=60.0)
    taken: list[str] = []
    thread = threading.Thread(target=lambda: taken.extend(ref.sample_id for ref in queue.get(2)))
    thread.start()
    writer = StreamingRefChannel(path)
    writer.publish(REFS[0])
    writer.publish(REFS[1])
    thread.join(timeout=30.0)
    assert taken == IDS[:2]


def test_silence_is_an_error_after_the_idle_timeout(path: Path) -> None:
    """A dead producer that never closed the stream is noticed, with advice."""
    ticks = iter(range(1000))
    queue = StreamingRefQueue(
        StreamingRefChannel(path), poll_s=0.0, idle_timeout_s=5.0, clock=lambda: float(next(ticks))
    )
    with pytest.raises(TimeoutError, match="paceline produce"):
        queue.get(1)


def test_a_stop_request_takes_nothing(path: Path) -> None:
    """Asked to stop, the queue gives nothing out and says that this is not the end of the stream."""
    channel, stop = StreamingRefChannel(path), [True]
    channel.publish_many(REFS[:2])
    channel.close()
    queue = StreamingRefQueue(channel, poll_s=0.0, should_stop=lambda: stop[0])
    assert (queue.get(3), queue.ended) == ([], False)
    stop[0] = False
    assert (queue.get(3), queue.ended) == (REFS[:2], True)


def test_an_interrupted_queue_gives_out_what_is_whole(path: Path) -> None:
    """The writer vanished: whole batches are given out, the rest waits for a writer that comes back."""
    channel = StreamingRefChannel(path)
    channel.publish_many(REFS[:3])
    queue = StreamingRefQueue(channel, poll_s=0.0)
    queue.interrupt()
    assert [len(queue.get(2)), len(queue.get(2))] == [2, 0]
    channel.publish_many(REFS[3:4])
    queue.rearm()
    assert queue.get(2) == REFS[2:4]
    assert not queue.ended


def test_the_committed_log_is_the_same_interface(tmp_path: Path) -> None:
    """Over the metadata store: to commit is to publish, and in flight is what is not acked."""
    producer, consumer = SQLiteMetadataStore(tmp_path / "db"), SQLiteMetadataStore(tmp_path / "db")
    log = CommittedRefLog(producer)
    log.publish_many(REFS[:5])
    producer.record_train_ack(IDS[:2], global_step=1, optimizer_durable=True)
    queue = StreamingRefQueue(CommittedRefLog(consumer), poll_s=0.0, skip_ids=set(IDS[:2]))
    assert (log.consumed_remote(), log.in_flight_remote()) == (2, 3)
    log.close()
    assert drain(queue) == IDS[2:5]
    consumer.record_train_ack(IDS[2:5], global_step=2, optimizer_durable=False)
    assert log.in_flight_remote() == 0
    assert CommittedRefLog(consumer, start=4).poll() == REFS[4:5]


def test_a_replaced_producer_neither_closes_nor_reopens_the_log(tmp_path: Path) -> None:
    """The end of the stream is the current producer's to declare."""
    store = SQLiteMetadataStore(tmp_path / "db")
    log = CommittedRefLog(store, fence=DataFlowController("run0", metadata_store=store).take_role("producer"))
    DataFlowController("run0", metadata_store=store).take_role("producer")
    for change in (log.close, log.reopen):
        with pytest.raises(FencedError):
            change()
    assert not log.is_closed()


def test_reading_the_committed_log_needs_no_memory_of_it(tmp_path: Path) -> None:
    """The log cannot repeat a sample, so the queue keeps no list of what it gave out."""
    store = SQLiteMetadataStore(tmp_path / "db")
    log = CommittedRefLog(store)
    log.publish_many(REFS[:5])
    log.close()
    queue = StreamingRefQueue(log, poll_s=0.0)
    assert drain(queue) == IDS[:5]
    assert queue._seen is None
