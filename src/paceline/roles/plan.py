"""From a run file to what each role will do. Pure: no torch, no model, nothing is started."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paceline.capture.prompts import Prompt, prompts_digest, read_prompts
from paceline.config.load import flat, refuse_changes
from paceline.config.run import RunConfig
from paceline.errors import ConfigError
from paceline.ledger.facts import CONFIG, PROMPTS_DIGEST
from paceline.ledger.store import MetadataStore


@dataclass(frozen=True)
class RunPlan:
    """`num_samples` = prompts x rounds; `num_steps` = optimizer steps for all their passes."""

    config: RunConfig
    prompts: tuple[Prompt, ...]
    num_samples: int
    num_steps: int

    @property
    def broken_prompts(self) -> list[str]:
        """Why the prompts that will be set aside cannot be used."""
        return [prompt.broken for prompt in self.prompts if prompt.broken]

    @property
    def prompts_digest(self) -> str:
        return prompts_digest(list(self.prompts))

    def tasks(self) -> list[dict[str, Any]]:
        """Every prompt of every round, in run order, with its task id `round/prompt`."""
        return [
            {"task_id": f"{turn}/{prompt.prompt_id}", "payload": prompt.payload}
            for turn in range(self.config.prompts.rounds)
            for prompt in self.prompts
        ]


def plan_run(config: RunConfig) -> RunPlan:
    """Check everything that can be checked before a process starts. Raises ConfigError."""
    prompts = tuple(read_prompts(config.prompts.path))
    heldout = read_prompts(config.evaluation.prompts)
    shared = {p.text for p in prompts if not p.broken} & {p.text for p in heldout if not p.broken}
    if shared:
        raise ConfigError(
            f"{len(shared)} prompts of {config.evaluation.prompts} are also in {config.prompts.path}.",
            why="An acceptance length measured on training prompts says nothing.",
            next=f"remove them from one of the files; the first is {min(shared)!r}.",
        )
    if not (config.target.model / "config.json").is_file():
        raise ConfigError(
            f"There is no model in {config.target.model} (no config.json).",
            why="The producer needs the target's weights in a local folder.",
            next="run `make model`, or set target.model to a Hugging Face model folder.",
        )
    num_samples = len(prompts) * config.prompts.rounds
    num_steps = math.ceil(num_samples * config.training.passes / config.training.batch_size)
    if config.training.max_steps is not None:
        num_steps = min(num_steps, config.training.max_steps)
    return RunPlan(config, prompts, num_samples, num_steps)


def bind_run(plan: RunPlan, store: MetadataStore) -> None:
    """Record what the run is at its first start; refuse another configuration at every later one."""
    facts = store.facts()
    if CONFIG not in facts:  # or another process settles it at this moment
        facts = store.settle_facts({CONFIG: flat(plan.config), PROMPTS_DIGEST: plan.prompts_digest})
    refuse_changes(facts[CONFIG], plan.config)
    if facts[PROMPTS_DIGEST] != plan.prompts_digest:
        raise ConfigError(
            f"The prompts in {plan.config.prompts.path} are not those this run was started with.",
            why="Samples are identified by their place in the file; the run is untouched.",
            next="restore the file, or set a new run.name and run.directory.",
        )


def bind_target(store: MetadataStore, model_version: str, tokenizer_version: str) -> None:
    """Record which target the run captures from; refuse another one, whatever its folder is called."""
    facts, now = store.facts(), {"model_version": model_version, "tokenizer_version": tokenizer_version}
    recorded = {key: facts[key] for key in now if key in facts} or store.settle_facts(now)
    if recorded != now:
        raise ConfigError(
            f"This run captured from target {recorded}, but target.model is now {now}.",
            why="Features of two targets in one draft would make it imitate neither.",
            next="put the old model back, or set a new run.name and run.directory.",
        )


def window_size(config: RunConfig) -> int:
    """The most samples the consumer must have at once before it can free any."""
    blocks = (config.training.passes + 1) * config.capture.group_size
    return max(blocks + config.training.batch_size, config.method.first_samples)


def processors_of_roles(config: RunConfig) -> dict[str, list[int]]:
    """Processors for each role: disjoint where there are enough, all of them where there are not."""
    available = sorted(os.sched_getaffinity(0))
    producer, consumer = config.machine.producer_threads, config.machine.consumer_threads
    if producer + consumer > len(available):
        return {"producer": available, "consumer": available}
    return {"producer": available[:producer], "consumer": available[producer : producer + consumer]}


def role_environment(threads: int) -> dict[str, str]:
    """Environment of a role's process: threads, no network for model libraries, repeatable CUDA products."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # torch.use_deterministic_algorithms asks for it
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def log_path(config: RunConfig, role: str) -> Path:
    return config.run.directory / "logs" / f"{role}.log"


def events_path(config: RunConfig, role: str) -> Path:
    return config.run.directory / "events" / f"{role}.jsonl"
