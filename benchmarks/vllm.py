"""A real vLLM server trains the recipe's target end to end, while server, producer and everything are killed.

    python -m benchmarks.vllm [--prompts N] [--python PYTHON_OF_VLLM]

`make test-vllm` runs it. First a server with a broken sampler must be refused. Then it fails unless every
prompt was captured and every sample trained exactly as often as configured, nothing failed or is in
quarantine, the independent checker finds nothing wrong, and the draft guesses better than chance. The
figures go to benchmarks/results/DATE-vllm.json.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from benchmarks.record import commit, keep
from paceline.config.load import load_run_config
from paceline.engines.vllm.guard import session_members
from paceline.engines.vllm.server import RECORD
from paceline.errors import EngineError
from paceline.ledger.locks import live_holder
from paceline.roles.snapshot import open_run, take_snapshot
from paceline.telemetry import read_events

RECIPE = Path("recipes/smollm2-vllm-cpu.yaml")
VICTIMS = ("server", "producer", "server", "everything")
FLOOR = 1.1  # acceptance length; a draft that has learned nothing reaches 1.0
LOOK_S = 0.2
FILE_BYTES = 8 << 20


def run_file_of(folder: Path, prompts: int, python: str, model: str | None) -> Path:
    recipe = yaml.safe_load(RECIPE.read_text())
    lines = Path(recipe["prompts"]["path"]).read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines[:prompts]))
    recipe["prompts"]["path"] = str(folder / "train.jsonl")
    recipe["run"] |= {"name": f"vllm-{os.getpid()}", "directory": str(folder / "run")}
    recipe["engine"]["program"][0] = python
    recipe["target"]["model"] = model or recipe["target"]["model"]
    (folder / "run.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "run.yaml"


def refusal_of(folder: Path, run_file: Path) -> str:
    """What the command says to a server whose sampler is broken, as the package for processors has it."""
    broken = yaml.safe_load(run_file.read_text())
    broken["engine"]["connector"] = "cpu_connector:CpuHiddenStatesConnector"
    broken["run"] |= {"name": f"vllm-broken-{os.getpid()}", "directory": str(folder / "broken")}
    path = folder / "broken.yaml"
    path.write_text(yaml.safe_dump(broken))
    command = [sys.executable, "-m", "paceline.cli.main", "train", str(path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    said = ended.stderr.strip().partition("\n")[0]
    return said if ended.returncode == EngineError.exit_code else f"NOT REFUSED ({ended.returncode}): {said}"


class Killed:
    """The run and what happened to it."""

    def __init__(self, run_file: Path) -> None:
        self.run_file = run_file
        self.directory = load_run_config(run_file).run.directory
        self.train = self._start()
        self.kills: list[dict[str, Any]] = []

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-m", "paceline.cli.main", "train", str(self.run_file)])

    def committed(self) -> int:
        with suppress(Exception):  # a ledger that is being made
            return open_run(self.directory).snapshot().committed
        return 0

    def wait_for(self, committed: int) -> bool:
        """Whether the run reached so many samples before it ended."""
        while self.committed() < committed:
            if self.train.poll() is not None:
                return False
            time.sleep(LOOK_S)
        return True

    def kill(self, victim: str) -> None:
        """SIGKILL; the guard of the server, too, so that nothing ends in order."""
        self.kills.append({"killed": victim, "committed": self.committed()})
        if victim == "server":
            for pid in self._processes_of_server():
                _kill(pid)
            return
        if victim == "everything":
            self.train.send_signal(signal.SIGSTOP)  # or it would start a role again
            _kill(live_holder(self.directory, "consumer"))
        _kill(live_holder(self.directory, "producer"))
        if victim == "everything":
            self.train.kill()
            self.train.wait()
            self.train = self._start()

    def _processes_of_server(self) -> list[int]:
        while True:  # a server that is being started has no record for a moment
            with suppress(FileNotFoundError, ValueError):
                told = json.loads((self.directory / RECORD).read_text())
                return list(session_members(told["session"], told["started"]))
            time.sleep(LOOK_S)


def _kill(pid: int | None) -> None:
    if pid:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def report_of(run: Killed, seconds: float) -> dict[str, Any]:
    snapshot = take_snapshot(run.directory, open_run(run.directory))
    events = read_events(run.directory / "events" / "producer.jsonl", tail_bytes=FILE_BYTES)
    groups = [event for event in events if event["event"] == "group"]
    notes = [event["message"] for event in events if event["event"] == "note"]
    checker = [sys.executable, "-m", "paceline.cli.main", "fsck", str(run.directory)]
    return {
        "seconds": round(seconds, 1),
        "kills": run.kills,
        "seconds_until_the_server_answered": [
            event["seconds"] for event in events if event["event"] == "server" and event["state"] == "ready"
        ],
        "server_starts": sum(e["event"] == "server" and e["state"] == "started" for e in events),
        "leftovers_ended": sum(e["event"] == "server" and e["state"] == "leftover ended" for e in events),
        "restarts_of_roles": snapshot.ledger.restarts,
        "prompts_failed": snapshot.ledger.prompts.failed,
        "samples_committed": snapshot.ledger.committed,
        "samples_trained": snapshot.ledger.samples_trained,
        "samples_quarantined": len(snapshot.quarantined),
        "states_captured": sum(event["num_tokens"] for event in groups),
        "fsck": subprocess.run(checker, stdout=subprocess.DEVNULL, check=False).returncode,
        "probe": sorted(set(notes)),
        "evaluation": snapshot.evaluation,
    }


def wrong_with(report: dict[str, Any], samples: int) -> list[str]:
    wanted = {
        "samples_committed": samples,
        "samples_trained": samples,
        "prompts_failed": 0,
        "samples_quarantined": 0,
        "fsck": 0,
    }
    wrong = [
        f"{name} is {report[name]}, not {value}" for name, value in wanted.items() if report[name] != value
    ]
    length = report["evaluation"].get("acceptance_length", 0.0)
    return wrong if length >= FLOOR else [*wrong, f"acceptance length {length:.3f} is below {FLOOR}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--python", default=".venv-vllm/bin/python", help="the Python that has vLLM")
    parser.add_argument("--model", help="the target's folder, if it is not the recipe's")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="paceline-vllm-") as name:
        run_file = run_file_of(Path(name), given.prompts, given.python, given.model)
        samples = given.prompts * load_run_config(run_file).data.rounds
        refusal = refusal_of(Path(name), run_file)
        began = time.monotonic()
        run = Killed(run_file)
        for number, victim in enumerate(VICTIMS, start=1):
            if run.wait_for(number * samples // (len(VICTIMS) + 2)):
                run.kill(victim)
        code = run.train.wait()
        report = {"broken_sampler": refusal, **report_of(run, time.monotonic() - began)}
    wrong = [*([f"the command ended with {code}"] if code else []), *wrong_with(report, samples)]
    wrong += [refusal] if "does not compute the run's target" not in refusal else []
    print(json.dumps(report, indent=1))
    for problem in wrong:
        print(problem)
    if not wrong:
        print(keep("vllm", {"commit": commit(), "prompts": given.prompts, **report}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
