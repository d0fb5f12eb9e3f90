"""RunPlan: what each role will do, derived from a run file. It loads no torch and starts nothing."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from paceline.config.run import RunConfig
from paceline.data.kept import KeptAnswers
from paceline.data.mixture import Mixture
from paceline.data.opening import Data, open_data, open_held_out
from paceline.data.prompts import asked
from paceline.data.source import RunPrompts, Stretch
from paceline.errors import ConfigError
from paceline.roles.committed import committed_in
from paceline.roles.trainers import trainer_roles
from paceline.roles.workers import started_roles
from paceline.target.folder import quantisation, read_config
from paceline.target.hub import local_target
from paceline.target.settings import TargetSection

REPEATS_NAMED = 50


@dataclass(frozen=True)
class RunPlan:
    """`given`: the run file; `config`: the same with the target's local folder, and its commit if it comes
    from the hub. `num_samples` = prompts x rounds; None for a stream without an end.

    `evaluation_obstacle`: why the evaluation cannot decode with this target; empty if it can.
    """

    given: RunConfig
    config: RunConfig
    prompts: Data | KeptAnswers
    num_samples: int | None
    evaluation_obstacle: str = ""

    @property
    def notes(self) -> list[str]:
        """What the user should know before the run starts."""
        measured = [f"the draft will not be measured: {self.evaluation_obstacle}"]
        return [*self.prompts.notes, *(measured if self.evaluation_obstacle else [])]

    @property
    def stretch(self) -> Stretch:
        """How much the sources have now."""
        return self.prompts.stretch if isinstance(self.prompts, Mixture) else self.prompts.size

    def ordered(self, stretches: Sequence[Stretch]) -> tuple[Data | KeptAnswers, list[int]]:
        """The prompts in the order of a run that has grown so, and how many there are after each stretch."""
        if isinstance(self.prompts, Mixture) and stretches:
            grown = self.prompts.grown(stretches)
            return grown, grown.ends
        return self.prompts, [size if isinstance(size, int) else sum(size) for size in stretches]

    def source(self, stretches: Sequence[Stretch] = ()) -> RunPrompts:
        """Every prompt of every round, in run order, with its task id `round/prompt`; see `bind_run`."""
        prompts, sizes = self.ordered(stretches)
        return RunPrompts(prompts, self.config.data.rounds, sizes)

    def num_steps(self, stretches: Sequence[Stretch]) -> list[int] | None:
        """The optimizer steps of the whole run: as it began, and after each extension.

        None if they depend on the lengths of the samples, which are not captured yet.
        """
        training, totals, before = self.config.training, [0], 0
        if training.tokens_per_step is not None:
            return None
        for size in self.ordered(stretches)[1]:
            visits = (size - before) * self.config.data.rounds * training.passes
            totals.append(totals[-1] + math.ceil(visits / training.batch_size))
            before = size
        most = training.max_steps
        return [total if most is None else min(total, most) for total in totals[1:]]


def plan_run(
    given: RunConfig, find_target: Callable[[TargetSection], TargetSection] = local_target
) -> RunPlan:
    """Find the target, and check what can be checked before a process starts. Raises ConfigError.

    `find_target`: gives the section with the target's folder; the weights need not be in it.
    """
    config = given.model_copy(update={"target": find_target(given.target)})
    obstacle = _target_obstacle(config)
    file = open_held_out(config.evaluation.prompts)
    heldout = {
        key for prompt in file.read(0, file.size) for key, _ in asked(prompt)[-1:] if not prompt.broken
    }
    index_path = config.run.directory / "prompts.index.json"
    other, sources = config.data.other_run, config.data.sources
    prompts = (
        open_data(sources, seed=config.run.seed, heldout=heldout, index_path=index_path)
        if other is None
        else KeptAnswers(other, committed_in(other))
    )
    _refuse_shared(config, prompts)
    _refuse_repeats(config, prompts)
    refuse_unfit_ranks(config, config.machine.trainers)
    num_samples = prompts.size * config.data.rounds
    return RunPlan(given, config, prompts, num_samples, obstacle)


def _target_obstacle(config: RunConfig) -> str:
    """Why the evaluation cannot decode with the target; "" if it can.

    Raises ConfigError if the run file refuses such a target, or if no prompt fits its positions.
    """
    target = read_config(config.target.model)
    positions, answer = target.get("max_position_embeddings"), config.data.max_answer_tokens
    if isinstance(positions, int) and positions < 2:
        raise ConfigError(
            f"{config.target.model / 'config.json'} says that the target has {positions} positions "
            "(max_position_embeddings).",
            why="A prompt and an answer need two at least.",
            next="correct it, or fetch the model again.",
        )
    # A prompt that does not fit beside an answer fails alone; with this setting no prompt fits.
    if isinstance(positions, int) and answer >= positions:
        raise ConfigError(
            f"data.max_answer_tokens is {answer}, and the target has {positions} positions.",
            why="States and logits beyond the positions that a target was trained with are meaningless.",
            next=f"set data.max_answer_tokens to less than {positions}, prompts included.",
        )
    method = quantisation(target)
    obstacle = f"the target is quantised ({method}), and plain weights are decoded with" if method else ""
    if obstacle and config.evaluation.unsupported == "refuse":
        raise ConfigError(
            f"The evaluation cannot decode with {config.target.model}: {obstacle}.",
            why="evaluation.unsupported is refuse; nothing was started.",
            next="set evaluation.unsupported: skip to train without measuring, or choose another target.",
        )
    return obstacle


def _refuse_shared(config: RunConfig, data: Data | KeptAnswers) -> None:
    for source in data.sources:
        if source.index.shared:
            raise ConfigError(
                f"{source.index.shared} prompts of {config.evaluation.prompts} are also in {source.name}.",
                why="An acceptance length measured on training prompts means nothing.",
                next=f"remove them from one of the files; the first is {source.index.first_shared!r}.",
            )


def _refuse_repeats(config: RunConfig, data: Data | KeptAnswers) -> None:
    if config.data.duplicates != "refuse":
        return
    for source in data.sources:
        unit, repeated = source.records.unit, source.repeated
        if repeated:
            named = ", ".join(str(number) for number in repeated[:REPEATS_NAMED])
            more = f" and {len(repeated) - REPEATS_NAMED} more" if len(repeated) > REPEATS_NAMED else ""
            raise ConfigError(
                f"{len(repeated)} {unit}s of {source.name} repeat an earlier one: {unit}s {named}{more}.",
                why="data.duplicates is 'refuse'. Nothing was started.",
                next=f"delete these {unit}s, or set data.duplicates to 'once', which takes each prompt once.",
            )


def refuse_unfit_ranks(config: RunConfig, ranks: int) -> None:
    """Raise ConfigError if a step has fewer samples than ranks, or they cannot divide the optimizer."""
    if config.machine.shard and config.training.optimizer.name != "adamw":
        raise ConfigError(
            f"machine.shard does not go with training.optimizer {config.training.optimizer.name}.",
            why="It makes whole matrices orthogonal, in bfloat16. Over rows of several ranks it would train "
            "other weights, by more than the order of sums.",
            next="leave machine.shard out, or start a new run with training.optimizer: adamw.",
        )
    batch = config.training.batch_size
    if ranks > batch and config.training.tokens_per_step is None:
        raise ConfigError(
            f"{ranks} ranks would divide training.batch_size {batch} among them.",
            why="It is the batch of all ranks together, and some of them would have nothing to train.",
            next=f"set machine.trainers to {batch} or less, or start a new run with a larger batch_size.",
        )


def window_size(config: RunConfig) -> int:
    """The most samples that must be resident before the consumer can free any.

    A step that is cut by its tokens comes to that: see `build_disagg_online_producer`.
    """
    training = config.training
    blocks = (training.passes + 1) * config.capture.group_size
    step = training.batch_size if training.tokens_per_step is None else 0
    return max(blocks + step, config.method.first_samples)


def processors_of_roles(config: RunConfig) -> dict[str, list[int]]:
    """Processors for each role that `paceline train` starts: disjoint sets if there are enough, else all."""
    available, machine = sorted(os.sched_getaffinity(0)), config.machine
    threads = dict.fromkeys(started_roles(config), machine.producer_threads)
    threads |= dict.fromkeys(trainer_roles(config), machine.consumer_threads)
    if sum(threads.values()) > len(available):
        return dict.fromkeys(threads, available)
    ends = list(accumulate(threads.values()))
    return {role: available[end - threads[role] : end] for role, end in zip(threads, ends, strict=True)}


def spare_processors(config: RunConfig) -> list[int]:
    """Processors that no role uses: for a measurement beside training."""
    return sorted(os.sched_getaffinity(0) - {n for one in processors_of_roles(config).values() for n in one})


def role_environment(threads: int) -> dict[str, str]:
    """The environment of a role's process: threads, model libraries offline, deterministic CUDA products."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        # Threads that spin while they wait slow a role down many times where other work has the processors.
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # torch.use_deterministic_algorithms asks for it
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONOPTIMIZE": "",  # 2 removes docstrings, and transformers needs them to load a model
    }


def log_path(config: RunConfig, role: str) -> Path:
    return config.run.directory / "logs" / f"{role}.log"


def events_path(config: RunConfig, role: str) -> Path:
    return config.run.directory / "events" / f"{role}.jsonl"
