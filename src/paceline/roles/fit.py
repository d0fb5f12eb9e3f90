"""What of a planned run does not fit, on this machine or another, each with what to change. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from paceline.capture.backpressure import check_feasible
from paceline.config.run import RunConfig
from paceline.engines.served.settings import ServedSection
from paceline.engines.vllm.settings import VllmSection
from paceline.errors import ConfigError
from paceline.features.ownership import bytes_of
from paceline.methods.settings import MethodSection, MicroBatch
from paceline.roles.evaluation_schedule import EVALUATOR
from paceline.roles.footprint import Disk, Process, SampleSizes, standing, target_bytes_at_least
from paceline.roles.forecast import threads_of
from paceline.roles.machine import Machine
from paceline.roles.plan import RunPlan
from paceline.roles.preflight import CHECKS, ON_THIS_MACHINE, Finding
from paceline.roles.trainers import trainer_roles
from paceline.target.folder import read_config, refuse_quantised
from paceline.target.shape import LayerSizes, TargetShape
from paceline.training.settings import TrainingSection

SERVER_SHARE = 0.9  # of a GPU's memory that weights may take: keys and values need the rest
# Of a vLLM server: without the first argument it takes SERVER_SHARE; the second one replaces the share.
UTILISATION, CACHE_BYTES = "--gpu-memory-utilization", "--kv-cache-memory-bytes"
LIBRARIES = 1 << 30  # bytes of a GPU that CUDA and its libraries take in each process


@dataclass(frozen=True)
class Layout:
    """A planned run on a machine. `elsewhere`: it is not this one."""

    plan: RunPlan
    machine: Machine
    shape: TargetShape
    sizes: SampleSizes
    processes: list[Process]
    disk: Disk
    elsewhere: bool


def findings(layout: Layout) -> Iterator[Finding]:
    """Refusals are what a start refuses, or what ends the run later."""
    plan = layout.plan
    for note in plan.notes:
        yield Finding(f"{note[:1].upper()}{note[1:]}.", "")
    yield from budget(plan.config, layout.sizes)
    yield from _quantised(plan.config, layout.shape)
    yield from _first_samples(plan)
    for check in CHECKS:
        if not (layout.elsewhere and check in ON_THIS_MACHINE):
            try:
                yield from check(plan)
            except ConfigError as error:
                yield Finding(error.what, error.next, refuses=True)
    yield from _devices(layout)
    yield from _gpu_memory(layout)
    yield from _beside_a_server(layout)
    if not layout.elsewhere:
        yield from _host_memory(layout)
        yield from _processors(layout)
        yield from _disk(layout)
        yield from _one_disk(layout)


def budget(config: RunConfig, sizes: SampleSizes) -> Iterator[Finding]:
    """Whether the features' budget lets both sides go on."""
    try:
        check_feasible(
            budget_bytes=config.features.budget_mib << 20,
            sample_bytes=sizes.bytes_max,
            group_size=config.capture.group_size,
            window_size=sizes.collected.samples,
            budget_samples=config.features.budget_samples,
            window_bytes=sizes.collected.num_bytes,
        )
    except ConfigError as error:
        yield Finding(error.what, f"{error.next[:1].upper()}{error.next[1:]}", refuses=True)


def _quantised(config: RunConfig, shape: TargetShape) -> Iterator[Finding]:
    if shape.quantised and not isinstance(config.engine, ServedSection):
        try:
            refuse_quantised(config.target.model, read_config(config.target.model))
        except ConfigError as error:
            yield Finding(error.what, f"{error.next[:1].upper()}{error.next[1:]}", refuses=True)


def _first_samples(plan: RunPlan) -> Iterator[Finding]:
    wanted, there = plan.config.method.first_samples, plan.num_samples or 0
    if there < wanted:
        yield Finding(
            f"The run has {there} samples, and method.first_samples is {wanted}: the first weights are made "
            "of all of them, before any step.",
            "Add data, raise data.rounds, or lower method.first_samples.",
        )


def _devices(layout: Layout) -> Iterator[Finding]:
    """Compare the devices that the run file names with those of the machine."""
    if layout.machine.has_unknown_gpus:
        yield Finding(
            "There are GPUs, and no nvidia-smi that tells how many and how large: they are not compared.",
            "paceline doctor shows what torch can use.",
        )
        return
    there = len(layout.machine.gpus)
    for process in layout.processes:
        for device in process.device.split(", "):
            number = device.removeprefix("cuda:")
            if device.startswith("cuda:") and int(number) >= there:
                has = f"has {there} GPUs" if there else "has no GPU that its driver shows"
                yield Finding(
                    f"The {process.role} is to run on {device}, and this machine {has}.",
                    "Name devices that exist (engine, training.device, evaluation.device), or plan for "
                    "another machine: --gpu H200.",
                    refuses=True,
                )


