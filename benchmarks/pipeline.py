"""The whole pipeline in real role processes, one processor each, against each side alone.

    python -m benchmarks.pipeline [--quick]

A random Llama (bfloat16, 12 layers, hidden 256) answers and is captured by `paceline produce`, and an
EAGLE-3 draft is trained on it by `paceline consume`: ledger, checkpoints, digests, backpressure, all on.
Three runs of one configuration: the producer with nobody reading, the consumer on what that left, and
both together. Rates are samples per second between events of the roles' own logs, so that no start is in
them; of the run together, only while both were at
work, and once the visits' window was full. The goal is 0.95 of the slower side alone. Once
the producer is the slower one and once, with more passes, the consumer; then features should never be
waited for.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.rows import Row, against, row
from paceline.telemetry import FILE_BYTES_MAX, read_events
from paceline.testing.tiny_folder import make_tiny_folder

GROUP, BATCH = 32, 4
PROMPT_WORDS = ("wind", "wheel", "rider", "paceline", "until", "turns", "lets", "follow", "gap")
GOAL, DATA_WAIT_GOAL = 0.95, 0.01
PASSES = {"producer": 1, "consumer": 4}  # who is the slower side


def make_target(folder: Path) -> Path:
    """Random weights, which next to never end an answer: samples have all their tokens."""
    make_tiny_folder(folder)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Pipeline:
    """One configuration, run in folders of its own."""

    folder: Path
    target: Path
    passes: int
    groups: int

    def run_file(self, name: str) -> Path:
        folder = self.folder / name
        folder.mkdir()
        prompts = folder / "prompts.jsonl"
        lines = [
            {"id": str(n), "prompt": " ".join(PROMPT_WORDS[(n * k) % 9] for k in range(1, 3 + n % 6))}
            for n in range(self.groups * GROUP)
        ]
        prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
        heldout = folder / "heldout.jsonl"
        heldout.write_text(json.dumps({"id": "h", "prompt": "never asked"}) + "\n")
        config = {
            "run": {"name": f"bench-{uuid.uuid4().hex[:8]}", "directory": str(folder / "run")},
            "target": {"model": str(self.target)},
            "prompts": {"path": str(prompts), "max_answer_tokens": 96, "first_round_temperature": 1.0},
            "capture": {"group_size": GROUP},
            "features": {"budget_mib": 2048},
            "method": {"draft_vocab_size": 1024, "first_samples": GROUP, "ttt_steps": 3},
            "training": {"batch_size": BATCH, "micro_batch_size": BATCH, "passes": self.passes},
            "checkpoint": {"interval_steps": 50},
            "evaluation": {"prompts": str(heldout)},
        }
        (folder / "run.yaml").write_text(yaml.safe_dump(config))
        return folder / "run.yaml"

    def events(self, run_file: Path, role: str) -> list[dict[str, Any]]:
        return read_events(run_file.parent / "run" / "events" / f"{role}.jsonl", tail_bytes=FILE_BYTES_MAX)

    def together(self) -> tuple[float, float, float]:
        """Samples captured and samples visited per second while both worked, and the share of data wait."""
        run_file = self.run_file(f"together-{uuid.uuid4().hex[:4]}")
        roles = [start(role, run_file) for role in ("producer", "consumer")]
        finish(*roles)
        groups, steps = self._work(run_file)
        begin, end = steps[self._steps_of_ramp()]["time"], groups[-1]["time"]
        groups = [event for event in groups if event["time"] >= begin]
        steps = [event for event in steps if begin <= event["time"] <= end]
        waited = sum(event["wait_seconds"] for event in steps)
        share = waited / (waited + sum(event["step_seconds"] for event in steps))
        return rate(groups), rate(steps), share

    def _steps_of_ramp(self) -> int:
        """Until the window of blocks is full, a run with several passes has less to visit than it could."""
        return GROUP * self.passes * (self.passes - 1) // 2 // BATCH

    def alone(self) -> tuple[float, float]:
        """The same of a producer with nobody reading, then of a consumer that finds everything there."""
        run_file = self.run_file(f"alone-{uuid.uuid4().hex[:4]}")
        finish(start("producer", run_file))
        finish(start("consumer", run_file))
        groups, steps = self._work(run_file)
        return rate(groups), rate(steps)

    def _work(self, run_file: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        groups = [event for event in self.events(run_file, "producer") if event["event"] == "group"]
        steps = [event for event in self.events(run_file, "consumer") if event["event"] == "step"]
        return groups, steps


def start(role: str, run_file: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", f"paceline.roles.{role}", str(run_file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def finish(*roles: subprocess.Popen[str]) -> None:
    for role in roles:
        _, told = role.communicate()
        if role.returncode:
            raise RuntimeError(f"{role.args} ended with {role.returncode}: {told[-2000:]}")


def rate(events: list[dict[str, Any]]) -> float:
    """Samples per second from the end of the first event to the end of the last."""
    seconds: float = events[-1]["time"] - events[0]["time"]
    return sum(event["samples"] for event in events[1:]) / seconds


def run(quick: bool) -> list[Row]:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=os.environ.get("PACELINE_BENCH_DIR")) as place:
        target = make_target(Path(place) / "target")
        for slower, passes in PASSES.items():
            folder = Path(place) / slower
            folder.mkdir()
            pipeline = Pipeline(folder, target, passes, groups=12 if quick else 32)
            rows += compare(slower, pipeline, rounds=2 if quick else 4)
    return rows


def compare(slower: str, pipeline: Pipeline, rounds: int) -> list[Row]:
    """`slower` names the side that was meant to be it; the figures say whether it was."""
    side = 0 if slower == "producer" else 1
    together: list[tuple[float, float, float]] = []
    alone: list[tuple[float, float]] = []
    for number in range(
        rounds
    ):  # by turns first: a machine is a few percent faster in one minute than the next
        if number % 2:
            alone.append(pipeline.alone())
        together.append(pipeline.together())
        if not number % 2:
            alone.append(pipeline.alone())
    medians = [statistics.median(one[n] for one in alone) for n in (0, 1)]
    what = "captured" if slower == "producer" else "trained"
    rows = [
        against(
            f"whole pipeline, the {slower} slower: samples {what}",
            [one[side] for one in together],
            [one[side] for one in alone],
            "samples/s",
            limit_name=f"{slower} alone",
            goal=GOAL,
            note=f"alone: {medians[0]:.1f} captured/s, {medians[1]:.1f} trained/s (a visit each)",
        )
    ]
    if slower == "consumer":
        wait = statistics.median(one[2] for one in together)
        goal = {"limit": DATA_WAIT_GOAL, "limit_name": "goal", "ratio": DATA_WAIT_GOAL / wait, "goal": 1.0}
        rows.append(row("share of a step spent waiting for data, plan included", wait, "", **goal))
    return rows


if __name__ == "__main__":
    print(json.dumps(run("--quick" in sys.argv), indent=1))
