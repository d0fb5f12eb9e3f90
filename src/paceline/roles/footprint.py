"""What a run takes: bytes of samples, of memory on each device, and of the disk. No torch.

Bytes of samples and of the window are those that the producer reserves (capture/sizing.py). Memory and disk
follow from the counts of parameters; activations are device_memory.py's, and libraries come on top.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from paceline.capture.backpressure import LOW
from paceline.capture.settings import CaptureSettings
from paceline.capture.sizing import Collected, collected_at_most, payload_bytes, reserved_sample_bytes
from paceline.config.run import RunConfig
from paceline.engines.served.settings import ServedSection
from paceline.engines.vllm.settings import VllmSection
from paceline.roles.lengths import Lengths
from paceline.roles.machine import Machine
from paceline.roles.plan import RunPlan, window_size
from paceline.roles.trainers import trainer_roles
from paceline.section import Section
from paceline.target.facts import TargetFacts
from paceline.target.shape import BYTES, LayerSizes, TargetShape
from paceline.telemetry import FILE_BYTES_MAX
from paceline.types import Feature, Rows, States

SLACK = 1.125  # of a slot, on average (features/stores/slots.py)
TOKEN_BYTES = 5  # of a kept answer: a MessagePack number
ANSWER_BYTES = 120  # of its ids and digests
LEDGER_BYTES = 2048  # a sample in flight and its rows; an archived one takes a twentieth
ARCHIVED_BYTES = 100
LEDGER_FILE_BYTES = 5 << 20  # of the smallest run: SQLite's log of 1,000 pages before it is written back
COUNTED_TOO_HIGH = 4  # times: a decoder with experts in some layers only, or layers without an MLP
TRAINED_BYTES = 16  # a parameter: weight, gradient and two moments in float32
PASS_BYTES = 8  # of these in every rank during a step, if the state is sharded: the whole weight and gradient
STATE_BYTES = 12  # a parameter in a checkpoint: weight and two moments


@dataclass(frozen=True)
class SampleSizes:
    """`bytes_max`: what is reserved for each sample. `about`: at the lengths that the data suggests.
    `collected`: what the trainer must have before it can go on. `narrowed`: the features in float8."""

    dtype: str
    layers: int
    narrowed: tuple[str, ...]
    tokens_max: int
    bytes_max: int
    tokens_about: float
    bytes_about: float
    collected: Collected


def engine_device(config: RunConfig, machine: Machine) -> str:
    """Where an engine that is no server computes: by its own section, or as `auto` is read here."""
    return machine.device(str(getattr(config.engine, "device", "auto")))


def facts_of(config: RunConfig, shape: TargetShape, machine: Machine) -> TargetFacts:
    """What the engine will say of the target, as far as a sample's size depends on it."""
    if isinstance(config.engine, ServedSection):
        # A server computes in bfloat16, unless it is told otherwise.
        dtype = "bfloat16" if config.target.dtype == "auto" else str(config.target.dtype)
    else:
        dtype = machine.dtype(config.target.dtype, engine_device(config, machine))
    return TargetFacts.by_sizes(shape.sizes, dtype, max_positions=shape.max_positions)


def sample_sizes(plan: RunPlan, facts: TargetFacts, lengths: Lengths) -> SampleSizes:
    """Raises ConfigError for a target that the method cannot be trained on."""
    config = plan.config
    features = config.method.features(facts)
    capture = CaptureSettings.of(config.capture, config.data, features=features)
    longest = config.data.max_prompt_tokens
    hidden = facts.hidden_size
    about = payload_bytes(
        features, hidden, num_tokens=round(lengths.sample), num_targets=round(lengths.answers)
    )
    bytes_max = reserved_sample_bytes(
        capture, hidden, longest_prompt=longest, has_chats=plan.prompts.has_chats
    )
    return SampleSizes(
        dtype=facts.dtype,
        layers=states_of_a_token(features),
        narrowed=tuple(feature.name for feature in features if feature.narrowed),
        tokens_max=longest + config.data.max_answer_tokens,
        bytes_max=bytes_max,
        tokens_about=lengths.sample,
        bytes_about=about * SLACK + 4096,
        collected=collected_at_most(
            window_size(config), bytes_max, features, hidden, step_tokens=config.training.tokens_per_step
        ),
    )


