"""A whole run whose ledger is on a real Valkey server: roles and server are killed, the weights are the same.

The undisturbed run that each is compared with has its ledger in a file.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from paceline.ledger.locks import live_holder
from paceline.ledger.place import known
from paceline.ledger.records import Snapshot
from paceline.roles.snapshot import has_ledger, open_run
from paceline.testing.random_kills import make_run
from paceline.testing.small_run import same_bits
from paceline.testing.tiny_run import TinyRun, wait_until
from paceline.testing.valkey_server import ValkeyServer

NUM_SAMPLES = 120
USER, PASSWORD = "paceline", "sesame"
OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    """It keeps an append-only file, and the run's user may do what docs/operations.md gives it."""
    folder = tmp_path_factory.mktemp("s")
    rules = re.findall(r"^user paceline on >PASSWORD (.*)$", OPERATIONS.read_text(), re.MULTILINE)
    users = f"user default on nopass ~* &* +@all\nuser {USER} on >{PASSWORD} {rules[0]}\n"
    (folder / "users.acl").write_text(users)
    server = ValkeyServer(folder, aclfile=str(folder / "users.acl"))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def uninterrupted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return make_run(tmp_path_factory.mktemp("plain"), tiny_model).train_here()


def run_on(server: ValkeyServer, folder: Path, model: Path) -> TinyRun:
    run = make_run(folder, model)
    url = f"unix://{USER}:{PASSWORD}@{server.socket}"
    run.config |= {"ledger": {"store": "redis", "url": url}, "checkpoint": {"interval_steps": 3, "keep": 20}}
    run.write()
    return run


def now(run: TinyRun) -> Snapshot:
    return open_run(run.directory).snapshot()


def has_trained(run: TinyRun, samples: int) -> Callable[[], bool]:
    """Some are trained, and some are not captured yet, or at least not trained."""
    return lambda: has_ledger(run.directory) and samples <= now(run).samples_trained < NUM_SAMPLES


def has_head(run: TinyRun, after: int = 0) -> Callable[[], bool]:
    """There is a checkpoint of a step after that one, and work is left."""

    def look() -> bool:
        if not has_ledger(run.directory):
            return False
        snapshot = now(run)
        return snapshot.head is not None and after < snapshot.head.step < NUM_SAMPLES // 4 - 6

    return look


def check(run: TinyRun, uninterrupted: dict[str, torch.Tensor]) -> None:
    snapshot = now(run)
    assert same_bits(run.final_weights(), uninterrupted)
    assert snapshot.samples_trained == snapshot.committed == NUM_SAMPLES
    assert snapshot.usage.resident_samples == snapshot.usage.provisional_samples == 0


