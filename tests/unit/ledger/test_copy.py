"""A ledger moves between stores, whole, and back."""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from paceline.errors import ConfigError, LedgerError, LedgerMissingError, RunBusyError
from paceline.ledger.facts import LEDGER
from paceline.ledger.image import Movable, Row, Standing, copy_ledger
from paceline.ledger.locks import RoleLock
from paceline.ledger.moving import move_ledger
from paceline.ledger.place import opened
from paceline.ledger.records import Order
from paceline.ledger.settings import RedisSection, SqliteSection
from paceline.ledger.stores.redis import RedisLedger, ServerImage
from paceline.ledger.stores.redis.image import CHUNK, chunked
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.ledger.stores.sqlite.image import FileImage
from paceline.testing.ledger_calls import capture, producer_of
from paceline.testing.ledger_machine import LedgerTwins
from paceline.testing.ledger_moves import LedgerMoves, Picks
from paceline.testing.ledger_plays import random_script
from paceline.testing.ledger_subjects import RedisSubject, SQLiteSubject
from paceline.testing.valkey_server import ValkeyServer

OWN = {LEDGER: {"identity": "5eed", "replaces": [], "folder": "here"}}


def play(moves: LedgerMoves, rng: random.Random, count: int) -> None:
    for name, picks in random_script(rng, count):
        getattr(moves, name)(Picks(picks))


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("seed", range(2))
def test_a_run_goes_on_with_the_copy_of_its_ledger(
    seed: int, order: Order, tmp_path: Path, valkey: ValkeyServer
) -> None:
    """From a file to a server and back to a file, in the middle of everything; compared at every step."""
    rng = random.Random(seed)
    first, server, last = (
        SQLiteSubject(tmp_path / "first.db"),
        RedisSubject(valkey),
        SQLiteSubject(tmp_path / "last.db"),
    )
    for subject in (first, server, last):
        subject.block_size = 2
    on_server = ServerImage(valkey.url, server.name)
    twins = LedgerTwins(first)
    moves = LedgerMoves(twins, order)
    play(moves, rng, 90)
    for source, target, subject in (
        (FileImage(first.path), on_server, server),
        (on_server, FileImage(last.path), last),
    ):
        copied = copy_ledger(source, target)
        assert copied.count == sum(1 for _ in target.rows())
        twins.move_to(subject)
        moves.begin_anew()
        play(moves, rng, 30)
    twins.close()


def file_of(path: Path, facts: dict[str, Any] = OWN) -> FileImage:
    """A ledger with these facts and a few samples."""
    with closing(SQLiteLedger(path)) as ledger:
        ledger.set_facts(None, facts)
        capture(producer_of(ledger), 0, 1)
    return FileImage(path)


@pytest.fixture
def target(valkey: ValkeyServer) -> ServerImage:
    return ServerImage(valkey.url, uuid.uuid4().hex)


def test_a_copy_that_is_not_whole_is_not_found(tmp_path: Path, target: ServerImage) -> None:
    """Its maker was killed; the next copy begins anew."""
    source = file_of(tmp_path / "ledger.db")
    rows = list(source.rows())
    target.write(rows[:-1], None)
    assert target.standing() is None
    with pytest.raises(LedgerMissingError):
        list(target.rows())
    with pytest.raises(LedgerMissingError, match="not whole"):
        RedisLedger(target._url, target._name, durability="head")
    copy_ledger(source, target)
    assert list(target.rows()) == rows


