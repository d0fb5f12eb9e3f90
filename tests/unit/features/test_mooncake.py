"""The store on Mooncake, on a stand-in of its master: what it makes of losses, waits and kills."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from paceline.crashpoints import watch
from paceline.errors import (
    ConfigError,
    FeatureCorruptError,
    FeatureMissingError,
    StoreError,
    StoreFullError,
)
from paceline.features.settings import MooncakeSection
from paceline.features.stores.mooncake import link as link_module
from paceline.features.stores.mooncake.link import Link, own_address, refusal_of
from paceline.features.stores.mooncake.refusals import no_client, no_package
from paceline.features.stores.mooncake.store import BLIND_MAX, IN_FLIGHT, MooncakeFeatureStore
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.loader.read_ahead import ReadAhead
from paceline.testing.feature_store_suite import MIB, assert_same, bulk, feature_ref, features
from paceline.testing.mooncake_stand_in import ReplicateConfig, StandInClient, StandInMaster
from paceline.testing.small_run import SmallRun
from paceline.training.checkpoint_writer import InlineExecutor
from paceline.types import SampleRef


class Clock:
    """Time passes only where somebody sleeps."""

    def __init__(self) -> None:
        self.now, self.on_sleep = 0.0, lambda: None

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.on_sleep()


class Hosts:
    """A master, and stores of one run on clients by name."""

    def __init__(self) -> None:
        self.master, self.clock = StandInMaster(), Clock()
        self.clients: dict[str, StandInClient] = {}

    def link(self, name: str, segment_bytes: int = 0) -> Link:
        client = self.clients[name] = StandInClient(self.master, name, segment_bytes)
        config = ReplicateConfig(with_hard_pin=True, preferred_segment=name)
        return Link(client, config, "master:50051", patience_s=5.0, sleep=self.clock.sleep, clock=self.clock)

    def writer(self, name: str = "a", segment_bytes: int = 16 * MIB) -> MooncakeFeatureStore:
        return MooncakeFeatureStore(self.link(name, segment_bytes), "run-0", budget_bytes=8 * MIB, owner=True)

    def reader(self) -> MooncakeFeatureStore:
        return MooncakeFeatureStore(self.link("reader"), "run-0", budget_bytes=8 * MIB, owner=False)


@pytest.fixture
def hosts() -> Hosts:
    return Hosts()


def put(store: MooncakeFeatureStore, number: int, generation: int) -> SampleRef:
    return feature_ref(f"s{number}", store.put(f"s{number}", features(number), generation=generation))


def is_missed(store: MooncakeFeatureStore, ref: SampleRef) -> bool:
    try:
        store.get(ref)
    except FeatureMissingError:
        return True
    return False


# -- misses --------------------------------------------------------------------------------------


def test_what_a_restarted_master_has_forgotten_is_a_miss_and_can_be_put_again(hosts: Hosts) -> None:
    """Under a new generation, as the ledger gives it; nothing else is asked of anybody."""
    writer, reader = hosts.writer(), hosts.reader()
    ref = put(writer, 1, 4)
    assert_same(reader.get(ref), features(1))
    hosts.master.kill()
    hosts.master.start()
    assert is_missed(reader, ref)
    writer.tell()
    assert_same(reader.get(put(writer, 1, 5)), features(1))
    assert is_missed(reader, ref)


def test_samples_in_the_memory_of_a_dead_producer_are_misses(hosts: Hosts) -> None:
    """At once, and also when the master knows; those of the other producer can be read."""
    one, other, reader = hosts.writer("a"), hosts.writer("b"), hosts.reader()
    lost, kept = put(one, 1, 4), put(other, 2, 5)
    hosts.clients["a"].kill()
    assert is_missed(reader, lost)
    hosts.master.expire()
    assert is_missed(reader, lost)
    assert_same(reader.get(kept), features(2))


def test_a_put_that_meets_dead_memory_is_tried_again_until_the_master_knows(hosts: Hosts) -> None:
    """The dead producer's memory would be the first choice."""
    writer, reader = hosts.writer("b"), hosts.reader()
    hosts.link("a", 16 * MIB)
    hosts.master.segments = {"a": 16 * MIB}
    hosts.clients["a"].kill()

    def expire() -> None:
        hosts.master.expire()
        hosts.master.segments["b"] = 16 * MIB

    hosts.clock.on_sleep = expire
    assert_same(reader.get(put(writer, 1, 4)), features(1))
    assert hosts.clock.now > 0


