"""What a server must be like, who may use it, and what of it is never shown."""

from __future__ import annotations

import re
import traceback
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from paceline.errors import ConfigError, PacelineError, SchemaError, UnknownResultError
from paceline.ledger.stores.redis import RedisLedger, RedisView, address_of, calls, requirements
from paceline.ledger.stores.redis.address import Address
from paceline.ledger.stores.redis.scripts import CHANGES, READING, _joined, keys_of
from paceline.testing.ledger_calls import Training, capture, consumer_of, producer_of
from paceline.testing.valkey_server import ValkeyServer

PASSWORD = "s3cr%40t"  # noqa: S105 (of a server of these tests; "s3cr@t" in a URL)


@pytest.fixture
def own(tmp_path: Path) -> Iterator[ValkeyServer]:
    """A server of this test, whose settings it may change."""
    server = ValkeyServer(tmp_path)
    yield server
    server.stop()


def url_of(server: ValkeyServer, user: str) -> str:
    return server.url.replace("unix://", f"unix://{user}:{PASSWORD}@")


def let_in(server: ValkeyServer, user: str, *rules: str) -> str:
    """A user with these rights; returns the URL with which it logs in."""
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", user, "on", ">s3cr@t", "~*", *rules)
    return url_of(server, user)


def waited_for(server: ValkeyServer) -> int:
    """How often anybody has waited for the server's disk."""
    with server.client() as client:
        return int(client.info("commandstats").get("cmdstat_waitaof", {"calls": 0})["calls"])


# -- durability --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "value", "durability"),
    [
        ("maxmemory-policy", "allkeys-lru", "head"),
        ("maxmemory-policy", "volatile-ttl", "head"),
        ("appendonly", "no", "head"),
        ("appendfsync", "no", "head"),
        ("appendfsync", "everysec", "full"),
        ("no-appendfsync-on-rewrite", "yes", "head"),
    ],
)
def test_a_server_that_could_lose_the_ledger_is_refused(
    own: ValkeyServer, setting: str, value: str, durability: requirements.Durability
) -> None:
    """With the setting to change; and nothing is created on it."""
    with own.client() as client:
        client.config_set(setting, value)
        with pytest.raises(ConfigError, match=f"CONFIG SET {setting}"):
            RedisLedger(own.url, "run0", durability=durability)
        assert client.dbsize() == 0


def test_an_old_server_is_refused(own: ValkeyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "FLOOR", (99, 0))
    with pytest.raises(SchemaError, match="upgrade the server"):
        RedisLedger(own.url, "run0", durability="head")


def test_what_durable_weights_depend_on_waits_for_the_disk(valkey: ValkeyServer) -> None:
    """A commit does not; a head does; with durability "full" every change does."""
    ledger = RedisLedger(valkey.url, uuid.uuid4().hex, durability="head")
    producer, training = producer_of(ledger), Training(consumer_of(ledger))
    before = waited_for(valkey)
    capture(producer, 0)
    training.step(0)
    assert waited_for(valkey) == before
    training.checkpoint()
    assert waited_for(valkey) == before + 1
    ledger.close()
    full = RedisLedger(valkey.url, uuid.uuid4().hex, durability="full")
    before = waited_for(valkey)
    full.set_facts(None, {"a": 1})
    assert waited_for(valkey) == before + 1
    full.close()


