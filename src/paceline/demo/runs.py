"""The demo's two runs of the same prompts, and the kill of a consumer in one of them."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import yaml

from paceline.config.load import load_run_config
from paceline.config.run import RunConfig
from paceline.durable_files import make_folder, replace_file
from paceline.errors import ConfigError, EngineError
from paceline.ledger.locks import UNKNOWN, live_holder
from paceline.regular_files import kind_of
from paceline.roles.plan import events_path, role_environment
from paceline.roles.snapshot import open_run
from paceline.roles.workers import CONSUMER
from paceline.telemetry import read_events

CALM, KILLED = "calm", "killed"
TARGET = "target"
MARK = "demo.txt"
TOLD = "Made by `paceline demo`. Remove the folder when you have seen enough.\n"
WORDS = (
    "the",
    "wind",
    "turns",
    "a",
    "wheel",
    "and",
    "every",
    "rider",
    "follows",
    "until",
    "one",
    "lets",
    "go",
)
PROMPTS, HELD_OUT = 96, 4
INTERVAL = 6  # steps between checkpoints
KILL_FROM = INTERVAL  # the head's step
LOOK_S = 0.01


def prepare(folder: Path, prompts: int = PROMPTS) -> dict[str, Path]:
    """Make the demo's folder with its prompts and run files, or take the one that is there.

    Returns the run files by name. Raises ConfigError if something else is there, OSError.
    """
    files = {name: folder / f"{name}.yaml" for name in (CALM, KILLED)}
    if kind_of(folder) == "folder" and (folder / MARK).exists():
        _refuse_moved(folder, load_run_config(files[CALM]).run.directory.parent)
        return files
    if os.path.lexists(folder):
        raise ConfigError(
            f"{folder} is there already, and it is not of a demo.",
            why="The demo writes into a folder of its own.",
            next="name another folder: paceline demo DIR",
        )
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    make_folder(unfinished)
    _write_prompts(unfinished / "prompts.jsonl", range(prompts))
    _write_prompts(unfinished / "heldout.jsonl", range(prompts, prompts + HELD_OUT))
    for name, path in files.items():
        run = yaml.safe_dump(_run(folder.absolute(), name), sort_keys=False)
        replace_file(unfinished / path.name, run.encode())
    replace_file(unfinished / MARK, TOLD.encode())
    unfinished.rename(folder)
    return files


def _refuse_moved(folder: Path, made_as: Path) -> None:
    """Its runs have recorded the paths of the place where they began. Raises ConfigError."""
    if made_as.exists() and made_as.samefile(folder):
        return
    raise ConfigError(
        f"The demo in {folder} was made as {made_as}, and was moved since.",
        why="Its runs would go on at the old place, which their settings name.",
        next=f"rm -r {shlex.quote(str(folder))}, and begin anew: paceline demo {shlex.quote(str(folder))}",
    )


def make_target(folder: Path) -> None:
    """In a process of its own, which loads torch; nothing if it is there. Raises EngineError, OSError."""
    target, unfinished = folder / TARGET, folder / f"{TARGET}.unfinished"
    if target.exists():
        return
    command = [sys.executable, "-m", "paceline.demo.target", str(unfinished)]
    made = subprocess.run(
        command, env={**os.environ, **role_environment(1)}, text=True, capture_output=True, check=False
    )
    if made.returncode:
        raise EngineError(
            f"The demo's target could not be made: {made.stderr[-1000:].strip()}",
            why="torch or transformers of this Python does not work.",
            next=f"{sys.executable} -c 'import torch, transformers' shows the error alone.",
        )
    unfinished.rename(target)


class KillOnce(threading.Thread):
    """While entered, kill the run's consumer once, after a step whose checkpoint is not durable yet.

    `killed`: (process id, last step acked, the head's step); None if it was not killed.
    """

    def __init__(self, config: RunConfig) -> None:
        super().__init__(daemon=True)
        self._directory = config.run.directory
        self._ended = threading.Event()
        self.killed: tuple[int, int, int] | None = None

    def __enter__(self) -> KillOnce:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        view = open_run(self._directory)
        while self.killed is None and not self._ended.wait(LOOK_S):
            now, pid = view.snapshot(), live_holder(self._directory, CONSUMER)
            head = -1 if now.head is None else now.head.step
            if pid not in (None, UNKNOWN) and head >= KILL_FROM and now.trained_step > head:
                os.kill(pid, signal.SIGKILL)
                self.killed = (pid, now.trained_step, head)


def resumed_from(config: RunConfig) -> int | None:
    """The step of the checkpoint that the consumer's newest start went on from, as it tells."""
    told = [event for event in read_events(events_path(config, CONSUMER)) if event.get("event") == "resumed"]
    return int(told[-1]["step"]) if told else None


def weights_digest(directory: Path) -> tuple[int, str]:
    """The head's step, and SHA-256 of its weights, in hex. Raises PacelineError, OSError."""
    head = open_run(directory).snapshot().head
    assert head is not None, "a complete run has a checkpoint"
    weights = directory / "checkpoints" / head.name / "draft.safetensors"
    return head.step, hashlib.sha256(weights.read_bytes()).hexdigest()


def _run(folder: Path, name: str) -> dict[str, Any]:
    """A small run file with what differs from the defaults; the weights do not depend on `name`."""
    return {
        "run": {"name": f"demo-{name}", "directory": str(folder / name)},
        "target": {"model": str(folder / TARGET), "dtype": "float32"},
        "data": {"path": str(folder / "prompts.jsonl"), "rounds": 2, "max_answer_tokens": 24},
        "capture": {"group_size": 8},
        "features": {"budget_mib": 16},
        "method": {"name": "eagle3", "draft_vocab_size": 48, "first_samples": 8, "dtype": "float32"},
        "training": {"batch_size": 4, "micro_batch_size": 4, "warmup_steps": 4},
        "checkpoint": {"interval_steps": INTERVAL},
        "evaluation": {"prompts": str(folder / "heldout.jsonl"), "max_new_tokens": 24, "dtype": "float32"},
    }


def _write_prompts(path: Path, numbers: range) -> None:
    lines = [{"id": str(n), "prompt": _prompt(n)} for n in numbers]
    replace_file(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def _prompt(number: int) -> str:
    """A few words; another text for every number below 13^3."""
    places = (number, number // 13, number // 169, number * 5 + 2)
    return " ".join(WORDS[(place * 3 + at) % len(WORDS)] for at, place in enumerate(places))
