"""Data-parallel training: a step of 1 and of 2 ranks against plain DDP of the same module, and a checkpoint.

    python -m benchmarks.trainers [--quick]

Ours is what the ranks of a run do in a step: messages, reading the slice, micro-batches, the vote,
the sums of gradients, clipping, the update, the answers. Plain DDP is torch's `DistributedDataParallel` over
the same draft and the same samples, which every rank has at hand: the gradients are sent while the last
micro-batch runs backward, and nothing is checked. Both take turns in the same processes, one thread each. The
draft is that of benchmarks/training_step.py, in bfloat16 autocast where the processor multiplies that.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from benchmarks.rows import Row, against, row
from benchmarks.training_step import CPU, Sample, new_draft, spread_samples, target_head
from paceline.precision import has_bfloat16
from paceline.roles.plan import role_environment
from paceline.roles.trainers import MeetingPoint, place_in
from paceline.training.determinism import compute_deterministically
from paceline.training.group import Group
from paceline.training.link import Place
from paceline.training.optimizer import build_optimizer
from paceline.training.ranks import Follower, Ranks
from paceline.training.settings import TrainerSettings, TrainingSection
from paceline.training.torch_learner import TorchLearner
from paceline.training.worker import FIRST_WEIGHTS, Worker, slice_of
from paceline.types import SampleRef

BATCH, MICRO_BATCH, DEPTH = 8, 2, 4
AUTOCAST = torch.bfloat16 if has_bfloat16(CPU) else None
TRAINING = TrainingSection(batch_size=BATCH, micro_batch_size=MICRO_BATCH)


class AtHand:
    """A feature store that has every sample in memory."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = samples

    def get(self, ref: SampleRef) -> dict[str, Any]:
        return dict(self._samples[int(ref.sample_id)])


def refs(samples: Sequence[Sample]) -> list[SampleRef]:
    tokens = [len(sample["input_ids"]) - 1 for sample in samples]
    return [SampleRef(str(n), "bench", None, "", {}, {}, "eagle3", count) for n, count in enumerate(tokens)]


class Ours:
    def __init__(self, samples: Sequence[Sample], group: Group | None, *, sharded: bool = False) -> None:
        settings = TrainerSettings(None, 1, training=TRAINING, autocast_dtype=AUTOCAST, sharded=sharded)
        method, _ = new_draft(DEPTH)
        self.learner = TorchLearner(method, target_head(), settings, group)
        self.worker = Worker(self.learner, AtHand(samples))  # type: ignore[arg-type]
        self.group, self.number = group, 0
        self.ranks = Ranks(self.worker, group)
        self.refs = refs(samples)

    def follow(self) -> None:
        assert self.group is not None
        Follower(self.worker, self.group, lambda: False).follow()

    def build(self) -> None:
        self.ranks.fetch(FIRST_WEIGHTS, 0, self.refs)
        self.ranks.build()

    def step(self) -> None:
        self.number += 1
        self.ranks.fetch(self.number, 0, self.refs)
        self.ranks.step()


class PlainDDP:
    def __init__(self, samples: Sequence[Sample], rank: int, ranks: int) -> None:
        self._method, draft = new_draft(DEPTH)
        self._optimizer = build_optimizer(draft, TRAINING)
        self._draft = nn.parallel.DistributedDataParallel(draft) if ranks > 1 else draft
        self._share = self._method.num_tokens(samples) / ranks  # DDP averages
        start, stop = slice_of(refs(samples), rank, ranks)
        self._mine = samples[start:stop]

    def step(self) -> None:
        self._draft.zero_grad(set_to_none=True)
        starts = range(0, len(self._mine), MICRO_BATCH)
        for start in starts:
            batch = self._method.collate(self._mine[start : start + MICRO_BATCH], CPU)
            waits = start != starts[-1] and isinstance(self._draft, nn.parallel.DistributedDataParallel)
            with self._draft.no_sync() if waits else nullcontext():  # type: ignore[operator]
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=AUTOCAST is not None):
                    loss = self._draft(batch).loss_sum
                loss.backward()
        for parameter in self._draft.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(self._share)
        nn.utils.clip_grad_norm_(self._draft.parameters(), TRAINING.grad_clip)
        self._optimizer.step()