def _gpu_memory(layout: Layout) -> Iterator[Finding]:
    """Add up what the processes put on each GPU: what is always there, what samples of the data's lengths
    take beside it, and the largest ones."""
    gpus = layout.machine.gpus
    for number, there in sorted(_on_gpus(layout.processes).items()):
        if number >= len(gpus):
            continue
        room, gpu = gpus[number].memory_bytes * SERVER_SHARE, _described(layout, number)
        fixed, about = _always(there), _about(there)
        most = fixed + sum(process.activations_max or 0 for process in there)
        if fixed > room:
            yield Finding(
                f"{gpu}, and weights and optimizer on it take {_gib(fixed)} without activations and caches.",
                "Give the engine more devices (engine.devices), training another one (training.device), or "
                "choose a smaller or quantised target.",
                refuses=True,
            )
        elif about > room:
            yield Finding(
                f"{gpu}, and what runs on it takes about {_gib(about)} at the lengths of the data, "
                f"{_gib(about - fixed)} of it activations and caches: it would end out of memory.",
                _what_to_lower(layout, there),
                refuses=True,
            )
        elif most > room:
            yield Finding(
                f"{gpu}. That is enough for samples as long as the data's ({_gib(about)}), and not for the "
                f"largest that the run file allows ({_gib(most)}).",
                _what_to_lower(layout, there, largest=True),
            )


def _on_gpus(processes: Sequence[Process]) -> dict[int, list[Process]]:
    """The processes on each GPU whose memory can be told."""
    found = dict[int, list[Process]]()
    for process in processes:
        for device in process.device.split(", "):
            if device.startswith("cuda:") and process.memory_bytes is not None:
                found.setdefault(int(device.removeprefix("cuda:")), []).append(process)
    return found


def _always(processes: Sequence[Process]) -> int:
    """Bytes of weights, optimizers and libraries."""
    return sum((process.memory_bytes or 0) + LIBRARIES for process in processes)


def _about(processes: Sequence[Process]) -> int:
    """Bytes with activations and caches at the lengths of the data."""
    return _always(processes) + sum(process.activations_about or 0 for process in processes)


def _described(layout: Layout, number: int) -> str:
    gpu = layout.machine.gpus[number]
    return f"cuda:{number} ({gpu.name}) has {_gib(gpu.memory_bytes)}"


def _what_to_lower(layout: Layout, processes: Sequence[Process], *, largest: bool = False) -> str:
    """By the roles on a GPU, first the ones that take most for samples as the data's, or for the largest."""
    told, config = [], layout.plan.config
    size = "activations_max" if largest else "activations_about"
    for process in sorted(processes, key=lambda one: -(getattr(one, size) or 0)):
        if process.role in trainer_roles(config):
            told += _of_a_micro_batch(config.training)
            if _would_save(config.method, layout.shape.sizes):
                told[-1] += " (or set method.recompute: true)"
        elif process.activations_max:
            told += ["capture.group_size"] * (config.capture.group_size > 1) + ["data.max_answer_tokens"]
    advice = [f"Lower {' or '.join(dict.fromkeys(told))}"] if told else []
    if any(process.role == EVALUATOR for process in processes):
        advice.append("evaluate at the end alone (evaluation.every_steps: 0)")
    are_trainers = [process.role in trainer_roles(config) for process in processes]
    if any(are_trainers) and not all(are_trainers):
        advice.append("give training another device (training.device)")
    return f"{', or '.join(advice)}."


def _would_save(method: MethodSection, target: LayerSizes) -> bool:
    """Whether method.recompute is off, and on would save more than what the figures are wrong by."""
    if getattr(method, "recompute", True):
        return False
    batch = MicroBatch(1.0, 1024.0, 1024.0)
    on = method.model_copy(update={"recompute": True})
    return on.activation_bytes(target, batch) < 0.9 * method.activation_bytes(target, batch)


def _of_a_micro_batch(training: TrainingSection) -> list[str]:
    if training.micro_batch_tokens is not None:
        return ["training.micro_batch_tokens"]
    if training.micro_batch_size > 1:
        return ["training.micro_batch_size"]
    return ["data.max_prompt_tokens", "data.max_answer_tokens"]  # a sample is the least


