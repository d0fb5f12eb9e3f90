"""A whole run over a tiny real model folder, through the command line: for end-to-end tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
import yaml

from paceline.config.load import load_run_config
from paceline.demo.runs import WORDS
from paceline.features.ownership import remove
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.roles.consumer import consume
from paceline.roles.plan import events_path, plan_run
from paceline.roles.process import Work
from paceline.roles.producer import produce
from paceline.roles.snapshot import open_run
from paceline.telemetry import EventLog
from paceline.training import tensor_files
from paceline.training.learner import DRAFT


def executed(arguments: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, as a user does."""
    return subprocess.run(arguments, env=environment, text=True, capture_output=True, check=False)


class Begun(Protocol):
    """What tests use of a process that they have started: of subprocess.Popen."""

    pid: int

    @property
    def returncode(self) -> int | Any: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def communicate(self, *, timeout: float | None = None) -> tuple[str, str]: ...
    def send_signal(self, number: int, /) -> None: ...
    def kill(self) -> None: ...
    def terminate(self) -> None: ...
    def __enter__(self) -> Any: ...
    def __exit__(self, *error: Any) -> None: ...


def begun(arguments: Sequence[str], environment: Mapping[str, str]) -> Begun:
    """Start a command as a user does; what it writes is read through pipes."""
    return subprocess.Popen(
        arguments, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


class TinyRun:
    """A run folder with its run file. `name` must be its own: features lie under it in shared memory.

    `execute` and `begin` start the commands that it is asked for; see forked_commands.py for another way.
    """

    execute: Callable[[Sequence[str], Mapping[str, str]], subprocess.CompletedProcess[str]]
    begin: Callable[[Sequence[str], Mapping[str, str]], Begun]
    execute, begin = staticmethod(executed), staticmethod(begun)
    made: ClassVar[list[TinyRun]] = []  # in this process

    def __init__(self, folder: Path, model: Path, **sections: dict[str, Any]) -> None:
        self.folder = folder
        self.run_file = folder / "run.yaml"
        self.directory = folder / "run"
        folder.mkdir(parents=True, exist_ok=True)
        _write_prompts(folder / "train.jsonl", 20, "t")
        _write_prompts(folder / "heldout.jsonl", 3, "h")
        config: dict[str, dict[str, Any]] = {
            "run": {"name": f"tiny-{uuid.uuid4().hex[:8]}", "directory": str(self.directory)},
            "target": {"model": str(model), "dtype": "float32"},
            "prompts": {"path": str(folder / "train.jsonl"), "rounds": 2, "max_answer_tokens": 12},
            "capture": {"group_size": 8},
            "features": {"budget_mib": 8},
            "method": {"draft_vocab_size": 48, "first_samples": 8, "ttt_steps": 2, "dtype": "float32"},
            "training": {"batch_size": 4, "micro_batch_size": 2, "warmup_steps": 2},
            "checkpoint": {"interval_steps": 3},
            "evaluation": {
                "prompts": str(folder / "heldout.jsonl"),
                "max_new_tokens": 16,
                "draft_tokens": 4,
                "branching": 2,
                "depth": 2,
                "dtype": "float32",
            },
        }
        if "data" in sections:
            del config["prompts"]
        for name, values in sections.items():
            config[name] = {**config.get(name, {}), **values}
        self.config = config
        self.write()
        self.made.append(self)

    def write(self) -> None:
        """Write the run file."""
        self.run_file.write_text(yaml.safe_dump(self.config, default_flow_style=False))

    def command(self, verb: str) -> subprocess.CompletedProcess[str]:
        """Run `paceline <verb> run.yaml` to its end."""
        return self.run(self.arguments(verb))

    def run(self, arguments: list[str]) -> subprocess.CompletedProcess[str]:
        return self.execute(arguments, self.environment())

    def start(self, verb: str, *options: str) -> Begun:
        """Start `paceline <verb> run.yaml`."""
        return self.begin([*self.arguments(verb), *options], self.environment())

    def arguments(self, verb: str) -> list[str]:
        return [sys.executable, "-m", "paceline.cli.main", verb, str(self.run_file)]

    def environment(self) -> dict[str, str]:
        return {**os.environ, "COLUMNS": "200"}

    def free(self) -> None:
        """Remove what lies in shared memory of a run that did not end."""
        for folder in Path("/dev/shm").glob(f"paceline-{self.config['run']['name']}-*"):  # noqa: S108
            remove(folder)

    def ledger(self) -> SQLiteLedger:
        return SQLiteLedger(self.directory / "ledger.db")

    def work_here(self, work: Work, looks: int | None = None) -> None:
        """A role's work in this process, to its end or to its `looks`-th look at whether to stop."""
        plan, left = plan_run(load_run_config(self.run_file)), iter(range(looks or 10**9))
        threads = torch.get_num_threads()
        try:
            work(plan, EventLog(events_path(plan.config, "test")), lambda: next(left, None) is None)
        finally:
            torch.set_num_threads(threads)

    def train_here(self) -> dict[str, torch.Tensor]:
        """Both roles' work in this process, one after the other; the final weights."""
        self.work_here(produce)
        self.work_here(consume)
        return self.final_weights()

    def final_weights(self) -> dict[str, torch.Tensor]:
        head = open_run(self.directory).snapshot().head
        assert head is not None, "the run has a checkpoint"
        folder = self.directory / "checkpoints" / head.name
        return tensor_files.read(DRAFT, {path.name: path.read_bytes() for path in folder.glob("draft*")})


def wait_until(condition: Callable[[], bool], process: Begun) -> None:
    """Look again and again until it is so; the process must not end before."""
    while not condition():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)


def _write_prompts(path: Path, count: int, prefix: str) -> None:
    lines = [
        {
            "id": f"{prefix}{n}",
            "prompt": " ".join(WORDS[(n * 3 + k) % len(WORDS)] for k in range(2 + n % 4)) + prefix,
        }
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
