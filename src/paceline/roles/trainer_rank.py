"""A process that trains as one of several ranks: it joins them; every rank but 0 follows rank 0 to its end.

Ranks must train the same thing: before anything else they compare their run files, their targets, and the
versions of what computes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from paceline.config.load import binding
from paceline.config.run import RunConfig
from paceline.errors import ConfigError
from paceline.precision import resolve_device, torch_dtype
from paceline.roles.plan import RunPlan, refuse_unfit_ranks
from paceline.target.head import TargetHead
from paceline.target.version import TargetVersion
from paceline.telemetry import EventLog
from paceline.training.checkpoint import CheckpointFolder
from paceline.training.determinism import compute_deterministically
from paceline.training.group import Group
from paceline.training.link import Place, meet
from paceline.training.part_writing import PartWriter, not_shared
from paceline.training.ranks import Follower, hear_begin
from paceline.training.settings import TrainerSettings
from paceline.training.torch_learner import TorchLearner
from paceline.training.worker import Worker

GPU = "the GPU"  # which no two ranks may have in common


def alone(trainers: int) -> str:
    return (
        f"machine.trainers is {trainers}, and this consumer trains alone. `paceline train` starts all of "
        f"them, and so does torchrun --nproc-per-node {trainers} -m paceline consume RUN.yaml"
    )


def trainer_settings(
    config: RunConfig, totals: Sequence[int] | None, place: Place | None = None
) -> TrainerSettings:
    """`totals`: the optimizer steps of the whole run, as it began and after each extension; None: unknown."""
    device = device_of(config, place)
    dtype = torch_dtype(config.method.dtype, device)
    totals = totals or []
    return TrainerSettings(
        total_steps=totals[-1] if totals else None,
        totals_before=tuple(totals[:-1]),
        first_samples=config.method.first_samples,
        training=config.training.model_copy(update={"device": str(device)}),
        checkpoint=config.checkpoint,
        seed=config.run.seed,
        autocast_dtype=torch.bfloat16 if dtype is torch.bfloat16 else None,
        sharded=config.machine.shard,
    )


def device_of(config: RunConfig, place: Place | None) -> torch.device:
    """The run file's device; of the ranks on one host, each takes the next one. Raises ConfigError."""
    device = resolve_device(config.training.device)
    if place is None or device.type != "cuda":
        return device
    if place.on_host is None:
        raise ConfigError(
            f"The launcher does not tell rank {place.rank} which of its host's ranks it is.",
            why="Each rank of a host takes the next CUDA device, so two of them could take the same one.",
            next="start with torchrun, or set LOCAL_RANK for every rank: 0, 1 and so on, on each host.",
        )
    return resolve_device(f"cuda:{(device.index or 0) + place.on_host}")


def joined(config: RunConfig, place: Place) -> Group:
    """All ranks, once they are there and agree. Raises RanksError, ConfigError."""
    refuse_unfit_ranks(config, place.ranks)
    device = device_of(config, place)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    group = Group(place, timeout_s=config.machine.trainer_timeout_s, device=device)
    target = TargetVersion.of(config.target.model)
    mine = {
        **binding(config),
        "the number of ranks": place.ranks,
        "machine.shard": config.machine.shard,
        "the target's files": target.model,
        "the tokenizer's files": target.tokenizer,
        "the kind of device": device.type,
        "the numbers' type": str(torch_dtype(config.method.dtype, device)).removeprefix("torch."),
        "the version of Paceline": version("paceline"),
        "the version of torch": str(torch.__version__),
    }
    said = [json.loads(one) for one in meet(group, "join", json.dumps({**mine, GPU: _gpu(device)}).encode())]
    gpus = [one.pop(GPU, "") for one in said]
    _refuse_differences(said)
    _refuse_one_gpu_for_two(gpus)
    return group


def _gpu(device: torch.device) -> str:
    """Which one it is, among all of all hosts; "" for the CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def _refuse_one_gpu_for_two(gpus: Sequence[str]) -> None:
    """Raise ConfigError on every rank. `gpus`: of each rank, "" for none."""
    for rank, gpu in enumerate(gpus):
        if gpu and gpus.index(gpu) < rank:
            raise ConfigError(
                f"Ranks {gpus.index(gpu)} and {rank} take one GPU, {gpu}.",
                why="Each rank needs its own: NCCL joins no two on one device. Nothing was changed.",
                next="start with torchrun, or set LOCAL_RANK for every rank: 0, 1 and so on, on each host.",
            )


def _refuse_differences(ranks: Sequence[Mapping[str, Any]]) -> None:
    """Raise ConfigError on every rank, if one differs."""
    first = ranks[0]
    for rank, other in enumerate(ranks):
        for name in sorted(first.keys() | other.keys()):
            if first.get(name) != other.get(name):
                raise ConfigError(
                    f"Rank {rank} and rank 0 differ in {name}: {other.get(name)} and {first.get(name)}.",
                    why="Together they would train a mixture of both. Nothing was changed.",
                    next="give all ranks the same run file, the same target and the same installation.",
                )


def follow(
    plan: RunPlan, events: EventLog, should_stop: Callable[[], bool], place: Place | None = None
) -> None:
    """Train as a rank other than 0, for as long as rank 0 says. Raises RanksError if it is lost."""
    assert place is not None, "it has a rank"
    config = plan.config
    compute_deterministically(config.machine.consumer_threads)
    group = joined(config, place)
    told = hear_begin(group)
    if told is None:
        return
    events.write("ranks", ranks=group.size, rank=group.rank, epoch=told["epoch"])
    method, head = config.method.build(), TargetHead.load(config.target.model)
    settings = trainer_settings(config, told["totals"], place)
    # Each host may have mounted a shared folder in a place of its own.
    folder = config.feature_folder.with_name(told["features"])
    features = config.features.build(folder, owner=False)
    # Each host has a run's folder of its own, and sharded ranks write into that of rank 0.
    checkpoints = Path(told["checkpoints"]) if settings.sharded else None
    if checkpoints is not None and not checkpoints.is_dir():
        raise not_shared(group.rank, checkpoints)
    # One thread writes this rank's part of checkpoints, the other reads the next step's features.
    with ThreadPoolExecutor(2, thread_name_prefix="paceline-rank") as executor:
        worker = Worker(TorchLearner(method, head, settings, group), features, executor)
        writer = None
        if checkpoints is not None:
            writer = PartWriter(group.rank, CheckpointFolder(checkpoints, config.run.name), executor)
        Follower(worker, group, should_stop, writer).follow()
    features.close()
    group.leave()