def test_nothing_is_evicted_because_everything_is_pinned(hosts: Hosts) -> None:
    """Memory above the watermark: the objects of others go, ours stay."""
    writer, reader = hosts.writer(segment_bytes=MIB), hosts.reader()
    other = bytes(MIB // 4)
    hosts.clients["a"].upsert_from("theirs", *_memory(other), ReplicateConfig())
    refs = [feature_ref(f"s{n}", writer.put(f"s{n}", bulk(n), generation=n + 1)) for n in range(6)]
    refs.append(feature_ref("s6", writer.put("s6", bulk(6, MIB // 8), generation=7)))
    for number, ref in enumerate(refs):
        assert_same(reader.get(ref), bulk(number))
    assert "theirs" not in hosts.master.objects


def test_an_object_of_another_length_is_damaged(hosts: Hosts) -> None:
    writer, reader = hosts.writer(), hosts.reader()
    ref = put(writer, 1, 4)
    [found] = hosts.master.objects.values()
    found.content = found.content[:-1]
    with pytest.raises(FeatureCorruptError, match="instead of"):
        reader.get(ref)
    found.content = found.content + bytes(5)
    with pytest.raises(FeatureMissingError, match="code -600"):
        reader.get(ref)


# -- the right master ----------------------------------------------------------------------------


def test_a_reader_of_the_wrong_master_says_so_after_some_captures(hosts: Hosts) -> None:
    """Each miss is captured again, so without this the run would go on like that for ever."""
    elsewhere, reader = Hosts().writer(), hosts.reader()
    for generation in range(1, BLIND_MAX):
        ref = put(elsewhere, 1, generation)
        assert is_missed(reader, ref)
        assert is_missed(reader, ref), "looking twice at one capture says nothing new"
    ref = put(elsewhere, 1, BLIND_MAX)
    with pytest.raises(
        StoreError, match=f"captured {BLIND_MAX} times and are not at the Mooncake master master:50051"
    ):
        reader.get(ref)


def test_misses_at_the_right_master_stay_misses(hosts: Hosts) -> None:
    """A producer is known to it, so whatever was lost is captured again."""
    writer, reader = hosts.writer(), hosts.reader()
    writer.tell()
    for generation in range(1, 3 * BLIND_MAX):
        ref = put(writer, 1, generation)
        writer.free([("s1", generation)])
        assert is_missed(reader, ref)


def test_a_producer_tells_a_restarted_master_of_itself_again(hosts: Hosts) -> None:
    writer = hosts.writer()
    writer.tell()
    hosts.master.kill()
    writer.tell()
    hosts.master.start()
    assert hosts.master.objects == {}
    writer.tell()
    assert list(hosts.master.objects) == ["run-0/producer"]
    assert hosts.master.objects["run-0/producer"].pinned


# -- waiting -------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["get", "put", "free"])
def test_a_master_that_is_away_is_waited_for(hosts: Hosts, verb: str) -> None:
    """As long as the patience lasts; then the error blames no sample, and tells how to start it."""
    writer, reader = hosts.writer(), hosts.reader()
    ref = put(writer, 1, 4)
    calls: dict[str, Callable[[], object]] = {
        "get": lambda: reader.get(ref),
        "put": lambda: put(writer, 2, 5),
        "free": lambda: writer.free([("s1", 4)]),
    }
    hosts.master.kill()
    hosts.clock.on_sleep = lambda: setattr(hosts.master, "is_up", True)
    calls[verb]()
    hosts.clock.on_sleep = lambda: None
    hosts.master.kill()
    with pytest.raises(StoreError, match="did not answer for 5 s") as caught:
        calls[verb]()
    assert not isinstance(caught.value, FeatureMissingError | StoreFullError)
    assert "`mooncake_master --rpc_port=50051`" in caught.value.next


def test_a_master_that_stays_away_is_waited_for_once(hosts: Hosts) -> None:
    """What was read ahead of its step in vain is read again by the step, which waits no second time."""
    writer, reader = hosts.writer(), hosts.reader()
    refs = [put(writer, number, number + 1) for number in range(2)]
    hosts.master.kill()
    ahead = ReadAhead(reader.get, InlineExecutor(), reader.get_many)
    ahead.start(refs)
    with pytest.raises(StoreError, match="did not answer for 5 s"):
        ahead.get(refs[0])
    assert hosts.clock.now == 5.0
    hosts.master.is_up = True
    assert_same(ahead.get(refs[0]), features(0))
    hosts.master.kill()
    with pytest.raises(StoreError, match="did not answer for 5 s"):
        ahead.get(refs[0])
    assert hosts.clock.now == 10.0, "it has answered between"


def test_memory_without_room_is_waited_for(hosts: Hosts) -> None:
    """The consumer may free some; else the error says which settings to change, and nothing is stored."""
    writer = hosts.writer(segment_bytes=MIB)
    for number in range(8):
        writer.put(f"s{number}", bulk(number), generation=number + 1)
    with pytest.raises(StoreFullError, match=r"had room for 131072 bytes .* for 5 s") as caught:
        writer.put("s8", bulk(8), generation=9)
    assert "features.segment_mib" in caught.value.next
    assert len(hosts.master.objects) == 8
    hosts.clock.on_sleep = lambda: writer.free([("s0", 1)])
    writer.put("s8", bulk(8), generation=9)


def test_a_call_that_mooncake_refuses_is_not_repeated(hosts: Hosts) -> None:
    link = hosts.link("a", MIB)
    with pytest.raises(StoreError, match=r"cannot store  \(code -600\)"):
        link.put("", *_memory(b"x"))
    assert hosts.clock.now == 0


def test_a_closed_store_is_not_called(hosts: Hosts) -> None:
    """Mooncake's client would end the process."""
    writer = hosts.writer()
    ref = put(writer, 1, 4)
    writer.close()
    writer.close()
    for call in (lambda: put(writer, 1, 4), lambda: writer.get(ref), writer.tell):
        with pytest.raises(StoreError, match="was closed by this process"):
            call()
    assert hosts.master.objects == {}, "what lay in its memory went with it"


# -- kills in the middle -------------------------------------------------------------------------


def test_a_master_that_dies_while_bytes_are_on_their_way(hosts: Hosts) -> None:
    """The put is repeated, and its sample is there once."""
    writer, reader, deaths = hosts.writer(), hosts.reader(), [1]

    def die() -> None:
        if deaths:
            deaths.pop()
            hosts.master.kill()
            hosts.clock.on_sleep = hosts.master.start

    hosts.clients["a"].on_transfer = die
    assert_same(reader.get(put(writer, 1, 4)), features(1))
    assert len(hosts.master.objects) == 1


def test_a_producer_that_dies_before_its_put_leaves_nothing(hosts: Hosts) -> None:
    writer = hosts.writer()

    def die(point: str) -> None:
        raise KeyboardInterrupt(point)

    watch(die)
    try:
        with pytest.raises(KeyboardInterrupt, match=r"features\.put\.before_seal"):
            put(writer, 1, 4)
    finally:
        watch(None)
    assert hosts.master.objects == {}


@pytest.mark.parametrize("dies_at", [1, 2, 4, 6])
def test_a_producer_that_dies_within_a_group_leaves_what_its_successor_removes(
    hosts: Hosts, tmp_path: Path, dies_at: int
) -> None:
    """Groups of four: what was put before it died has no commit, unless its whole group has."""
    reached = 0

    def die(point: str) -> None:
        nonlocal reached
        reached += point == "features.put.before_seal"
        if reached == dies_at:
            raise KeyboardInterrupt

    watch(die)
    try:
        with pytest.raises(KeyboardInterrupt):
            SmallRun(tmp_path, features=hosts.writer("a")).producer()[1]()
    finally:
        watch(None)
    assert len(hosts.master.objects) == dies_at - 1
    assert len(SQLiteLedger(tmp_path / "ledger.db").find()) == (dies_at - 1) // 4 * 4

    SmallRun(tmp_path, features=hosts.writer("b")).producer()[1]()

    refs = [record.ref for record in SQLiteLedger(tmp_path / "ledger.db").find().values()]
    assert (len(refs), len(hosts.master.objects)) == (14, 14)
    assert all(isinstance(sample, dict) for sample in hosts.reader().get_many(refs))


def test_what_is_being_written_when_it_is_freed_is_removed_later(hosts: Hosts) -> None:
    """A producer that was taken for dead may finish its object after the others have freed it."""
    zombie, other = hosts.writer("a"), hosts.writer("b")
    hosts.clients["a"].on_transfer = lambda: other.free([("s1", 4)])
    put(zombie, 1, 4)
    assert len(hosts.master.objects) == 1
    other.tell()
    assert list(hosts.master.objects) == ["run-0/producer"]


@pytest.mark.parametrize("then", ["free", "close", "destroy"])
def test_a_consumer_removes_later_what_was_being_written_when_it_freed_it(hosts: Hosts, then: str) -> None:
    """It tells of nothing and so has no thread: the next time that it frees something, or at its end."""
    zombie, consumer = hosts.writer("a"), hosts.reader()
    other = put(zombie, 2, 5)
    hosts.clients["a"].on_transfer = lambda: consumer.free([("s1", 4)])
    put(zombie, 1, 4)
    hosts.clients["a"].on_transfer = lambda: None
    assert len(hosts.master.objects) == 2
    if then == "free":
        consumer.free([("s2", 5)])
    elif then == "close":
        zombie.free([("s2", 5)])
        consumer.close()
    else:
        consumer.destroy()
    assert hosts.master.objects == {}
    assert is_missed(hosts.reader(), other)


def test_keys_that_stay_half_written_are_tried_at_each_free_and_are_not_remembered_without_bound(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The object of a producer that died in the middle stays half-written until the master gives it up."""
    monkeypatch.setattr("paceline.features.stores.mooncake.store.LATER_MAX", 3)
    writer, consumer = hosts.writer(), hosts.reader()
    for number in range(5):
        put(writer, number, number + 1)
    for one in hosts.master.objects.values():
        one.whole = False
    for number in range(5):
        consumer.free([(f"s{number}", number + 1)])
    assert len(hosts.master.objects) == 5
    assert len(consumer._later) == 3
    for one in hosts.master.objects.values():
        one.whole = True
    consumer.free([])
    assert (len(hosts.master.objects), consumer._later) == (2, {})


def test_a_half_written_object_of_a_dead_producer_gives_way(hosts: Hosts) -> None:
    """Mooncake's plain put would answer that all is well, and store nothing."""
    writer, reader = hosts.writer("b"), hosts.reader()
    ref = put(writer, 1, 4)
    [found] = hosts.master.objects.values()
    found.whole = False
    assert is_missed(reader, ref)
    again = MooncakeFeatureStore(hosts.link("c", 16 * MIB), "run-0", budget_bytes=8 * MIB, owner=True)
    assert_same(reader.get(put(again, 1, 4)), features(1))


# -- many at a time ------------------------------------------------------------------------------


def test_many_samples_are_read_into_memory_of_the_callers(hosts: Hosts) -> None:
    """Some at a time; nothing is copied, and the next call takes the memory again."""
    writer, reader = hosts.writer(), hosts.reader()
    refs = [put(writer, number, number + 1) for number in range(2 * IN_FLIGHT + 1)]
    into = reader.buffer(MIB)
    found = reader.get_many(refs, into=into)
    for number, sample in enumerate(found):
        assert isinstance(sample, dict)
        assert_same(sample, features(number))
    first = found[0]
    assert isinstance(first, dict)
    assert into.address <= first["aux_hidden_states"].data_ptr() < into.address + MIB
    reader.get_many(refs[::-1], into=into)
    assert not torch.equal(first["last_hidden_states"], features(0)["last_hidden_states"])
    with pytest.raises(ValueError, match="do not fit into 64"):
        reader.get_many(refs, into=reader.buffer(64))
    for number, sample in enumerate(reader.get_many(refs)):
        assert isinstance(sample, dict)
        assert_same(sample, features(number))
    assert reader.get_many([]) == []


def test_one_of_many_that_cannot_be_read_stands_in_the_place_of_its_sample(hosts: Hosts) -> None:
    writer, reader = hosts.writer(), hosts.reader()
    writer.tell()
    refs = [put(writer, number, number + 1) for number in range(4)]
    writer.free([("s1", 2)])
    key = next(key for key in hosts.master.objects if key.startswith("run-0/3-"))
    hosts.master.objects[key].content[0] ^= 1
    other = feature_ref("s9", Hosts().writer().put("s9", features(9)))
    strange = replace(other, feature_store_uri="mooncake://another-run")
    kept, gone, damaged, also_kept, theirs = reader.get_many([*refs, strange])
    assert isinstance(gone, FeatureMissingError)
    assert isinstance(damaged, FeatureCorruptError)
    assert isinstance(theirs, FeatureMissingError)
    assert isinstance(kept, dict)
    assert isinstance(also_kept, dict)
    assert_same(also_kept, features(3))
    kept["loss_mask"].zero_()
    assert_same(reader.get(refs[0]), features(0))


# -- settings and words --------------------------------------------------------------------------


def test_a_producer_gives_the_budget_and_a_quarter() -> None:
    """So the budget stays below the master's watermark, whichever of the producers live."""
    section = MooncakeSection(master="m:1", budget_mib=1000)
    assert section.given_mib == 1250
    assert section.given_mib * 0.9 > section.budget_mib
    assert (section.host_mib(3), section.ends_with_producers) == (3750, True)
    assert MooncakeSection(master="m:1", budget_mib=1).given_mib == 16
    none = MooncakeSection(master="m:1", segment_mib=0)
    assert (none.given_mib, none.ends_with_producers) == (0, False)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"master": "m"}, "an address is host:port"),
        ({"master": "m:99999"}, "an address is host:port"),
        ({"master": "http://m/x:1"}, "an address is host:port"),
        ({"master": "m:1", "segment_mib": 3}, "no memory of less than 16 MiB"),
        ({}, "'master' is missing"),
    ],
)
def test_impossible_settings_are_refused(given: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        MooncakeSection.parse(given)


def test_what_is_missing_on_this_machine_is_told_with_the_command() -> None:
    told = no_package(ImportError("libibverbs.so.1: cannot open shared object file"))
    assert "apt-get install libibverbs1" in told.next
    told = no_package(ModuleNotFoundError("No module named 'mooncake'"))
    assert "pip install 'paceline[mooncake]'" in told.next
    assert "code -600" in no_client("m:1", "here", 16, -600).what


def test_the_address_that_others_are_told_is_the_one_that_reaches_the_master() -> None:
    assert own_address("127.0.0.1:50051") == "127.0.0.1"
    with pytest.raises(StoreError, match=r"nowhere\.invalid"):
        own_address("nowhere.invalid:1")
    assert refusal_of("127.0.0.1:1") is not None
    assert link_module.PATIENCE_S >= 60


def _memory(content: bytes) -> tuple[int, int]:
    memory = ctypes.create_string_buffer(content, len(content))
    _KEPT.append(memory)
    return ctypes.addressof(memory), len(content)


_KEPT: list[object] = []
