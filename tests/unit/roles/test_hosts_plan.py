"""A plan for many hosts: each part's limit by hand, which binds, and what cannot work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from paceline.capture.backpressure import Watermarks
from paceline.cli.main import app
from paceline.config.load import load_run_config
from paceline.errors import ConfigError
from paceline.roles.at_scale import budget_for
from paceline.roles.hosts import read_hosts
from paceline.roles.hosts_plan import HostsPlan, hosts_plan
from paceline.testing.tiny_folder import make_tiny_folder
from paceline.testing.tiny_run import TinyRun

SHARED = {
    "ledger": {"store": "redis", "url": "redis://ledgers:6379/0"},
    "features": {"store": "directory", "directory": "/mnt/features", "budget_mib": 64},
}
TRAINS = {"name": "t", "trainers": 2, "train_tokens_per_s": 1000, "network_gbit_per_s": 1}
CAPTURES = {"name": "c", "count": 2, "producers": 2, "capture_tokens_per_s": 60, "network_gbit_per_s": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("target") / "model")


def planned(folder: Path, model: Path, hosts: dict[str, Any], **sections: Any) -> HostsPlan:
    run = TinyRun(folder, model, **{**SHARED, **sections})
    path = folder / "hosts.yaml"
    path.write_text(yaml.safe_dump(hosts))
    return hosts_plan(load_run_config(run.run_file), read_hosts(path))


def limits(found: HostsPlan) -> dict[str, float]:
    return {f"{one.what} {one.name}".strip(): one.samples_per_s for one in found.limits}


def test_each_part_has_its_limit_and_the_least_one_binds(model: Path, tmp_path: Path) -> None:
    """Answers of 12 tokens, steps of 4 samples, every sample visited twice."""
    hosts = {"hosts": [TRAINS, CAPTURES], "storage_gbit_per_s": 2}
    found = planned(tmp_path, model, hosts, training={"passes": 2, "batch_size": 4})
    assert found.fits, found.findings
    told = limits(found)
    assert told["capture"] == pytest.approx(2 * 2 * 60 / 12)
    assert told["training"] == pytest.approx(2 * 1000 / 12 / 2)
    a_sample = found.sample_bytes_about
    assert told["network c"] == pytest.approx(2 * 125e6 / a_sample, rel=1e-3)
    assert told["network t"] == pytest.approx(125e6 / (2 * a_sample), rel=1e-3)
    assert told["storage"] == pytest.approx(250e6 / (3 * a_sample), rel=1e-3)
    assert (found.binds, found.samples_per_s) == ("capture", told["capture"])
    assert found.total_s == pytest.approx(8 / 20 + 40 / 20)
    assert found.network_bytes == pytest.approx(40 * 3 * a_sample, rel=1e-3)
    assert sum(one.written_mib_per_s * one.count for one in found.hosts) == pytest.approx(
        20 * a_sample / 2**20, rel=1e-3
    )


@pytest.mark.parametrize(
    ("changes", "binds"),
    [
        ({"hosts": [{**TRAINS, "train_tokens_per_s": 10}, CAPTURES]}, "training"),
        ({"hosts": [TRAINS, {**CAPTURES, "network_gbit_per_s": 1e-4}]}, "network"),
        ({"storage_gbit_per_s": 1e-4}, "storage"),
        ({"ledger_samples_per_s": 1}, "ledger"),
    ],
)
def test_whatever_is_least_binds_and_has_its_advice(
    model: Path, tmp_path: Path, changes: dict[str, Any], binds: str
) -> None:
    found = planned(tmp_path, model, {"hosts": [TRAINS, CAPTURES], **changes})
    assert found.binds == binds
    [told] = [finding for finding in found.findings if "binds" in finding.what]
    assert told.next


def test_gradients_of_ranks_on_several_hosts_are_summed_over_the_network(model: Path, tmp_path: Path) -> None:
    """On one host they cost nothing here."""
    one = planned(tmp_path / "one", model, {"hosts": [{**TRAINS, "trainers": 4}, CAPTURES]})
    slow = {**TRAINS, "count": 2, "network_gbit_per_s": 1e-3}
    two = planned(tmp_path / "two", model, {"hosts": [slow, CAPTURES]})
    assert limits(two)["training"] < limits(one)["training"] / 2


def test_the_budget_that_is_told_lets_all_producers_capture(model: Path, tmp_path: Path) -> None:
    """By the code that holds them back."""
    many, fast = {**CAPTURES, "producers": 32}, {**TRAINS, "train_tokens_per_s": 1e6}
    tight = planned(tmp_path / "tight", model, {"hosts": [fast, many]})
    assert tight.binds == "window"
    assert tight.producers_at_once < 64
    enough = -(-tight.budget_for_all_bytes >> 20)
    features = {**SHARED["features"], "budget_mib": enough}
    roomy = planned(tmp_path / "roomy", model, {"hosts": [fast, many]}, features=features)
    assert roomy.producers_at_once == 64
    assert "window" not in limits(roomy)


def test_a_budget_of_samples_that_binds_is_advised_too(model: Path, tmp_path: Path) -> None:
    many, fast = {**CAPTURES, "producers": 32}, {**TRAINS, "train_tokens_per_s": 1e6}
    features = {**SHARED["features"], "budget_mib": 10_000, "budget_samples": 400}
    tight = planned(tmp_path, model, {"hosts": [fast, many]}, features=features)
    assert tight.binds == "window"
    [advice] = [finding.next for finding in tight.findings if "binds" in finding.what]
    enough = int(advice.partition("budget_samples to ")[2].partition(":")[0])
    roomy = planned(
        tmp_path / "roomy",
        model,
        {"hosts": [fast, many]},
        features={**features, "budget_samples": enough},
    )
    assert "window" not in limits(roomy)


def test_memory_that_producers_give_is_counted_where_they_are(model: Path, tmp_path: Path) -> None:
    features = {"store": "mooncake", "master": "10.0.0.1:50051", "budget_mib": 4096}
    hosts = [{**TRAINS, "memory_gib": 4}, {**CAPTURES, "memory_gib": 9}]
    found = planned(tmp_path, model, {"hosts": hosts}, features=features)
    refused = [finding.what for finding in found.findings if finding.refuses]
    assert len(refused) == 1, refused
    assert "Host c has 9 GiB of memory" in refused[0]


@pytest.mark.parametrize("producers", [1, 2, 7, 64])
def test_the_least_budget_for_so_many_producers(producers: int) -> None:
    marks = Watermarks(budget_bytes=1, group_bytes=320, group_samples=32, window_samples=80)
    enough = budget_for(producers, marks)
    fields = {"group_bytes": 320, "group_samples": 32, "window_samples": 80}
    assert Watermarks(budget_bytes=enough, **fields).groups_ahead >= producers


def test_what_one_host_has_for_itself_is_refused(model: Path, tmp_path: Path) -> None:
    alone = {"ledger": {"store": "sqlite"}, "features": {"store": "shm", "budget_mib": 64}}
    found = planned(tmp_path / "two", model, {"hosts": [TRAINS, CAPTURES]}, **alone)
    refused = [finding.what for finding in found.findings if finding.refuses]
    assert [what.split(" ")[0] for what in refused] == ["ledger.store", "features.store"]
    both = {**TRAINS, "producers": 1, "capture_tokens_per_s": 60}
    one = planned(tmp_path / "one", model, {"hosts": [both]}, **alone)
    assert one.fits, one.findings
    assert one.network_bytes == 0


def test_gpus_are_counted_and_uneven_ranks_refused(model: Path, tmp_path: Path) -> None:
    crowded = {"name": "x", "gpu": "H100", "gpus": 2, "producers": 2, "trainers": 1}
    found = planned(tmp_path, model, {"hosts": [crowded, {**TRAINS, "trainers": 3}]})
    refused = "\n".join(finding.what for finding in found.findings if finding.refuses)
    assert "has 2 GPUs, and its producers and ranks take 3" in refused
    assert "1 and 3 ranks" in refused


def test_what_is_not_in_the_hosts_memory_is_refused(model: Path, tmp_path: Path) -> None:
    found = planned(tmp_path, model, {"hosts": [{**TRAINS, "memory_gib": 1e-4}, CAPTURES]})
    refused = [finding.what for finding in found.findings if finding.refuses]
    assert len(refused) == 1
    assert "Host t has 0.0001 GiB of memory" in refused[0]


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="describes no hosts"):
        read_hosts(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("hosts", "said"),
    [
        ({"hosts": [TRAINS]}, "no host has producers"),
        ({"hosts": [{**CAPTURES, "trainer": 1}, TRAINS]}, "did you mean 'trainers'"),
        ({"hosts": []}, "hosts"),
        ({"hosts": [TRAINS, {**CAPTURES, "gpu": "abacus"}]}, "No data sheet"),
        ({"hosts": [TRAINS, {"name": "c", "producers": 1}]}, "unknown: capture_tokens_per_s"),
    ],
)
def test_a_file_that_describes_no_hosts_is_refused(
    model: Path, tmp_path: Path, hosts: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        planned(tmp_path, model, hosts)
    assert caught.value.next


def test_a_person_and_a_program_read_it(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planned(tmp_path, model, {"hosts": [TRAINS, CAPTURES]})
    arguments = ["plan", str(tmp_path / "run.yaml"), "--hosts", str(tmp_path / "hosts.yaml")]
    app(arguments, standalone_mode=False)
    text = capsys.readouterr().out
    assert "2 x c: 2 producers of 60 tokens/s" in text
    assert "capture binds" in text
    app([*arguments, "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["binds"] == "capture"