def states_of_a_token(features: Sequence[Feature]) -> int:
    """How many states of every token are kept."""
    wide = [f.source.layers for f in features if isinstance(f.source, States) and f.rows == Rows.ALL]
    return sum(map(len, wide))


class Window(Section):
    """`samples`: of the largest size, that the budget holds. `collected_samples`: what the trainer must have
    before it can go on. `needed_bytes`: the least budget with which no role waits for ever."""

    budget_bytes: int
    samples: int
    group_samples: int
    collected_samples: int
    needed_bytes: int


def window_of(config: RunConfig, sizes: SampleSizes) -> Window:
    budget = config.features.budget_mib << 20
    collected, group = sizes.collected, config.capture.group_size
    needed = group * sizes.bytes_max + collected.bytes_at_most(sizes.bytes_max)
    return Window(
        budget_bytes=budget,
        samples=_resident_samples(config, sizes.bytes_max),
        group_samples=group,
        collected_samples=collected.samples,
        needed_bytes=int(needed / LOW) + 1,
    )


def _resident_samples(config: RunConfig, sample_bytes: int) -> int:
    """How many samples of that size the budget holds."""
    fitting = (config.features.budget_mib << 20) // sample_bytes
    return min(fitting, config.features.budget_samples or fitting)


class Process(Section):
    """`memory_bytes`: of its device, without activations and libraries; None if it cannot be told.

    `activations_about`: bytes of activations, caches and buffers on a GPU at the lengths that the data
    suggests; `activations_max`: for the largest samples. None: unknown, or not on a GPU.
    """

    role: str
    device: str
    threads: int | None
    what: str
    memory_bytes: int | None
    activations_about: int | None = None
    activations_max: int | None = None


def processes_of(
    config: RunConfig, shape: TargetShape, machine: Machine, trained: int | None
) -> list[Process]:
    """The producers, the server that they ask, and the consumer."""
    engine, threads = config.engine, config.machine
    found = []
    is_served = isinstance(engine, ServedSection)
    device = "" if is_served else engine_device(config, machine)
    for number in range(threads.producers):
        name = "producer" if number == 0 else f"producer-{number}"
        what = "asks the server" if is_served else "the target"
        memory = 0 if is_served else _target_bytes(shape, config, machine)
        found.append(
            Process(
                role=name,
                device=device or "cpu",
                threads=threads.producer_threads,
                what=what,
                memory_bytes=memory,
            )
        )
        if isinstance(engine, VllmSection) and engine.managed:
            devices = ", ".join(f"cuda:{number}" for number in engine.devices) or "cpu"
            share = shape.weights_bytes // max(1, len(engine.devices))
            found.append(
                Process(
                    role=f"{engine.name} server",
                    device=devices,
                    threads=None,
                    what="the target, and its cache of keys and values",
                    memory_bytes=share,
                )
            )
    if is_served and not getattr(engine, "managed", False):
        url = str(getattr(engine, "url", ""))
        found.append(
            Process(
                role=f"{engine.name} server",
                device=url,
                threads=None,
                what="yours",
                memory_bytes=shape.weights_bytes,
            )
        )
    return [*found, *_trainers(config, shape, machine, trained)]


def _trainers(config: RunConfig, shape: TargetShape, machine: Machine, trained: int | None) -> list[Process]:
    """The consumer, and the other ranks: each has the draft, and on GPUs the next device."""
    device, memory = machine.device(config.training.device), None
    if trained is not None:
        memory = _trained_bytes(config) * trained + _head_bytes(shape.sizes, shape)
    first = int(device.partition(":")[2] or 0) if device != "cpu" else 0
    return [
        Process(
            role=role,
            device="cpu" if device == "cpu" else f"cuda:{first + rank}",
            threads=config.machine.consumer_threads,
            what="the draft, its optimizer, the target's embedding and lm_head",
            memory_bytes=memory,
        )
        for rank, role in enumerate(trainer_roles(config))
    ]


