"""How long a run takes and what binds it, from the rates of its roles. No torch."""

from __future__ import annotations

import math

from paceline.config.run import RunConfig
from paceline.engines.served.settings import ServedSection
from paceline.roles.footprint import Process
from paceline.roles.lengths import Lengths
from paceline.roles.rates import Rates
from paceline.roles.trainers import trainer_roles
from paceline.section import Section
from paceline.training.settings import TrainingSection

EVEN = 1.25  # sides whose times differ by less are both busy


class Time(Section):
    """Seconds; None: unknown, as `source` then says. Evaluations and starts come on top.

    `binds`: "capture", "training", "both" or "". `together`: whether both sides go on at the same time, or
    share processors or a device and take turns. `advice`: what would make the run shorter.
    """

    source: str
    first_s: float | None = None
    capture_s: float | None = None
    training_s: float | None = None
    total_s: float | None = None
    binds: str = ""
    together: bool = True
    advice: str = ""
    capture_tokens_per_s: float | None = None
    train_tokens_per_s: float | None = None
    store_mib_per_s: float | None = None


UNKNOWN = Time(source="unknown: paceline bench RUN.yaml measures it here in two minutes")


def time_of(
    config: RunConfig, num_samples: int, lengths: Lengths, rates: Rates, processes: list[Process], room: int
) -> Time:
    """`room`: processors of the machine."""
    figures = {
        "capture_tokens_per_s": rates.capture_tokens_per_s,
        "train_tokens_per_s": rates.train_tokens_per_s,
        "store_mib_per_s": rates.store_mib_per_s,
    }
    if rates.capture_tokens_per_s is None or rates.train_tokens_per_s is None:
        return UNKNOWN.model_copy(update=figures)
    whole = lengths.answers if config.data.answers == "target" else lengths.sample
    capture_s = num_samples * whole / rates.capture_tokens_per_s / config.machine.producers
    samples = num_samples * config.training.passes
    if config.training.max_steps is not None:
        most = config.training.max_steps * samples_per_step(config.training, lengths)
        samples = min(samples, math.ceil(most))
    training_s = samples * lengths.answers / rates.train_tokens_per_s / config.machine.trainers
    first_s = capture_s * min(1.0, config.method.first_samples / max(1, num_samples))
    together = not _share(config, processes, room)
    beside = max(capture_s - first_s, training_s)
    total = first_s + beside if together else capture_s + training_s
    return Time(
        source=rates.source,
        first_s=first_s,
        capture_s=capture_s,
        training_s=training_s,
        total_s=total,
        binds=_binds(capture_s, training_s),
        together=together,
        advice=_advice(config, capture_s, training_s) if together else _in_turns(config, processes),
        **figures,
    )


def samples_per_step(training: TrainingSection, lengths: Lengths) -> float:
    """About how many samples a step takes."""
    if training.tokens_per_step is None:
        return training.batch_size
    return max(1.0, training.tokens_per_step / lengths.sample)


def _share(config: RunConfig, processes: list[Process], room: int) -> bool:
    """Whether producers and consumer take turns on one GPU or on too few processors."""
    trainers = {one.device for one in processes if one.role in trainer_roles(config)}
    others = {
        part for one in processes if one.role not in trainer_roles(config) for part in one.device.split(", ")
    }
    if trainers != {"cpu"}:
        return bool(trainers & others)
    return "cpu" in others and threads_of(config) > room


def threads_of(config: RunConfig) -> int:
    """Threads that compute at the same time, of all roles."""
    machine = config.machine
    return machine.producers * machine.producer_threads + machine.trainers * machine.consumer_threads


def _binds(capture_s: float, training_s: float) -> str:
    if max(capture_s, training_s) < EVEN * min(capture_s, training_s):
        return "both"
    return "capture" if capture_s > training_s else "training"


def _in_turns(config: RunConfig, processes: list[Process]) -> str:
    """One sentence, for sides that share what computes: nothing that one of them does is free."""
    is_on_gpu = any(one.device != "cpu" for one in processes if one.role in trainer_roles(config))
    helps = ["another GPU for one of them" if is_on_gpu else "more processors"]
    if config.training.passes > 1:
        helps.insert(0, "fewer training.passes")
    if config.data.answers == "target":
        helps.insert(0, "a lower data.max_answer_tokens")
    told = " and ".join(filter(None, (", ".join(helps[:-1]), helps[-1])))
    return f"Both sides take turns, so their times add up: {told} would shorten the run."


def _advice(config: RunConfig, capture_s: float, training_s: float) -> str:
    """One sentence, for a side that waits for the other."""
    if _binds(capture_s, training_s) == "both":
        return ""
    if capture_s > training_s:
        most = max(1, int(config.training.passes * capture_s / training_s))
        more = f"training.passes up to {most} cost no time" if most > config.training.passes else ""
        how = (
            "raise capture.groups_in_flight or the server's devices"
            if isinstance(config.engine, ServedSection)
            else "raise machine.producers where there are processors or GPUs for them"
        )
        if config.data.answers == "target":
            how += ", or lower data.max_answer_tokens"
        return f"The trainer waits for samples: {how}{'; ' if more else ''}{more}."
    fewer = ", and so do fewer training.passes" if config.training.passes > 1 else ""
    on_gpu = config.training.device.startswith("cuda")
    more = "more GPUs (machine.trainers)" if on_gpu else "more consumer_threads, machine.trainers or a GPU"
    return f"The producers wait for the trainer: {more} help{fewer}."
