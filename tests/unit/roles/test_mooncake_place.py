"""Features at a Mooncake master: how roles agree on the place, and what a start, a joiner and a verb say."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from paceline.cli.progress import _shared_text
from paceline.config.load import load_run_config
from paceline.config.run import RunConfig
from paceline.errors import ConfigError, StoreError
from paceline.features.ownership import owner_of
from paceline.features.settings import MooncakeSection
from paceline.features.stores.shm import SharedMemoryFeatureStore
from paceline.ledger.facts import COMPLETED_STEP, FEATURES_LIE
from paceline.ledger.ledger import Ledger
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.roles import examined_mooncake, feature_place, preflight
from paceline.roles.abandoned_folders import feature_folders
from paceline.roles.examined_mooncake import the_mooncake_master_works
from paceline.roles.feature_folder import folder_of, refuse_lost_place, refuse_other_place, take_folder
from paceline.roles.feature_place import answers_place
from paceline.roles.preflight import the_features_find_room, the_mooncake_master_answers
from paceline.roles.producer import _capture_all, produce
from paceline.testing.memory_features import InMemoryFeatureStore
from paceline.testing.tiny_folder import make_tiny_folder
from paceline.testing.tiny_run import TinyRun


class Master:
    """What the process that looks at the master answers."""

    def __init__(self) -> None:
        self.seen, self.questions = True, list[dict[str, Any]]()

    def ask(self, module: str, question: str, what: str, **_: object) -> str:
        assert module == "paceline.roles.mooncake_prober"
        self.questions.append(json.loads(question))
        figures = {"version": "0.3.13", "address": "10.0.0.1", "put_ms": 1.5, "get_ms": 1.0}
        return json.dumps({"seen": self.seen} if self.questions[-1]["store"] else figures)


@pytest.fixture
def master(monkeypatch: pytest.MonkeyPatch) -> Master:
    found = Master()
    monkeypatch.setattr(feature_place, "ask", found.ask)
    monkeypatch.setattr(examined_mooncake, "ask", found.ask)
    return found


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return made(tmp_path)


def made(folder: Path, **features: object) -> RunConfig:
    memory = folder / "memory"
    memory.mkdir()
    section = {"store": "mooncake", "master": "127.0.0.1:9", "directory": str(memory), **features}
    return load_run_config(TinyRun(folder / "tiny", folder, features=section).run_file)


def test_all_roles_find_the_name_that_the_first_one_chose(config: RunConfig, master: Master) -> None:
    """Two runs of one name on one master never have the same: it ends at random."""
    ledger, other = SQLiteLedger(), SQLiteLedger()
    consumers = folder_of(config, ledger)
    taken = take_folder(config, ledger)
    assert taken == consumers == folder_of(config, ledger)
    assert folder_of(config, other) != taken
    assert owner_of(taken) is not None
    lies = ledger.facts()[FEATURES_LIE]
    assert (Path(lies["folder"]), lies["master"]) == (taken, "127.0.0.1:9")
    assert master.questions == [], "nobody asks before anything was stored"
    refuse_lost_place(config, ledger, taken)
    refuse_other_place(config, ledger)


def test_a_start_that_finds_no_live_producer_goes_on_and_says_what_follows(
    config: RunConfig, master: Master, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their memory is gone with them. If one lives, nothing is told."""
    ledger, told = SQLiteLedger(), list[str]()
    folder = take_folder(config, ledger)
    monkeypatch.setattr(ledger, "snapshot", lambda: Captured())
    take_folder(config, ledger, told.append)
    assert told == []
    master.seen = False
    assert take_folder(config, ledger, told.append) == folder
    assert "no live producer of this run is at the Mooncake master" in told[0]
    assert master.questions[-1]["store"] == folder.name


class Captured:
    committed = 3


def test_who_joins_must_be_at_the_master_of_the_others(config: RunConfig, master: Master) -> None:
    ledger = SQLiteLedger()
    folder = take_folder(config, ledger)
    assert take_folder(config, ledger, joins=True) == folder
    master.seen = False
    with pytest.raises(StoreError, match=r"127\.0\.0\.1:9 knows no live producer of this run") as caught:
        take_folder(config, ledger, joins=True)
    assert "features.master" in caught.value.next


def test_a_producer_at_work_at_another_master_is_told(config: RunConfig, master: Master) -> None:
    error = feature_place.on_another_host(config, "x", "b")
    assert "the Mooncake master at 127.0.0.1:9 does not know it" in error.what