def seconds(work: Callable[[], object], times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - began) / times


def rank_of(place: Place | None, turns: int, steps: int) -> dict[str, Any]:
    """One rank's part; rank 0 tells the seconds of a step and of a checkpoint's copy."""
    compute_deterministically(threads=1)
    samples = spread_samples(BATCH)
    group = None if place is None else Group(place, timeout_s=300, device=CPU)
    rank, ranks = (0, 1) if group is None else (group.rank, group.size)
    ours, plain = Ours(samples, group), PlainDDP(samples, rank, ranks)
    sharded = Ours(samples, group, sharded=True) if ranks > 1 else None
    told: dict[str, Any] = {"ours": [], "plain": [], "stall": [], "sharded": []}
    for turn in range(turns + 1):
        if rank:
            ours.follow()
            if sharded is not None:
                sharded.follow()
        else:
            if turn == 0:
                ours.build()
            took = seconds(ours.step, steps)
            stall = seconds(ours.ranks.files, 2)
            ours.ranks.end()
            if sharded is not None:
                if turn == 0:
                    sharded.build()
                sharded_took = seconds(sharded.step, steps)
                sharded.ranks.end()
                if turn:
                    told["sharded"].append(sharded_took)
        plain_took = seconds(plain.step, steps)
        if turn and not rank:  # the first turn touches fresh memory
            told["ours"].append(took)
            told["plain"].append(plain_took)
            told["stall"].append(stall)
    told["tokens"] = sum(len(sample["input_ids"]) - 1 for sample in samples)
    return told


def measured(ranks: int, quick: bool) -> dict[str, Any]:
    """By as many processes."""
    meeting = MeetingPoint(ranks)
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.trainers", "--rank", "3" if quick else "8", "1"],
            env={**os.environ, **role_environment(1), **meeting.environment(rank)},
            pass_fds=meeting.descriptors(rank),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    meeting.close()
    told = [process.communicate()[0] for process in processes]
    return dict(json.loads(told[0]))


def run(quick: bool) -> list[Row]:
    rows, stalls = [], {}
    for ranks in (1, 2):
        told = measured(ranks, quick)
        rates = {name: [told["tokens"] / took for took in told[name]] for name in ("ours", "plain")}
        name = f"training step of {ranks} rank{'s' if ranks > 1 else ''}"
        limit = "plain DDP of the same module" if ranks > 1 else "a plain step of the same module"
        note = f"batch {BATCH}, micro-batches of {MICRO_BATCH}, gloo, one thread a rank"
        rows.append(
            against(name, rates["ours"], rates["plain"], "tokens/s", limit_name=limit, goal=0.9, note=note)
        )
        if told["sharded"]:
            of_sharded = [told["tokens"] / took for took in told["sharded"]]
            limit, note = "the same, not sharded", f"{note}; weights gathered, gradients divided"
            name = f"{name}, sharded"
            rows.append(
                against(name, of_sharded, rates["ours"], "tokens/s", limit_name=limit, goal=0.8, note=note)
            )
        stalls[ranks] = told["stall"]
    alone = statistics.median(stalls[1])
    rows.append(
        row(
            "checkpoint stall, 2 ranks",
            1000 * statistics.median(stalls[2]),
            "ms",
            limit=1000 * alone,
            limit_name="the same with 1 rank",
            ratio=statistics.median(stalls[2]) / alone,
            note="the copy, and the digests by which ranks compare their weights",
        )
    )
    return rows


if __name__ == "__main__":
    if "--rank" in sys.argv:
        _, _, turns, steps = sys.argv
        print(json.dumps(rank_of(place_in(os.environ), int(turns), int(steps))))
    else:
        print(json.dumps(run("--quick" in sys.argv), indent=1))