def _beside_a_server(layout: Layout) -> Iterator[Finding]:
    """A vLLM server takes its share of a GPU at the start, whatever the target's size is."""
    engine, gpus = layout.plan.config.engine, layout.machine.gpus
    if not isinstance(engine, VllmSection) or not engine.managed:
        return
    share = _share_of_server(engine.args)
    if share is None:
        return
    for number, there in sorted(_on_gpus(layout.processes).items()):
        beside = [process for process in there if process.role != f"{engine.name} server"]
        if not beside or number not in engine.devices or number >= len(gpus):
            continue
        needed = _about(beside)
        if needed > (1.0 - share) * gpus[number].memory_bytes:
            lower = _what_to_lower(layout, beside)
            roles, several = " and the ".join(process.role for process in beside), len(beside) > 1
            gpu = f"{gpus[number].name}, {_gib(gpus[number].memory_bytes)}"
            left = math.floor(100 * (1.0 - needed / gpus[number].memory_bytes)) / 100
            weights = sum(process.memory_bytes or 0 for process in there if process not in beside)
            is_enough = left * gpus[number].memory_bytes * SERVER_SHARE > weights + LIBRARIES
            of_server = f"the server's share in engine.args: [{UTILISATION}, '{left:.2f}'], or "
            yield Finding(
                f"The server takes {share:.0%} of cuda:{number} ({gpu}), and the {roles} "
                f"{'need' if several else 'needs'} about {_gib(needed)} of it.",
                f"Lower {of_server if is_enough else ''}what the {roles} {'need' if several else 'needs'}: "
                f"{lower[:1].lower()}{lower[1:-1]}; or give {'them' if several else 'it'} another device.",
                refuses=True,
            )


def _share_of_server(args: Sequence[str]) -> float | None:
    """Of a GPU's memory, as the arguments say; None where they say bytes. The server reads _ as -."""
    share = SERVER_SHARE
    for place, argument in enumerate(args):
        name, _, value = argument.partition("=")
        if name.replace("_", "-") == CACHE_BYTES:
            return None
        if name.replace("_", "-") == UTILISATION:
            with suppress(ValueError):
                share = float(value or "".join(args[place + 1 : place + 2]))
    return share


def _host_memory(layout: Layout) -> Iterator[Finding]:
    there = layout.machine.memory_bytes
    on_host = [p.memory_bytes or 0 for p in layout.processes if p.device == "cpu"]
    config = layout.plan.config
    needed = sum(on_host) + (config.features.host_mib(config.machine.producers) << 20)
    is_loaded = any(p.role == "producer" and p.device == "cpu" and p.memory_bytes for p in layout.processes)
    target = target_bytes_at_least(layout.shape, config, layout.machine) if is_loaded else 0
    if there and needed > there >= target:  # else a check of the start says it of the target alone
        yield Finding(
            f"This machine has {_gib(there)} of memory; weights, optimizer and features take {_gib(needed)}.",
            "Lower features.budget_mib or machine.producers, or choose a smaller target.",
            refuses=True,
        )


def _processors(layout: Layout) -> Iterator[Finding]:
    asked, there = threads_of(layout.plan.config), layout.machine.processors
    if asked > there:
        yield Finding(
            f"The roles compute with {asked} threads, and this machine has {there} processors: they take "
            "turns.",
            "Lower machine.producers, machine.trainers, producer_threads or consumer_threads.",
        )


def _disk(layout: Layout) -> Iterator[Finding]:
    disk = layout.disk
    if disk.total_bytes is not None and disk.free_bytes is not None and disk.total_bytes > disk.free_bytes:
        yield Finding(
            f"The disk of {layout.plan.config.run.directory} has {_gib(disk.free_bytes)} free, and the run "
            f"takes up to {_gib(disk.total_bytes)}.",
            "Free space, set run.directory to another disk, or lower checkpoint.keep.",
            refuses=True,
        )


def _one_disk(layout: Layout) -> Iterator[Finding]:
    """Add up what the run's directory and the features take where one filesystem has both."""
    config, disk = layout.plan.config, layout.disk
    if not config.features.in_directory:
        return
    places = [standing(path) for path in (config.run.directory, config.features.directory)]
    if disk.total_bytes is None or disk.free_bytes is None or len({p.stat().st_dev for p in places}) > 1:
        return
    # The run reuses what an earlier start has left there.
    features = max(0, (config.features.budget_mib << 20) - bytes_of(config.feature_folder))
    needed = disk.total_bytes + features
    if needed > disk.free_bytes >= max(disk.total_bytes, features):
        yield Finding(
            f"{config.run.directory} and features.directory {config.features.directory} lie on one filesystem"
            f", {_gib(disk.free_bytes)} free: the run takes up to {_gib(disk.total_bytes)} there, and its "
            f"features {_gib(features)}.",
            "Free space, lower features.budget_mib or checkpoint.keep, or set one of them to another disk.",
            refuses=True,
        )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
