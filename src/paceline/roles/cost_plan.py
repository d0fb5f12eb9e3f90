"""CostPlan: what a run will take, before anything is started or fetched but the target's configuration.

`paceline plan` shows it, or prints it as JSON (docs/first-hour.md has the fields). It loads no torch.
"""

from __future__ import annotations

import math
from pathlib import Path

from paceline.config.run import RunConfig
from paceline.features.settings import SharedMemorySection
from paceline.roles.device_memory import with_activations
from paceline.roles.fit import Layout, findings
from paceline.roles.footprint import (
    Disk,
    Process,
    SampleSizes,
    Window,
    disk_of,
    facts_of,
    processes_of,
    sample_sizes,
    window_of,
)
from paceline.roles.forecast import Time, samples_per_step, time_of
from paceline.roles.lengths import Lengths, mean_lengths
from paceline.roles.machine import Gpu, Machine, this_machine
from paceline.roles.plan import RunPlan, plan_run
from paceline.roles.rates import data_sheet, named_data_sheet, rates_of
from paceline.roles.target_at_hand import finder
from paceline.section import Section
from paceline.target.hub import is_of_hub
from paceline.target.shape import TargetShape, read_shape

GPUS = 8  # of another machine that is planned for


class Told(Section):
    """A finding of the plan. `refuses`: the run would not start, or not come to its end."""

    what: str
    next: str
    refuses: bool


class RunTold(Section):
    """`steps`: about, if each takes `tokens_per_step` tokens instead of `batch_size` samples."""

    name: str
    directory: str
    samples: int
    rounds: int
    passes: int
    steps: int
    batch_size: int
    tokens_per_step: int | None = None


class TargetTold(Section):
    """`has_weights`: whether they are there; else `weights_bytes` is estimated from the sizes."""

    model: str
    model_type: str
    layers: int
    hidden_size: int
    parameters: int
    active_parameters: int
    weights_bytes: int
    has_weights: bool
    dtype: str
    quantised: str


class DraftTold(Section):
    method: str
    parameters: int | None


class SampleTold(Section):
    """`states`: of every token. `*_max`: what is reserved; `*_about`: at the lengths of the data, where
    `answers_known` says whether the data's own answers tell how long answers are. `narrowed`: the features
    that are stored in float8 (method.transfer)."""

    states: int
    narrowed: list[str]
    tokens_max: int
    bytes_max: int
    prompt_tokens_about: float
    answer_tokens_about: float
    bytes_about: float
    answers_known: bool


class FeaturesTold(Section):
    """`traffic_mib_per_s`: through the store at the run's speed, written and read; `network_mib_per_s`: how
    much of it leaves the host, if `directory` lies on another one. None: unknown."""

    store: str
    directory: str
    traffic_mib_per_s: float | None
    network_mib_per_s: float | None


class CostPlan(Section):
    version: int = 1
    machine: str
    run: RunTold
    target: TargetTold
    draft: DraftTold
    processes: list[Process]
    sample: SampleTold
    window: Window
    features: FeaturesTold
    disk: Disk
    time: Time
    findings: list[Told]

    @property
    def fits(self) -> bool:
        return not any(finding.refuses for finding in self.findings)


def cost_plan(config: RunConfig, *, gpu: str = "", target_config: Path | None = None) -> CostPlan:
    """`gpu`: plan for a machine with such GPUs instead of this one. `target_config`: a folder with the
    target's config.json and tokenizer, where target.model is not at hand.

    Raises ConfigError for a run file that no machine can run.
    """
    plan = plan_run(config, finder(target_config))
    machine = machine_with(gpu) if gpu else this_machine()
    shape = read_shape(plan.config.target.model)
    lengths = mean_lengths(plan.prompts, config.data, plan.config.target.model)
    sizes = sample_sizes(plan, facts_of(plan.config, shape, machine), lengths)
    trained = config.method.num_parameters(shape.sizes)
    processes = processes_of(config, shape, machine, trained)
    disk = _disk(plan, shape, lengths, trained, gpu)
    sheet = data_sheet(machine.gpus[0].name) if machine.gpus and _uses_gpu(processes) else None
    rates = rates_of(config, shape, lengths, sheet, trained)
    time = time_of(config, plan.num_samples or 0, lengths, rates, processes, machine.processors)
    processes = with_activations(processes, plan, shape, machine, sizes, lengths, trained)
    layout = Layout(plan, machine, shape, sizes, processes, disk, elsewhere=bool(gpu))
    return CostPlan(
        machine=_described(machine, gpu),
        run=_run(plan, lengths),
        target=_target(config, shape, sizes.dtype),
        draft=DraftTold(method=config.method.name, parameters=trained),
        processes=processes,
        sample=_sample(sizes, lengths),
        window=window_of(config, sizes),
        features=_features(plan, sizes, time),
        disk=disk,
        time=time,
        findings=[
            Told(what=found.what, next=found.next, refuses=found.refuses) for found in findings(layout)
        ],
    )


