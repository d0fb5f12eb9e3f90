"""Rolling forward asks of many unknown samples whether they are archived: the archive is read once."""

from __future__ import annotations

import lzma
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from paceline.errors import IllegalTransitionError
from paceline.ledger.image import Movable, Row
from paceline.ledger.ledger import Ledger
from paceline.ledger.records import CONSUMER, CheckpointRecord, TrainedSample, TrainedStep, chain_of
from paceline.ledger.stores.redis import RedisLedger, ServerImage
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.ledger.stores.sqlite.image import FileImage
from paceline.testing.ledger_calls import id_of
from paceline.testing.valkey_server import ValkeyServer

BLOCKS = 3


def rows() -> Iterator[Row]:
    """A ledger in ordinal order whose steps are all archived: one block, step and sample after the other."""
    yield "run", [9, "ordinal", 100, BLOCKS, 0, BLOCKS, 99, BLOCKS, None, BLOCKS, BLOCKS, BLOCKS]
    yield "source", [0, 100, "100 prompts"]
    yield "checkpoint", [BLOCKS, "old", "digest", "", BLOCKS]
    for number in range(BLOCKS):
        yield "archive", [[number + 1, 0, [[number, id_of(number), number, 1]]]]


def write(image: Movable) -> None:
    image.write(rows(), over=None)
    image.finish()


def adopt(ledger: Ledger, *visits: TrainedSample) -> None:
    """Roll forward to a checkpoint that one step with these visits made."""
    lineage = [TrainedStep(BLOCKS + 1, 0, visits)]
    chain = chain_of("", [trained.plan for trained in lineage])
    checkpoint = CheckpointRecord(BLOCKS + 1, "new", "digest", chain, BLOCKS + len(visits))
    ledger.head(ledger.acquire(CONSUMER, "me").call(1), checkpoint, lineage)


UNKNOWN = tuple(TrainedSample(number, id_of(number), number, True) for number in range(BLOCKS, 9))
ARCHIVED = TrainedSample(BLOCKS, id_of(0), BLOCKS, True)  # at another place than it had


def test_on_a_server(valkey: ValkeyServer) -> None:
    name = uuid.uuid4().hex
    write(ServerImage(valkey.url, name))
    with closing(RedisLedger(valkey.url, name)) as ledger, valkey.client() as client:
        with pytest.raises(IllegalTransitionError, match="trained for the last time before"):
            adopt(ledger, ARCHIVED)
        client.config_resetstat()
        adopt(ledger, *UNKNOWN)
        assert client.info("commandstats")["cmdstat_hget"]["calls"] < BLOCKS * len(UNKNOWN)
        assert ledger.snapshot().committed == 9


def test_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(FileImage(tmp_path / "ledger.db"))
    with closing(SQLiteLedger(tmp_path / "ledger.db")) as ledger:
        with pytest.raises(IllegalTransitionError, match="trained for the last time before"):
            adopt(ledger, ARCHIVED)
        decompress, read = lzma.decompress, []
        monkeypatch.setattr(lzma, "decompress", lambda data: read.append(data) or decompress(data))
        adopt(ledger, *UNKNOWN)
        assert len(read) == BLOCKS
        assert ledger.snapshot().committed == 9