def test_roles_and_the_server_are_killed_and_the_run_goes_on_by_itself(
    tiny_model: Path,
    tmp_path: Path,
    uninterrupted: dict[str, torch.Tensor],
    server: ValkeyServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also `status` and the other verbs read it there; no file of the run has the password."""
    run = run_on(server, tmp_path, tiny_model)
    with run.start("train") as train:
        wait_until(has_trained(run, 8), train)
        server.kill()
        server.start()
        for role in ("consumer", "producer"):
            wait_until(lambda role=role: bool(live_holder(run.directory, role)), train)
            os.kill(live_holder(run.directory, role) or 0, signal.SIGKILL)
        out, err = train.communicate(timeout=500)
    assert train.returncode == 0, err
    assert out.strip().endswith(f"{NUM_SAMPLES} samples trained | 2 restarts")
    check(run, uninterrupted)
    for verb in ("status", "inspect", "fsck", "export --to vllm"):
        name, *options = verb.split()
        done = run.run([*run.arguments(name), *options])
        assert done.returncode == 0, done.stderr
        out += done.stdout + done.stderr
    monkeypatch.setenv("PACELINE_REDIS_USER", USER)
    monkeypatch.setenv("PACELINE_REDIS_PASSWORD", PASSWORD)
    for verb in ("status", "inspect", "fsck", "evaluate"):  # of the folder, which has neither
        arguments = [*run.arguments(verb)[:-1], str(run.directory)]
        done = run.run(arguments)
        assert done.returncode == 0, done.stderr
        out += done.stdout + done.stderr
    assert f"on unix://{server.socket}" in out
    assert not (run.directory / "ledger.db").exists()
    for arguments in (["ledger", "copy", str(run.directory), "sqlite"], ["fsck", str(run.directory)]):
        done = run.run([*run.arguments("")[:-2], *arguments])  # of a file every rule is checked
        assert done.returncode == 0, done.stdout + done.stderr
        out += done.stdout + done.stderr
    files = [path for path in run.directory.rglob("*") if path.is_file()]
    shown = [out, err, *(path.read_text(errors="replace") for path in files)]
    assert not [text for text in shown if PASSWORD in text]


def test_three_producers_share_a_ledger_on_a_server(
    tiny_model: Path, tmp_path: Path, uninterrupted: dict[str, torch.Tensor], server: ValkeyServer
) -> None:
    """One is killed, and so is the server: the weights are those of one producer beside a file."""
    run = run_on(server, tmp_path, tiny_model)
    run.config["machine"] = {"producers": 3}
    run.write()
    with run.start("train") as train:
        wait_until(has_trained(run, 8), train)
        server.kill()
        server.start()
        wait_until(lambda: bool(live_holder(run.directory, "producer-1")), train)
        os.kill(live_holder(run.directory, "producer-1") or 0, signal.SIGKILL)
        _, err = train.communicate(timeout=500)
    assert train.returncode == 0, err
    check(run, uninterrupted)


def test_a_server_that_lost_changes_stops_the_run_which_then_goes_on(
    tiny_model: Path, tmp_path: Path, uninterrupted: dict[str, torch.Tensor], server: ValkeyServer
) -> None:
    """The processes say what is missing; the next start rolls the ledger forward to the newest checkpoint."""
    run = run_on(server, tmp_path, tiny_model)
    with run.start("train") as train:
        wait_until(has_head(run), train)
        head = now(run).head
        assert head is not None
        shutil.copytree(server.folder / "appendonlydir", tmp_path / "older")
        wait_until(has_head(run, head.step), train)
        server.kill()
        shutil.rmtree(server.folder / "appendonlydir")
        shutil.copytree(tmp_path / "older", server.folder / "appendonlydir")
        server.start()
        out, err = train.communicate(timeout=500)
    assert train.returncode == 6, out + err
    assert "which were made before" in err
    done = run.command("train")
    assert done.returncode == 0, done.stderr
    assert "goes on from its newest checkpoint if the ledger can be rolled forward to it" in done.stdout
    assert '"rolled_forward"' in (run.directory / "events" / "consumer.jsonl").read_text()
    check(run, uninterrupted)


def test_another_or_an_empty_server_does_not_begin_the_run_anew(
    tiny_model: Path, tmp_path: Path, server: ValkeyServer
) -> None:
    """A wrong database, a server that was cleared; nothing is created there."""
    run = run_on(server, tmp_path, tiny_model)
    with run.start("train") as train:
        wait_until(has_head(run), train)
        train.send_signal(signal.SIGINT)
        train.communicate(timeout=500)
    with server.client() as client:
        client.flushall()
        for verb in ("train", "status"):
            done = run.command(verb)
            assert done.returncode == 6, done.stderr
            assert "tells of, but empty: the ledger" in done.stderr
            assert "next  check the server's address" in done.stderr
        assert client.dbsize() == 0


def test_a_server_may_move_with_its_data(
    tiny_model: Path, tmp_path: Path, uninterrupted: dict[str, torch.Tensor], server: ValkeyServer
) -> None:
    """The run file has another address, the ledger the same identity; the run folder follows."""
    run = run_on(server, tmp_path, tiny_model)
    with run.start("train") as train:
        wait_until(has_head(run), train)
        train.send_signal(signal.SIGINT)
        train.communicate(timeout=500)
    server.stop()
    server.socket = server.folder / "moved.sock"
    server.start()
    run.config["ledger"]["url"] = f"unix://{USER}:{PASSWORD}@{server.socket}"
    run.write()
    done = run.command("train")
    assert done.returncode == 0, done.stderr
    place = known(run.directory)
    assert place is not None
    assert place.section["url"] == server.url
    check(run, uninterrupted)