def test_a_long_archive_goes_over_in_pieces() -> None:
    """One of its rows holds thousands of visits; the server unpacks a whole call in memory."""
    row = ("archive", [[1, 0, [[0, "id", 0, 1]] * (CHUNK // 2)]])
    assert [len(chunk) for chunk in chunked([row] * 5)] == [2, 2, 1]


@pytest.mark.parametrize("direction", ["to a server", "to a file"])
def test_only_an_older_copy_of_the_same_ledger_is_replaced(
    direction: str, tmp_path: Path, target: ServerImage
) -> None:
    """Not another ledger, and not one that knows more."""
    source, other = file_of(tmp_path / "ledger.db"), file_of(tmp_path / "other.db", {"a": 1})
    place: Movable = target if direction == "to a server" else FileImage(tmp_path / "copy.db")
    copy_ledger(source, place)
    with closing(SQLiteLedger(source.path)) as ledger:
        ledger.set_facts(None, {"more": 1})
    copy_ledger(source, place)
    assert list(place.rows()) == list(source.rows())
    newer = FileImage(tmp_path / "newer.db")
    copy_ledger(place, newer)
    with closing(SQLiteLedger(newer.path)) as ledger:
        ledger.set_facts(None, {"more": 2})
    copy_ledger(newer, place)
    with pytest.raises(LedgerError, match="a newer copy of this ledger"):
        copy_ledger(source, place)
    with pytest.raises(LedgerError, match="another ledger"):
        copy_ledger(other, place)
    assert list(place.rows()) == list(newer.rows())


@pytest.mark.parametrize("direction", ["to a server", "to a file"])
def test_a_ledger_that_appears_meanwhile_is_not_replaced(
    direction: str, tmp_path: Path, target: ServerImage
) -> None:
    """A run may begin there after the copy has looked, or another copy be made."""
    source, path = file_of(tmp_path / "ledger.db"), tmp_path / "copy.db"
    rows = list(source.rows())
    place: Movable = target if direction == "to a server" else FileImage(path)
    if direction == "to a server":
        RedisLedger(target._url, target._name, durability="head").close()
    else:
        place.write(rows, None)
        SQLiteLedger(path).close()
    with pytest.raises(LedgerError, match="appeared or changed"):
        place.write(rows, None) if direction == "to a server" else place.finish()
    standing = place.standing()
    assert standing is not None
    assert standing.facts == {}


def test_of_two_copies_to_one_place_the_later_one_counts(tmp_path: Path, target: ServerImage) -> None:
    rows = list(file_of(tmp_path / "ledger.db").rows())
    target.write(rows, None)
    later = ServerImage(target._url, target._name)
    later.write(rows, None)
    with pytest.raises(LedgerError, match="appeared or changed"):
        target.finish()
    later.finish()
    assert list(target.rows()) == rows


class Careless(FileImage):
    """Loses the last row that it is given."""

    def write(self, rows: Iterable[Row], over: Standing | None) -> None:
        super().write(list(rows)[:-1], over)


class Busy(FileImage):
    """A run goes on while it is copied."""

    def rows(self) -> Iterator[Row]:
        yield from super().rows()
        with closing(SQLiteLedger(self.path)) as ledger:
            ledger.set_facts(None, {"more": 1})


def test_a_copy_that_differs_is_not_used(tmp_path: Path) -> None:
    """A store that loses a row, or a run that is still going on."""
    source = file_of(tmp_path / "ledger.db")
    for one, other in (
        (source, Careless(tmp_path / "copy.db")),
        (Busy(source.path), FileImage(tmp_path / "copy.db")),
    ):
        with pytest.raises(LedgerError, match="The copy is not used"):
            copy_ledger(one, other)
        assert other.standing() is None


def test_there_must_be_a_ledger_to_copy(tmp_path: Path, target: ServerImage) -> None:
    with pytest.raises(LedgerMissingError):
        copy_ledger(FileImage(tmp_path / "ledger.db"), target)
    with pytest.raises(LedgerMissingError):
        copy_ledger(target, FileImage(tmp_path / "ledger.db"))
    assert list(tmp_path.iterdir()) == []


# -- a run's ledger ----------------------------------------------------------------------------


def begun(directory: Path) -> str:
    """A run's folder with a ledger in a file; returns the ledger's identity."""
    with closing(opened(SqliteSection(), directory, "run0")) as ledger:
        capture(producer_of(ledger), 0, 1)
        return str(ledger.facts()[LEDGER]["identity"])


@pytest.fixture
def url(valkey: ValkeyServer) -> Iterator[str]:
    """The address of a database that is empty before and after the test."""
    yield valkey.url + "?db=1"
    with valkey.client() as client:
        client.execute_command("SELECT", 1)
        client.flushdb()


def test_a_runs_ledger_moves_to_a_server_and_back(tmp_path: Path, url: str) -> None:
    """The folder knows where it is, and the one that was left is refused."""
    identity = begun(tmp_path)
    assert move_ledger(tmp_path, url).store == "redis"
    with pytest.raises(LedgerError, match=r"run file says sqlite"):
        opened(SqliteSection(), tmp_path, "run0")
    with closing(opened(RedisSection(url=url), tmp_path, "run0")) as ledger:
        assert ledger.facts()[LEDGER]["identity"] == identity
        ledger.set_facts(None, {"more": 1})
    move_ledger(tmp_path, "sqlite")
    with closing(opened(SqliteSection(), tmp_path, "run0")) as ledger:
        assert (ledger.facts()["more"], ledger.snapshot().committed) == (1, 2)


def test_a_ledger_is_not_copied_onto_itself(tmp_path: Path, url: str) -> None:
    """Its place has many names: other host names, sockets, a port or a database that is the usual one."""
    begun(tmp_path)
    move_ledger(tmp_path, url)
    image, same = ServerImage(url, "run0"), url.replace("?db=1", "?db=01")
    before = list(image.rows())
    with pytest.raises(ConfigError, match="the ledger's own, by another name"):
        move_ledger(tmp_path, same)
    assert list(image.rows()) == before
    file, linked = tmp_path / "ledger.db", tmp_path / "linked.db"
    linked.symlink_to(file)
    with pytest.raises(ConfigError, match="the ledger's own, by another name"):
        copy_ledger(FileImage(file), FileImage(linked))


def test_a_running_runs_ledger_is_not_copied(tmp_path: Path, valkey: ValkeyServer) -> None:
    begun(tmp_path)
    lock = RoleLock(tmp_path, "consumer")
    with pytest.raises(RunBusyError):
        move_ledger(tmp_path, valkey.url)
    lock.release()
    assert ServerImage(valkey.url, "run0").standing() is None


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("sqlite", "where the ledger is already"),
        ("http://user:s3cret@host", "neither 'sqlite' nor a server's address"),
        ("redis://user:s3cret@host:port", "neither 'sqlite' nor a server's address"),
    ],
)
def test_a_wrong_place_is_refused_and_no_password_shown(to: str, message: str, tmp_path: Path) -> None:
    begun(tmp_path)
    with pytest.raises(ConfigError, match=message) as caught:
        move_ledger(tmp_path, to)
    assert "s3cret" not in str(caught.value)