def _trained_bytes(config: RunConfig) -> int:
    """Of a parameter in each rank. A sharded one has its part of weights and moments besides the whole."""
    ranks = config.machine.trainers
    return PASS_BYTES + -(-STATE_BYTES // ranks) if config.machine.shard and ranks > 1 else TRAINED_BYTES


def _target_bytes(shape: TargetShape, config: RunConfig, machine: Machine) -> int:
    """The weights as the engine holds them: in its own dtype."""
    return target_bytes(shape, machine.dtype(config.target.dtype, engine_device(config, machine)))


def target_bytes(shape: TargetShape, dtype: str) -> int:
    return shape.weights_bytes if shape.quantised else int(shape.parameters * BYTES[dtype])


def target_bytes_at_least(shape: TargetShape, config: RunConfig, machine: Machine) -> int:
    """Below what the engine takes for the weights, also if the target is no Llama-like decoder.

    Files that are there tell nearly all; a config whose sizes are far beyond them is still counted.
    """
    counted = _target_bytes(shape, config, machine)
    least = counted // COUNTED_TOO_HIGH
    if not shape.has_weights or shape.quantised:
        return least
    device = engine_device(config, machine)
    given = config.target.dtype
    held = "bfloat16" if given == "auto" and device != "cpu" else machine.dtype(given, device)
    stored = shape.weights_bytes * BYTES[held] / BYTES[shape.dtype]
    return max(least, min(counted, int(stored)))


def _head_bytes(sizes: LayerSizes, shape: TargetShape) -> int:
    return int(2 * sizes.vocab_size * sizes.hidden_size * BYTES[shape.dtype])


class Disk(Section):
    """Bytes below the run's directory; `checkpoint_bytes`: of one, `checkpoints_bytes`: of all that are there
    at a time, with the best draft. `download_bytes`: what the hub's cache has to fetch. None: unknown."""

    checkpoint_bytes: int | None
    checkpoints_bytes: int | None
    exports_bytes: int | None
    answers_bytes: int
    logs_bytes: int
    ledger_bytes: int
    download_bytes: int
    total_bytes: int | None
    free_bytes: int | None


def disk_of(plan: RunPlan, shape: TargetShape, lengths: Lengths, trained: int | None, download: bool) -> Disk:
    config, samples = plan.config, plan.num_samples or 0
    one = checkpoints = exports = None
    if trained is not None:
        average = 4 if config.training.ema_decay is not None else 0
        one = trained * (STATE_BYTES + average)
        # One is written beside those that are kept, and the best draft's weights are held.
        checkpoints = one * (config.checkpoint.keep + 1) + 4 * trained
        width = BYTES[config.export.dtype]
        embedding = shape.sizes.vocab_size * shape.sizes.hidden_size
        exports = sum(
            int((trained + (embedding if name == "speculators" else 0)) * width)
            for name in config.export.formats
        )
    answers = int(samples * (ANSWER_BYTES + TOKEN_BYTES * lengths.sample))
    logs = FILE_BYTES_MAX * 2 * (config.machine.producers + config.machine.trainers + 1)
    in_flight = min(samples, _resident_samples(config, 1 + (config.features.budget_mib << 10)))
    ledger = LEDGER_FILE_BYTES + in_flight * LEDGER_BYTES + samples * ARCHIVED_BYTES
    if config.ledger.is_shared:  # it lies on its server
        ledger = 0
    fetched = shape.weights_bytes if download else 0
    parts = [answers, logs, ledger, fetched, checkpoints, exports]
    return Disk(
        checkpoint_bytes=one,
        checkpoints_bytes=checkpoints,
        exports_bytes=exports,
        answers_bytes=answers,
        logs_bytes=logs,
        ledger_bytes=ledger,
        download_bytes=fetched,
        total_bytes=None if trained is None else sum(part or 0 for part in parts),
        free_bytes=free_bytes(config.run.directory),
    )


def free_bytes(path: Path) -> int | None:
    """On the disk where `path` is or will be; None if it cannot be told."""
    try:
        space = os.statvfs(standing(path))
    except OSError:
        return None
    return space.f_bavail * space.f_frsize


def standing(path: Path) -> Path:
    """The innermost folder above `path` that exists, or `path` itself."""
    return next(folder for folder in [path.absolute(), *path.absolute().parents] if folder.exists())
