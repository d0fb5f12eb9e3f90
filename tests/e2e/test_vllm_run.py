"""A whole run whose target runs in a server: the run's own, killed in the middle, and one of the user's."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest

from paceline.config.load import flat, load_run_config
from paceline.engines.vllm.guard import session_members
from paceline.engines.vllm.server import RECORD
from paceline.ledger.facts import CONFIG, RUN_ID
from paceline.roles.feature_folder import engine_folder
from paceline.roles.server_command import server_command
from paceline.telemetry import read_events
from paceline.testing.tiny_folder import make_tiny_folder
from paceline.testing.tiny_run import TinyRun, executed

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PROGRAM = [sys.executable, "-m", "paceline.testing.vllm_server"]


def server_events(run: TinyRun) -> list[str]:
    events = read_events(run.directory / "events" / "producer.jsonl")
    return [event["state"] for event in events if event["event"] == "server"]


def test_a_managed_server_that_is_killed_costs_no_sample(tiny_model: Path, tmp_path: Path) -> None:
    """It is started again, every prompt is captured, and neither a process nor a file is left of it."""
    run = TinyRun(tmp_path, tiny_model, engine={"name": "vllm", "managed": True, "program": PROGRAM})
    record, pids = run.directory / RECORD, []
    with run.start("produce") as produce:
        while not pids and produce.poll() is None:
            time.sleep(0.05)
            if record.exists() and run.ledger().snapshot().committed >= 8:
                told = json.loads(record.read_text())
                pids = list(session_members(told["session"], told["started"]))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        out, err = produce.communicate(timeout=500)
    config = load_run_config(run.run_file)
    assert produce.returncode == 0, out + err
    now = run.ledger().snapshot()
    assert (now.committed, now.prompts.failed) == (40, 0)
    assert now.facts["engine"] == {"name": "vllm", "repeats_bits": False}
    assert server_events(run).count("started") == 2
    assert not record.exists()
    assert not engine_folder(config).exists()
    assert "vllm: bits may differ when captured again" in run.command("status").stdout


def test_the_command_for_a_server_of_the_users_is_printed(tiny_model: Path, tmp_path: Path) -> None:
    """It can be pasted into a shell; an engine without a server says what to write into the run file."""
    run = TinyRun(tmp_path / "a", tiny_model, engine={"name": "vllm", "url": "http://127.0.0.1:8123"})
    arguments = run.arguments("engine")
    printed = run.run([*arguments[:-1], "vllm", arguments[-1]])
    assert printed.returncode == 0, printed.stderr
    words = shlex.split(printed.stdout)
    assert words[:3] == ["vllm", "serve", str(tiny_model.absolute())]
    assert words[-2:] == ["--port", "8123"]
    assert "[2,4,5,8]" in printed.stdout
    plain = TinyRun(tmp_path / "b", tiny_model)
    arguments = plain.arguments("engine")
    refused = plain.run([*arguments[:-1], "vllm", arguments[-1]])
    assert refused.returncode == 2
    assert "engine: {name: vllm, url: " in refused.stderr
    refused = plain.run([*arguments[:-1], "transformers", arguments[-1]])
    assert refused.returncode == 2
    assert "has no server of its own" in refused.stderr
    assert "url" not in refused.stderr


def test_the_command_is_printed_for_a_target_of_the_hub_and_for_a_runs_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server gets the folder in the hub's cache, with the commit that the run is bound to."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))  # in this process
    model = tmp_path / "hub" / "models--wind--tiny-llama"
    snapshot = make_tiny_folder(model / "snapshots" / COMMIT)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    run = TinyRun(
        tmp_path / "a", Path("wind/tiny-llama"), engine={"name": "vllm", "url": "http://[::1]:8123"}
    )
    command = server_command(load_run_config(run.run_file))
    assert shlex.split(command)[:3] == ["vllm", "serve", str(snapshot)]
    ledger = run.ledger()
    ledger.set_facts(None, {RUN_ID: "tiny", CONFIG: flat(load_run_config(run.run_file))})
    ledger.close()
    arguments = [*run.arguments("engine")[:-1], "vllm", str(run.directory)]
    printed = executed(arguments, run.environment())
    assert printed.stdout == f"{command}\n", printed.stderr
