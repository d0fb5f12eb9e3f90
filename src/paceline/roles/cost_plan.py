"""CostPlan: what a run will take, before anything is started or fetched but the target's configuration.

`paceline plan` shows it, or prints it as JSON (docs/first-hour.md has the fields). It loads no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from paceline.config.run import RunConfig
from paceline.errors import ConfigError
from paceline.roles.fit import Layout, findings
from paceline.roles.footprint import (
    Disk,
    Process,
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
from paceline.section import Section
from paceline.target.hub import described_target, is_of_hub
from paceline.target.settings import TargetSection
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
    `answers_known` says whether the data's own answers tell how long answers are."""

    states: int
    tokens_max: int
    bytes_max: int
    prompt_tokens_about: float
    answer_tokens_about: float
    bytes_about: float
    answers_known: bool


class FeaturesTold(Section):
    """`traffic_mib_per_s`: through the store at the run's speed, written and read; None if it is unknown."""

    store: str
    directory: str
    traffic_mib_per_s: float | None


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
    plan = plan_run(config, _finder(target_config))
    machine = _machine_with(gpu) if gpu else this_machine()
    shape = read_shape(plan.config.target.model)
    facts = facts_of(plan.config, shape, machine)
    lengths = mean_lengths(plan.prompts, config.data, plan.config.target.model)
    sizes = sample_sizes(plan, facts, lengths)
    trained = config.method.num_parameters(shape.sizes)
    processes = processes_of(config, shape, machine, trained)
    download = not gpu and is_of_hub(config.target) and not shape.has_weights
    disk = disk_of(plan, shape, lengths, trained, download)
    disk = disk.model_copy(update={"free_bytes": None}) if gpu else disk
    sheet = data_sheet(machine.gpus[0].name) if machine.gpus else None
    rates = rates_of(config, shape, lengths, sheet if _uses_gpu(processes) else None, trained)
    samples = plan.num_samples or 0
    time = time_of(config, samples, lengths, rates, processes, machine.processors)
    traffic = None
    if time.total_s:
        moved = samples * sizes.bytes_about * (1 + config.training.passes)
        traffic = moved / time.total_s / 2**20
    answers = lengths.answers
    return CostPlan(
        machine=_described(machine, gpu),
        run=RunTold(
            name=config.run.name,
            directory=str(config.run.directory),
            samples=samples,
            rounds=config.data.rounds,
            passes=config.training.passes,
            steps=_steps(plan, lengths),
            batch_size=config.training.batch_size,
            tokens_per_step=config.training.tokens_per_step,
        ),
        target=_target(config, shape, sizes.dtype),
        draft=DraftTold(method=config.method.name, parameters=trained),
        processes=processes,
        sample=SampleTold(
            states=sizes.layers,
            tokens_max=sizes.tokens_max,
            bytes_max=sizes.bytes_max,
            prompt_tokens_about=round(lengths.prompt, 1),
            answer_tokens_about=round(answers, 1),
            bytes_about=round(sizes.bytes_about),
            answers_known=lengths.answers_known,
        ),
        window=window_of(config, sizes),
        features=FeaturesTold(
            store=config.features.store,
            directory=str(config.features.directory),
            traffic_mib_per_s=traffic,
        ),
        disk=disk,
        time=time,
        findings=[
            Told(what=found.what, next=found.next, refuses=found.refuses)
            for found in findings(Layout(plan, machine, shape, sizes, processes, disk, elsewhere=bool(gpu)))
        ],
    )


def _steps(plan: RunPlan, lengths: Lengths) -> int:
    known, training = plan.num_steps([plan.stretch]), plan.config.training
    if known is not None:
        return known[-1]
    steps = math.ceil((plan.num_samples or 0) * training.passes / samples_per_step(training, lengths))
    return min(steps, training.max_steps or steps)


def _finder(target_config: Path | None) -> Callable[[TargetSection], TargetSection]:
    if target_config is not None:
        return lambda target: target.model_copy(update={"model": target_config, "revision": None})

    def of_the_hub(target: TargetSection) -> TargetSection:
        try:
            return described_target(target)
        except ConfigError as error:
            other = "or give a folder with its config.json and tokenizer: --target-config FOLDER."
            raise ConfigError(error.what, why=error.why, next=f"{error.next.rstrip('.')}; {other}") from error

    return of_the_hub


def _machine_with(gpu: str) -> Machine:
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