def _run(plan: RunPlan, lengths: Lengths) -> RunTold:
    config = plan.config
    return RunTold(
        name=config.run.name,
        directory=str(config.run.directory),
        samples=plan.num_samples or 0,
        rounds=config.data.rounds,
        passes=config.training.passes,
        steps=_steps(plan, lengths),
        batch_size=config.training.batch_size,
        tokens_per_step=config.training.tokens_per_step,
    )


def _steps(plan: RunPlan, lengths: Lengths) -> int:
    known, training = plan.num_steps([plan.stretch]), plan.config.training
    if known is not None:
        return known[-1]
    steps = math.ceil((plan.num_samples or 0) * training.passes / samples_per_step(training, lengths))
    return min(steps, training.max_steps or steps)


def _sample(sizes: SampleSizes, lengths: Lengths) -> SampleTold:
    return SampleTold(
        states=sizes.layers,
        narrowed=list(sizes.narrowed),
        tokens_max=sizes.tokens_max,
        bytes_max=sizes.bytes_max,
        prompt_tokens_about=round(lengths.prompt, 1),
        answer_tokens_about=round(lengths.answers, 1),
        bytes_about=round(sizes.bytes_about),
        answers_known=lengths.answers_known,
    )


def _features(plan: RunPlan, sizes: SampleSizes, time: Time) -> FeaturesTold:
    features, traffic = plan.config.features, None
    if time.total_s:
        moved = (plan.num_samples or 0) * sizes.bytes_about * (1 + plan.config.training.passes)
        traffic = moved / time.total_s / 2**20
    return FeaturesTold(
        store=features.store,
        directory=features.where,
        traffic_mib_per_s=traffic,
        network_mib_per_s=0.0 if isinstance(features, SharedMemorySection) else traffic,
    )


def _disk(plan: RunPlan, shape: TargetShape, lengths: Lengths, trained: int | None, gpu: str) -> Disk:
    """Of another machine nothing is known of the disk, nor of the hub's cache there."""
    download = not gpu and is_of_hub(plan.given.target) and not shape.has_weights
    disk = disk_of(plan, shape, lengths, trained, download)
    return disk.model_copy(update={"free_bytes": None}) if gpu else disk


def machine_with(gpu: str) -> Machine:
    sheet = named_data_sheet(gpu)
    one = Gpu(sheet.name, int(sheet.gigabytes * 1e9), 8.0)
    return Machine(processors=1 << 16, memory_bytes=0, gpus=(one,) * GPUS, bfloat16=True)


def _uses_gpu(processes: list[Process]) -> bool:
    return all(process.device != "cpu" for process in processes if process.role != "producer")


def _described(machine: Machine, gpu: str) -> str:
    if gpu:
        return f"another one, with {machine.gpus[0].name}s"
    gpus = f", {len(machine.gpus)} x {machine.gpus[0].name}" if machine.gpus else ", no GPU"
    memory = f", {machine.memory_bytes / 2**30:.0f} GiB" if machine.memory_bytes else ""
    return f"this one: {machine.processors} processors{memory}{gpus}"


def _target(config: RunConfig, shape: TargetShape, dtype: str) -> TargetTold:
    return TargetTold(
        model=str(config.target.model),
        model_type=shape.model_type,
        layers=shape.sizes.num_hidden_layers,
        hidden_size=shape.sizes.hidden_size,
        parameters=shape.parameters,
        active_parameters=shape.active_parameters,
        weights_bytes=shape.weights_bytes,
        has_weights=shape.has_weights,
        dtype=dtype,
        quantised=shape.quantised,
    )