def test_a_change_that_does_not_reach_the_disk_has_no_known_result(
    own: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The repetition waits for it again, on whatever connection."""
    ledger = RedisLedger(own.url, "run0", durability="head")
    consumer = ledger.acquire("consumer", "me").call(1)
    monkeypatch.setattr(calls, "SYNC_S", 0.05)
    with own.client() as client:
        client.config_set("appendfsync", "no")
        for _ in range(2):
            with pytest.raises(UnknownResultError, match="did not reach the server's disk"):
                ledger.quarantine(consumer, [], step=None, reason="")
        client.config_set("appendfsync", "always")
    monkeypatch.setattr(calls, "SYNC_S", 20.0)
    before = ledger.lsn()
    ledger.quarantine(consumer, [], step=None, reason="")
    assert ledger.lsn() == before
    ledger.close()


# -- what lies there already -------------------------------------------------------------------


def test_a_newer_versions_ledger_is_refused(valkey: ValkeyServer) -> None:
    """At the opening, and by a process that has it open."""
    name = uuid.uuid4().hex
    ledger = RedisLedger(valkey.url, name, durability="head")
    with valkey.client() as client:
        client.hset(keys_of(name)[0], "schema", 2)
    for call in (ledger.lsn, lambda: ledger.set_facts(None, {}), lambda: RedisLedger(valkey.url, name)):
        with pytest.raises(SchemaError, match=r"schema version 2.*upgrade paceline"):
            call()
    ledger.close()


def test_keys_of_another_program_are_left_alone(valkey: ValkeyServer) -> None:
    name = uuid.uuid4().hex
    with valkey.client() as client:
        client.set(keys_of(name)[0], "something else")
        with pytest.raises(SchemaError, match="another name"):
            RedisLedger(valkey.url, name, durability="head")
        assert client.get(keys_of(name)[0]) == b"something else"


@pytest.mark.parametrize("name", ["", "a b", "{x}", "a:b", "x" * 201])
def test_a_name_that_would_change_the_keys_is_refused(valkey: ValkeyServer, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be a ledger's name"):
        RedisLedger(valkey.url, name, durability="head")


# -- users and secrets -------------------------------------------------------------------------


def test_a_user_who_may_only_read_can_look(own: ValkeyServer) -> None:
    """The view creates nothing, and its user could not."""
    ledger = RedisLedger(own.url, "run0", durability="head")
    capture(producer_of(ledger), 0, 1)
    url = let_in(own, "viewer", "-@all", "+@read", "+@connection", "+eval_ro", "+evalsha_ro")
    view = RedisView(url, "run0")
    assert view.snapshot() == ledger.snapshot()
    assert view.find() == ledger.find()
    with own.client() as client:
        before = client.dbsize()
        with pytest.raises(ConfigError, match="There is no ledger other"):
            RedisView(url, "other")
        assert client.dbsize() == before
    with pytest.raises(ConfigError, match="INFO"):
        RedisLedger(url, "run0", durability="head")
    view.close()
    ledger.close()


def test_a_server_that_keeps_its_settings_to_itself_is_taken_and_told(own: ValkeyServer) -> None:
    """Whether a checkpoint is on the disk is still asked each time (WAITAOF)."""
    ledger = RedisLedger(let_in(own, "tenant", "+@all", "-config"), "run0", durability="full")
    assert "appendfsync" in ledger.unverified[0]
    ledger.close()


@pytest.mark.parametrize(
    ("rules", "command"), [(["+@all", "-waitaof"], "WAITAOF"), (["+@all", "-evalsha"], "EVALSHA")]
)
def test_a_missing_right_is_named(own: ValkeyServer, rules: list[str], command: str) -> None:
    with pytest.raises(ConfigError, match=command):
        RedisLedger(let_in(own, "tenant", *rules), "run0", durability="head")


def test_neither_user_nor_password_is_ever_shown(own: ValkeyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in errors, their causes, or the text of what is open; the environment may hold them."""
    let_in(own, "tenant", "+@all", "-config", "-waitaof")
    monkeypatch.setenv("PACELINE_REDIS_USER", "tenant")
    monkeypatch.setenv("PACELINE_REDIS_PASSWORD", "s3cr@t")
    attempts = [
        (own.url, "WAITAOF"),
        (url_of(own, "stranger"), "refuses the login"),
        (url_of(own, "tenant") + "?db=99", "refused a call"),
        (f"redis://tenant:{PASSWORD}@localhost:notaport/0", "cannot be read"),
        (f"tenant:{PASSWORD}@localhost", "cannot be read"),
        (f"redis://tenant:{PASSWORD}@127.0.0.1:1/0", "did not answer"),
    ]
    for url, message in attempts:
        with pytest.raises(PacelineError, match=message) as caught:
            RedisLedger(url, "run0", durability="head", patience_s=0.05)
        shown = "".join(traceback.format_exception(caught.value)) + repr(vars(caught.value))
        assert not re.search("s3cr|stranger", shown), shown
        assert "tenant" not in str(caught.value)
    assert "s3cr" not in repr(Address(url_of(own, "tenant")))
    assert address_of("rediss://a:b@host/2?ssl_ca_certs=x") == "rediss://host:6379/2"
    assert address_of("redis://host?db=2") == "redis://host:6379/2", "the database in use"
    assert address_of("unix:///run/a.sock?db=2") == "unix:///run/a.sock?db=2"


@pytest.mark.parametrize("parts", [CHANGES, READING])
def test_no_script_reads_a_clock_or_draws_a_number(parts: tuple[str, ...]) -> None:
    """A server's clock may jump; what a call does follows from the ledger and from what it is told."""
    assert not re.search(
        r"""['"](TIME|RANDOMKEY|\w*EXPIRE\w*)|\bos\.|math\.random""", _joined("#!lua", parts)
    )
