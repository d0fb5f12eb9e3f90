"""What cannot work over several hosts is refused before anything is queued."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from run_of_hosts import ALONE, SECTIONS, Write

from paceline.config.load import binding, load_run_config
from paceline.errors import ConfigError
from paceline.launch.fleet import Fleet, quoted


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"ledger": {"store": "sqlite"}}, "a file of one host"),
        ({"features": ALONE["features"]}, "the memory of one host"),
        ({"features": {"store": "directory", "directory": "/dev/shm/x"}}, "memory of each host"),
        ({"ledger": {"store": "redis", "url": "redis://localhost:6379/0"}}, "address of one host alone"),
        ({"ledger": {"store": "redis", "url": "redis://[::1]:6379/0"}}, "address of one host alone"),
        ({"ledger": {"store": "redis", "url": "redis://127.0.0.2/0"}}, "address of one host alone"),
        ({"ledger": {"store": "redis", "url": "unix:///run/valkey.sock"}}, "address of one host alone"),
        ({"engine": {"name": "vllm", "url": "http://127.0.0.1:8000"}}, "nothing starts one there"),
        ({"training": {"batch_size": 8, "micro_batch_size": 8}}, "16 ranks would divide"),
    ],
)
def test_what_several_hosts_cannot_share_is_refused(
    write: Write, sections: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        Fleet.of(write(**sections), hosts=16, producers=2)
    assert caught.value.next


def test_a_password_in_the_run_file_is_refused_and_not_shown(write: Write) -> None:
    url = "redis://me:secret@ledgers:6379/0"
    with pytest.raises(ConfigError, match="PACELINE_REDIS_PASSWORD") as caught:
        Fleet.of(write(ledger={"store": "redis", "url": url}))
    assert "secret" not in str(caught.value)


def test_one_host_may_keep_everything_to_itself(write: Write) -> None:
    """And is told where it can go on."""
    fleet = Fleet.of(write(**ALONE))
    assert (fleet.trainer.gpus, fleet.trainer.processors) == (2, 2)
    assert fleet.trainer.shm_mib == 4096 + 1024
    assert fleet.trainer.memory_mib == 16 * 1024 + fleet.trainer.shm_mib
    assert any("only on the host that has it" in note for note in fleet.notes())


def test_gpus_that_nobody_names_are_told_not_guessed(write: Write) -> None:
    sections = {"engine": {"name": "transformers"}, "training": {"batch_size": 8}}
    fleet = Fleet.of(write(**sections))
    assert fleet.trainer.gpus == 0
    assert any("--gpus N" in note for note in fleet.notes())
    asked = Fleet.of(write(**sections), gpus=4)
    assert (asked.trainer.gpus, asked.producer.gpus) == (4, 1)
    assert not any("--gpus" in note for note in asked.notes())


def test_producers_that_several_hosts_do_not_start_are_told(write: Write) -> None:
    run_file = write(machine={"producers": 3})
    assert any("--producers 2" in note for note in Fleet.of(run_file, hosts=2).notes())
    assert not any("--producers 2" in note for note in Fleet.of(run_file, hosts=2, producers=2).notes())
    assert not any("--producers 2" in note for note in Fleet.of(run_file, producers=1).notes())


@pytest.mark.parametrize("given", [{"hosts": 0}, {"producers": -1}, {"gpus": -1}, {"memory_gib": 0}])
def test_a_number_that_makes_no_sense_is_refused(write: Write, given: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="give at least"):
        Fleet.of(write(), **given)


def test_another_host_gets_the_same_run_on_its_own_devices(write: Write, tmp_path: Path) -> None:
    """Nothing that decides the weights differs."""
    engine = {"name": "vllm", "managed": True, "devices": [2, 3]}
    fleet = Fleet.of(write(engine=engine, run={**SECTIONS["run"], "seed": 7}), producers=1)
    assert fleet.producer.gpus == 2
    path = tmp_path / "elsewhere.yaml"
    section = yaml.safe_dump({"run": fleet.section_elsewhere("/tmp/own")})
    path.write_text(section + fleet.sections_elsewhere())
    config = load_run_config(path)
    assert binding(config) == binding(fleet.config)
    assert config.engine.model_dump()["devices"] == (0, 1)
    assert config.run.directory == Path("/tmp/own")


def test_a_word_for_bash_is_printable_whatever_the_name_is() -> None:
    assert quoted("a b") == "'a b'"
    assert quoted("zug\x9b\u202e'\\\udcff") == r"$'zug\xc2\x9b\xe2\x80\xae\x27\x5c\xff'"