def test_answers_of_several_hosts_lie_where_the_run_file_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only an engine that repeats its bits goes without: each host then writes the same."""
    monkeypatch.setattr(feature_place, "is_on_several_hosts", lambda _: True)
    config, folder = made(tmp_path), tmp_path / "memory" / "paceline-x"
    assert answers_place(config, folder, "0", repeats_bits=True) == (config.run.directory / "answers", "")
    with pytest.raises(ConfigError, match="no folder for the tokens of answers") as caught:
        answers_place(config, folder, "0")
    assert "features.answers" in caught.value.next
    (tmp_path / "other").mkdir()
    config = made(tmp_path / "other", answers=str(tmp_path / "shared"))
    config.run.directory.mkdir(parents=True)
    place, name = answers_place(config, folder, "0")
    assert place == tmp_path / "shared" / "paceline-x-answers"
    assert name.startswith("0-")
    assert (config.run.directory / "answers").readlink() == place


def test_a_master_that_is_not_there_refuses_the_start(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before an engine loads. The budget is no matter of features.directory."""
    plan: Any = Plan(config)
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    package, away = the_mooncake_master_answers(plan)
    assert package.refuses
    assert away.refuses
    assert "paceline[mooncake]" in package.next
    assert "mooncake_master --rpc_port=9" in away.next
    monkeypatch.setattr(preflight, "find_spec", lambda name: name)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        plan = Plan(config.model_copy(update={"features": MooncakeSection(master=address, budget_mib=10**9)}))
        assert list(the_mooncake_master_answers(plan)) == []
        assert list(the_features_find_room(plan)) == []


class Plan:
    def __init__(self, config: RunConfig) -> None:
        self.config = config


def test_the_doctor_tells_of_the_way_there_and_back_and_who_can_listen(
    config: RunConfig, master: Master
) -> None:
    good, note = the_mooncake_master_works(config)
    assert (
        "1 MiB takes 1.5 ms to 127.0.0.1:9 and 1.0 ms back; others reach this host as 10.0.0.1" in good.what
    )
    assert "listen on every address" in note.what
    small = MooncakeSection(master="127.0.0.1:9", budget_mib=1000, segment_mib=1000)
    *_, size = the_mooncake_master_works(config.model_copy(update={"features": small}))
    assert "features.segment_mib to 1112" in size.mend
    assert list(the_mooncake_master_works(None)) == []


def test_status_and_clean_know_the_place(config: RunConfig, master: Master) -> None:
    """A run that can go on keeps its folder, which holds nothing but its owner's name."""
    ledger = config.open_ledger()
    folder = take_folder(config, ledger)
    shown: Any = Shown(ledger)
    assert _shared_text(shown) == ", in memory at the Mooncake master 127.0.0.1:9"
    [found] = feature_folders(folder.parent)
    assert not found.abandoned
    ledger.set_facts(None, {COMPLETED_STEP: 3})
    [found] = feature_folders(folder.parent)
    assert found.abandoned
    ledger.close()


class Shown:
    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger.snapshot()


def test_a_producer_that_holds_what_it_captured_stays_until_the_run_is_complete() -> None:
    """A sample that is lost meanwhile is captured again; a stop ends it at once."""
    drives: Any = Drives(losses=1)
    _capture_all(drives, InMemoryFeatureStore(1 << 20), drives, lambda: False, stays=True)
    assert drives.done == ["run", "stay", "run", "stay"]
    drives = Drives(losses=1)
    _capture_all(drives, InMemoryFeatureStore(1 << 20), drives, lambda: False, stays=False)
    assert drives.done == ["run"], "whose bytes outlive it, ends"
    drives = Drives(losses=0)
    _capture_all(drives, InMemoryFeatureStore(1 << 20), drives, lambda: True, stays=True)


def test_a_producer_that_ends_with_an_error_has_closed_its_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread of Mooncake's that is in a call when Python ends aborts the process: its exit code is lost."""
    run = TinyRun(tmp_path / "run", make_tiny_folder(tmp_path / "model"))
    closed = list[object]()

    def put(*_: object, **__: object) -> None:
        raise StoreError("The Mooncake master did not answer.")

    monkeypatch.setattr(SharedMemoryFeatureStore, "put", put)
    monkeypatch.setattr(SharedMemoryFeatureStore, "close", lambda self: closed.append(self))
    with pytest.raises(StoreError, match="did not answer"):
        run.work_here(produce)
    run.free()
    assert len(closed) == 1


class Drives:
    """A producer, and the ledger of its run: some samples are lost, and then the run is complete."""

    def __init__(self, losses: int) -> None:
        self.losses, self.is_complete, self.done = losses, False, list[str]()

    def facts(self) -> dict[str, int]:
        return {COMPLETED_STEP: 9} if self.is_complete else {}

    def run(self, should_stop: Any) -> int:
        self.done.append("run")
        return 0

    def stay(self, should_stop: Any) -> bool:
        self.done.append("stay")
        self.is_complete = not self.losses
        self.losses -= 1
        return not should_stop()
